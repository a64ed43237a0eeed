"""Pages made again from run folders: nothing is lost, and nothing is shown that was kept out."""

import json
import math
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dori_lightning.audit.utility import write_utility
from dori_lightning.metrics.utility import DenoisingLoss, PictureRow, Utility
from dori_lightning.report import pages
from dori_lightning.report.comparison import compare, headline_rows
from dori_lightning.report.pages import render_page, write_table
from dori_lightning.report.record import (
    NOT_KEPT,
    AuditReport,
    read_run,
    shown_report,
    strictest,
    write_report,
)
from dori_lightning.types import InputError
from support import fake_reports as fakes
from support.fake_audits import write_audit

pytestmark = pytest.mark.usefixtures("no_figures")
EXPERIMENTS = Path(__file__).resolve().parents[3] / "experiments"


def kept(folder: Path, **more: Any) -> AuditReport:
    """An invented audit whose references carry their true hashes."""
    report = fakes.report(folder, **more)
    outcomes = tuple(
        replace(o, pair=replace(o.pair, sha256=sha256(o.pair.image.read_bytes()).hexdigest()))
        for o in report.outcomes
    )
    return replace(report, outcomes=outcomes)


def test_an_audit_comes_back_as_it_was(tmp_path):
    report = fakes.with_evidence(kept(tmp_path))
    report = fakes.with_base(report, ("yes", "no", "cannot_tell", "no"))
    write_report(report, tmp_path)
    back = shown_report(read_run(tmp_path))
    for name in (
        "base", "calibration", "cells", "false_discovery_rate", "flags", "images", "origins",
        "power", "provenance", "recommended_budget", "unseen", "verdict",
    ):  # fmt: skip
        assert getattr(back, name) == getattr(report, name)
    for one, other in zip(back.outcomes, report.outcomes, strict=True):
        assert (one.images, one.pair.image) == (other.images, other.pair.image)
    assert render_page(back) == render_page(report)


def test_a_baseline_comes_back(tmp_path):
    report = kept(tmp_path)
    before = tuple(o for o in report.outcomes if o.condition.attack == "prompt")
    own = tuple(replace(cell, mitigation="wanda") for cell in report.cells)
    write_report(replace(report, mitigation="wanda", baseline=before, cells=own), tmp_path)
    back = shown_report(read_run(tmp_path))
    assert [o.pair.id for o in back.baseline] == [o.pair.id for o in before]
    assert render_page(back).count("data:image/jpeg") == 8 * 4


def test_what_a_mitigation_costs_comes_back(tmp_path):
    paths = [fakes.picture(tmp_path / "utility" / f"{k}.png", k) for k in range(2)]
    row = PictureRow(
        "ordinary", "a", "a", "a boat", 1, math.nan, None, None, None, None, *paths
    )  # fmt: skip
    gone = replace(row, id="b", mitigated=tmp_path / "nowhere.png")
    spent = Utility(
        "ncc", DenoisingLoss(0.1, 0.2, 2.0, (1.5, math.nan), 4, 2), None, None, None,
        {"kid": "too few"}, picture_rows=(row, gone),
    )  # fmt: skip
    write_report(replace(kept(tmp_path), utility=spent), tmp_path)
    write_utility(spent, tmp_path)
    back = shown_report(read_run(tmp_path)).utility
    assert back.denoising_loss.ratio == 2.0
    assert math.isnan(back.denoising_loss.ratio_ci95[1])
    assert [r.id for r in back.picture_rows] == ["a"]
    assert math.isnan(back.picture_rows[0].similarity)


def test_originals_that_are_gone_or_others_are_not_shown(tmp_path):
    write_report(kept(tmp_path, vm=2, control=1), tmp_path)
    (tmp_path / "references" / "vm_00.png").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "references" / "vm_01.png")
    back = shown_report(read_run(tmp_path))
    images = {o.pair.id: o.pair.image for o in back.outcomes}
    assert [name for name, image in images.items() if image == NOT_KEPT] == ["vm_00", "vm_01"]
    text = render_page(back)
    assert text.count("not kept") == 2


def test_who_cut_a_prompt_and_the_commit_come_back(tmp_path):
    report = kept(tmp_path, vm=2, control=1)
    first = report.outcomes[0].pair.id
    outcomes = tuple(
        replace(o, pair=replace(o.pair, cut_by=("CLIP", "T5") if o.pair.id == first else ()))
        for o in report.outcomes
    )
    origin = replace(report.provenance, commit="c" * 40)
    write_report(replace(report, outcomes=outcomes, provenance=origin), tmp_path)
    back = shown_report(read_run(tmp_path))
    assert {o.pair.id: o.pair.cut_by for o in back.outcomes if o.pair.cut_by} == {
        first: ("CLIP", "T5")
    }
    assert "c" * 40 in render_page(back)


def test_a_record_of_another_version_is_refused(tmp_path):
    path = write_report(kept(tmp_path), tmp_path)
    document = json.loads(path.read_text())
    del document["provenance"]["platform"]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"provenance\.platform"):
        shown_report(read_run(tmp_path))


def test_records_of_earlier_versions_are_read(tmp_path):
    """They have no effort, no first success, no samples behind the calibration."""
    path = write_report(kept(tmp_path), tmp_path)
    document = json.loads(path.read_text())
    for name in ("invalid", "utility", "effort"):
        del document[name]
    for name in ("null", "ceiling"):
        del document["calibration"][name]
    for cell in document["cells"]:
        del cell["counted"], cell["first_success"]
    path.write_text(json.dumps(document))
    report = read_run(tmp_path).report
    assert report.calibration.null == ()
    assert {cell.counted for cell in report.cells} == {"at_budget"}
    assert render_page(shown_report(read_run(tmp_path)))


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.rglob("report.json")), ids=str)
def test_records_of_the_experiments_are_read(path):
    assert read_run(path.parent).report.cells


@pytest.mark.parametrize(
    ("allowed", "asked", "shown"),
    [
        (["full", "full"], "full", "full"),
        (["full", "none"], "full", "none"),
        (["blurred", "full"], "full", "blurred"),
        (["blurred", "full"], "none", "none"),
    ],
)
def test_the_strictest_run_decides_what_is_shown(tmp_path, allowed, asked, shown):
    runs = [
        read_run(write_audit(tmp_path / str(k), config={"report": {"images": name}}))
        for k, name in enumerate(allowed)
    ]
    assert strictest(runs, asked) == shown


def test_a_sweeps_page_shows_pictures_and_links_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "sweep_figures", lambda *_, **__: {})
    for name in ("none", "wanda"):
        report = kept(tmp_path / name, vm=3, control=2)
        own = tuple(replace(cell, mitigation=name) for cell in report.cells)
        write_report(replace(report, mitigation=name, cells=own), tmp_path / name)
    (tmp_path / "wanda" / "pictures" / "vm_00_dori_50_1.png").unlink()
    found = compare([read_run(tmp_path / name) for name in ("none", "wanda")])
    rows = headline_rows(found)

    def page(**more: Any) -> str:
        return write_table(found, rows, tmp_path, **more)[-1].read_text()

    text = page()
    assert text.count("data:image/jpeg") == 5 + 2 * 2 * 5 - 1
    assert "1 image is no longer where the runs left it." in text
    assert 'href="wanda/report.html"' in text
    assert 'data-outcome="m0 m1"' in text
    assert 'data-outcome="gone"' in text
    assert "Shown are 2 of 5 pairs" in page(max_pairs=2)
    assert "(blurred)" in page(images="blurred")
    hidden = page(images="none")
    assert "data:image" not in hidden
    assert "no longer where" not in hidden
