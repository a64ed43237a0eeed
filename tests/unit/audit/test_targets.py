"""A pair with several training images: the closest counts, and the best drawn one is attacked."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from dori_lightning.audit import targets
from dori_lightning.mitigations.base import edit_key
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.report.pages import render_page
from dori_lightning.report.record import read_run, shown_report
from support.context import make_audit_context, make_context
from support.records import report_json
from support.runs import SMALL, on_tiny, run_task, write_material
from support.tiny import tiny_model


@pytest.fixture(scope="module")
def audits(tmp_path_factory):
    """An audit of single images, and one with pair0's own generated image as its second."""
    place = write_material(tmp_path_factory.mktemp("several"))
    first, second = place / "first", place / "second"
    given = (*on_tiny(place, *SMALL), "corpus=none", "report.images=full")
    run_task(first, *given)
    pairs = place / "pairs"
    (pairs / "leak").mkdir()
    shutil.move(pairs / "0.png", pairs / "leak/1.png")
    shutil.copy(next((first / "pictures/prompt/pair0").glob("*.png")), pairs / "leak/2.png")
    table = pairs / "metadata.csv"
    table.write_text(table.read_text().replace("0.png", "leak"))
    run_task(second, *given)
    return first, second


def test_the_second_image_is_what_came_back(audits):
    first, second = (json.loads((folder / "report.json").read_text()) for folder in audits)
    (hits,) = (c["hits"] for c in first["cells"] if (c["attack"], c["kind"]) == ("prompt", "vm"))
    assert hits == 0
    (hits,) = (c["hits"] for c in second["cells"] if (c["attack"], c["kind"]) == ("prompt", "vm"))
    assert hits == 1
    pair = next(p for p in second["pairs"] if p["id"] == "pair0")
    assert len(pair["references"]) == 2
    assert pair["conditions"][0]["reference"] == pair["references"][0]
    assert set(second["provenance"]["image_hashes"]) > {"pair0", "pair0/1.png"}


def test_record_and_page_name_the_reference(audits):
    _, second = audits
    rows = pd.read_parquet(second / "pairs.parquet")
    own = rows[(rows.pair_id == "pair0") & (rows.attack == "prompt")]
    assert [name.rpartition("/")[2] for name in own.reference] == ["2.png"]
    assert own.original.tolist() == own.reference.tolist(), "the attack aims at what is drawn best"
    assert rows[rows.pair_id != "pair0"].reference.isna().all()
    page = (second / "report.html").read_text()
    assert "2.png, of 2 reference images" in page
    back = shown_report(read_run(second))
    assert {len(o.pair.references) for o in back.outcomes} == {1, 2}
    assert "2.png, of 2 reference images" in render_page(back)


def test_single_images_leave_no_trace_of_the_choice(audits):
    first, _ = audits
    columns = set(pd.read_parquet(first / "pairs.parquet").columns)
    assert not columns & {"reference", "other_originals", "other_sha256"}
    text = json.dumps(report_json(first)["pairs"])
    assert '"references"' not in text
    assert '"reference"' not in text


def test_nothing_is_generated_where_there_is_no_choice(tmp_path, monkeypatch):
    context = make_audit_context(tmp_path, tiny_model(tmp_path / "checkpoint"))
    monkeypatch.setattr(targets, "generate_images", lambda *_, **__: pytest.fail("generates"))
    assert targets.aim(context) is context


def test_every_image_is_part_of_an_edits_key(tmp_path):
    model = tiny_model(tmp_path / "checkpoint")
    context = make_context(tmp_path, model)
    one, *others = context.data.pairs
    several = replace(one, others=others[0].references)
    more = replace(one, others=(*others[0].references, *others[1].references))
    keys = [edit_key(NoMitigation(), model, [pair], context) for pair in (one, several, more)]
    assert len(set(keys)) == 3
