"""Record, words, figures and page of a locality run that never ran."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from dori_lightning.locality.embeddings import Group, distances, embedding_findings
from dori_lightning.locality.estimates import rate_of
from dori_lightning.locality.layers import Selection, activation_findings, weight_findings
from dori_lightning.locality.study import BudgetPoint, LinePoint, Transfer, TransferFindings
from dori_lightning.report.locality import (
    LocalityReport,
    StudiedImage,
    answers,
    draw_locality,
    findings,
    number_tables,
    render_locality_page,
    write_locality_files,
)
from dori_lightning.report.record import Provenance
from dori_lightning.tasks.results_logging import track_locality
from dori_lightning.tracking import Tracker
from dori_lightning.types import Budget
from support.locality import attempts, own_prompts, pair, prompt_groups, rows

LAYERS = [f"down_blocks.0.attentions.{k}.transformer_blocks.0" for k in range(2)]
NOW = datetime(2026, 11, 24, 8, 0, tzinfo=UTC)


def transfer() -> TransferFindings:
    half = rate_of([True, False, True, True], "aabb")
    none = rate_of([False, False], ["c0", "c0"])
    return TransferFindings(
        budget=(
            BudgetPoint("memorized", "random", 1, none, 0),
            BudgetPoint("memorized", "random", 50, half, 1),
            BudgetPoint("control", "random", 50, none, 0),
        ),
        lines=tuple(
            LinePoint(toward, place, half)
            for toward in ("same_image", "other_image", "random")
            for place in (0.25, 0.5)
        ),
        transfers=tuple(
            Transfer(model, model == "nemo", held, start, half if held == "memorized" else none)
            for model in ("nemo", "none")
            for held, start in (
                ("memorized", "prompt_itself"), ("memorized", "random"), ("control", "random")
            )
        ),
    )  # fmt: skip


def groups(count: int = 3) -> list[Group]:
    own = tuple(map(pair, "a" * count + "b" * count))
    return [
        Group("triggers", own, rows(2 * count, 1)),
        Group("starts", own, rows(2 * count, 2)),
        Group("memorized_prompts", tuple(map(pair, "xyz")), rows(3, 3)),
        Group("control_prompts", tuple(map(pair, "uvw")), rows(3, 4)),
    ]


def report(*, working: bool = True) -> LocalityReport:
    ends = 3 if working else 0
    found = [
        attempt
        for k, name in enumerate("ab")
        for attempt in attempts(name, rows(ends, k), rows(ends, 10 + k))
    ]
    chosen = groups() if working else groups()[2:]
    everything = torch.cat([group.embeddings for group in chosen])
    compared = {
        "distance": distances(everything).expand(len(LAYERS), -1, -1),
        "length": everything.flatten(1).double().norm(dim=1).expand(len(LAYERS), -1),
    }
    masks = torch.rand(len(everything), 12, generator=torch.Generator().manual_seed(0)) > 0.7
    nemo, wanda = (
        [
            Selection.of({f"{name}.{end}": mask for name in LAYERS}, memorized=memorized)
            for mask in masks
        ]
        for end, memorized in (("attn2.to_v.weight", True), ("ff.net.2.weight", None))
    )
    return LocalityReport(
        checkpoint="tiny",
        mitigation="nemo",
        start="random",
        restarts=3,
        budget=Budget(steps=50),
        descriptor="ncc",
        threshold=0.5,
        pictures_each=4,
        images=(
            StudiedImage("a", "vm", "a <b>red</b> boat", {"random": 3}, {"random": ends}),
            StudiedImage("c0", "control", "a house", {"random": 2}, {"random": 0}),
        ),
        memorized_prompts=("m0", "m1", "m2"),
        control_prompts=("c0", "c1", "c2"),
        embeddings=embedding_findings(found, own_prompts("a", "b"), prompt_groups()),
        activations=activation_findings(
            {"nemo": (LAYERS, compared), "wanda": (LAYERS, compared)},
            chosen,
            timestep=981,
            noise_seed=0,
        ),
        weights=weight_findings(
            {"nemo": nemo, "wanda": wanda},
            chosen,
            settings={"nemo": {}, "wanda": {}},
        ),
        transfer=transfer() if working else TransferFindings((), (), ()),
        provenance=Provenance(
            git_sha=None, packages={}, python="3.11", platform="Linux", device="cpu", seed=0,
            config={"logger": {"token": "hush"}}, checkpoint="tiny", fingerprint="f" * 16,
            image_hashes={}, started=NOW, finished=NOW, unet_evaluations=1, wall_seconds=1.0,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    return report()


@pytest.fixture(scope="module")
def nothing():
    return report(working=False)


@pytest.fixture(scope="module")
def folders(whole, nothing, tmp_path_factory):
    """The files of both, drawn once."""
    place = tmp_path_factory.mktemp("locality")
    assert write_locality_files(whole, place / "whole") == place / "whole" / "locality.html"
    write_locality_files(nothing, place / "nothing")
    return place


def test_every_answer_has_its_control(whole):
    found = {name: values or {} for name, values in findings(whole).items()}
    budget = found["budget"]
    assert (budget["memorized"].hits, budget["control"].hits, budget["others"]) == (3, 0, {})
    assert found["spread"]["starts"].group == "starts"
    assert found["spread"]["nearest"]["triggers"].chance == pytest.approx(1 / 7)
    assert found["map"] == {"triggers": 6, "prompts": 8}
    for own in found["activations"]["methods"].values():
        assert own["layers"] == 2
        assert {"apart", "closer", "closer_within"} <= own.keys()
    for own in found["weights"]["methods"].values():
        assert (own["both_empty"], own["compared"]) == (0, 12)
        assert 0 < own["chance"] < 1
        assert 0 <= own["iou"]["starts"] <= 1
    assert found["lines"]["same_image"].place == found["lines"]["random"].place == 0.5
    assert {name: own["triggers"].hits for name, own in found["transfer"]["models"].items()} == {
        "nemo": 3,
        "none": 3,
    }


def test_answers_say_the_numbers(whole):
    said = {answer.name: answer.text for answer in answers(whole)}
    assert said.keys() == findings(whole).keys()
    assert "3 of 4 (75 %, interval 30 to 95 %)" in said["budget"]
    assert "0 of 12 comparisons" in said["weights"]
    assert "By transformer block, what the two methods select overlaps to" in said["weights"]
    assert all(answer.caption and "  " not in answer.text for answer in answers(whole))


def test_files_are_written_and_listed(whole, folders, tmp_path):
    folder = folders / "whole"
    record = json.loads((folder / "locality.json").read_text())
    assert record["at_large"]["budget"][1]["rate"]["images"] == {"a": [1, 2], "b": [2, 2]}
    assert "hush" not in (folder / "locality.json").read_text()
    figures = sorted((folder / "figures").iterdir())
    assert len(figures) == len(answers(whole)) == 7
    write_locality_files(whole, tmp_path)
    assert [f.read_bytes() for f in figures] == [
        f.read_bytes() for f in sorted((tmp_path / "figures").iterdir())
    ]
    assert record["answers"] == {answer.name: answer.text for answer in answers(whole)}


def test_every_row_of_numbers_is_in_a_table(whole):
    tables = {table.title: table for table in number_tables(whole)}
    assert len(tables) == 9
    budget = tables["Success against budget"]
    assert budget.header == ("images", "start", "steps", "rate", "diverged")
    assert budget.rows[1] == (
        "memorized", "random embeddings", "50",
        "3 of 4 (75 %, interval 30 to 95 %); over images 50 to 100 %", "1",
    )  # fmt: skip
    moved = tables["Transfer"]
    assert moved.rows[0][:4] == ("nemo", "yes", "memorized", "the prompt itself, not attacked")
    assert len(tables["Selected weights"].rows) == len(whole.weights.layers)


def test_the_page_stands_alone_and_escapes(folders):
    page = (folders / "whole" / "locality.html").read_text()
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;b&gt;red&lt;/b&gt;" in page
    assert page.count('role="img"') == 7
    assert page.count("<svg") == 7


def test_no_working_trigger_is_said_rather_than_drawn(nothing, folders):
    found = findings(nothing)
    for name in ("spread", "weights", "activations", "lines", "transfer"):
        assert found[name] is None
    assert len(answers(nothing)) == 7
    record = json.loads((folders / "nothing" / "locality.json").read_text())
    assert record["weights"]["layers"]


def test_parts_that_were_not_asked_are_not_answered(whole):
    alone = replace(whole, embeddings=None, activations=None, transfer=None)
    assert [answer.name for answer in answers(alone)] == ["weights"]
    assert 'id="weights"' in render_locality_page(alone, draw_locality(alone))


class Told(Tracker):
    """Keeps what a W&B run would be told."""

    def __init__(self) -> None:
        super().__init__([CSVLogger("unused", name="csv")])
        self.curves: dict[str, dict[int, float]] = {}
        self.tables: dict[str, list[Mapping[str, object]]] = {}
        self.shown: list[str] = []
        self.kept: dict[str, object] = {}
        self.files: set[str] = set()

    def scalars(self, rows, *, step_metric):
        for step, values in rows:
            for key, value in values.items():
                self.curves.setdefault(f"{key} by {step_metric}", {})[step] = value

    def image(self, event, image, *, caption):
        assert image.size > (1, 1)
        assert caption
        self.shown.append(event)

    def table(self, name, rows):
        self.tables[name] = list(rows)

    def summary(self, values):
        self.kept.update(values)

    def artifact(self, name, *, files, **_):
        assert name == "tiny-nemo-locality"
        self.files |= set(files)


def test_loggers_get_curves_tables_figures_and_the_page(whole, folders):
    told = Told()
    track_locality(told, whole, folders / "whole", objective=0.75)
    assert told.curves["locality/rate/random/memorized by locality/steps"] == {1: 0, 50: 0.75}
    assert told.curves["locality/rate/random/control by locality/steps"] == {50: 0}
    assert told.curves["locality/line_rate/same_image by locality/percent_of_line"] == {
        25: 0.75, 50: 0.75,
    }  # fmt: skip
    moved = {(r["model"], r["images"], r["start"]): r for r in told.tables["locality/transfer"]}
    assert moved["none", "memorized", "random embeddings"]["rate"].startswith("3 of 4 (75 %")
    assert len(told.tables["locality/selected_weights"]) == len(whole.weights.layers)
    assert f"locality/{answers(whole)[0].name}" in {s.replace("locality_", "") for s in told.shown}
    assert told.kept == {"final/objective": 0.75}
    assert {"locality.json", "locality.html"} <= told.files
    assert not any("pictures" in name for name in told.files)


def test_loggers_of_a_run_that_found_nothing(nothing, folders):
    told = Told()
    track_locality(told, nothing, folders / "nothing", objective=None)
    assert told.curves == {}
    assert "locality/transfer" not in told.tables
    assert told.kept == {"final/objective": None}
