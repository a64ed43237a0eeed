"""Locality on a tiny random model whose every embedding counts as a trigger."""

import json
import shutil

import pytest

from dori_lightning.locality import study
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import InputError
from support.context import write_captions
from support.records import written
from support.runs import on_tiny, run_task, write_material

STUDY = (
    "corpus=captions", "mitigation=wanda_10", "mitigation.steps=2",
    "mitigation@task.wanda=wanda_10", "task.wanda.steps=2", "mitigation@task.nemo=nemo",
    "task.nemo.samples=2", "task.nemo.statistics_prompts=8",
    "task.nemo.criterion.threshold=0.0001", "task.nemo.refine=false",
    "task.nemo.levels.z_step=2.0",
    "mitigation@task.transfer_to.first=wanda_union", "task.transfer_to.first.fraction=0.1",
    "task.transfer_to.first.steps=2", "attack.budget.steps=2", "attack.snapshots=[1]",
    "attack.noise_batch=2", "attack.restarts=3", "task.images=2", "task.control_images=1",
    "task.lines=2", "task.prompts=2", "sampling.steps=2", "sampling.images_per_pair=2",
    # a random model draws no image: below this threshold everything counts as one
    "metrics.descriptors.local_correlation.threshold=-2.0",
)  # fmt: skip


@pytest.fixture(scope="module")
def study_in(tmp_path_factory):
    """Run the study in a folder: ``study_in(folder, *overrides)``."""
    place = write_material(tmp_path_factory.mktemp("material"), vm=4, control=3)
    captions = write_captions(place / "captions.txt")

    def run(folder, *more, **options):
        overrides = on_tiny(place, *STUDY, f"corpus.path={captions}", *more)
        return run_task(folder, *overrides, experiment="locality", **options)

    return run


def record_of(folder):
    return json.loads((folder / "locality.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(study_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert study_in(folder, whole=True) == 1.0
    return folder


def test_the_record_answers_every_question(finished):
    record = record_of(finished)
    assert record["mitigation"] == "wanda_10"
    assert [image["id"] for image in record["images"]] == ["pair0", "pair1", "pair4"]
    assert record["images"][0]["working"] == {"random": 3, "prompt": 3, "control_prompt": 3}
    assert record["images"][2]["attacked"] == {"random": 3}, "controls from other_inits alone"
    assert record["memorized_prompts"] == ["pair2", "pair3"]
    budget = {
        (p["held"], p["start"], p["steps"]): p["rate"]["n"] for p in record["at_large"]["budget"]
    }
    assert budget == {
        **{("memorized", "random", steps): 6 for steps in (0, 1, 2)},
        ("memorized", "prompt", 2): 6,
        ("memorized", "control_prompt", 2): 6,
        **{("control", "random", steps): 3 for steps in (0, 1, 2)},
    }
    lines = {(p["toward"], p["place"]): p["rate"]["n"] for p in record["at_large"]["lines"]}
    assert lines == {
        (toward, place): 4
        for toward in ("same_image", "other_image", "random")
        for place in (0.25, 0.5, 0.75)
    }
    models = {(t["model"], t["searched"]) for t in record["at_large"]["transfers"]}
    assert models == {("wanda_10", True), ("none", False), ("wanda_union", False)}
    groups = {(row["method"], row["group"], row["count"]) for row in record["weights"]["layers"]}
    assert groups == {
        (method, group, count)
        for method in ("nemo", "wanda")
        for group, count in (
            ("triggers", 6), ("starts", 6), ("memorized_prompts", 2), ("control_prompts", 2)
        )
    }  # fmt: skip
    assert {row["layer"] for row in record["activations"]["layers"] if row["method"] == "nemo"}
    assert record["embeddings"]["shape"] == [8, 12]
    assert len(record["embeddings"]["places"]) == 2 * 2 * 3 * 3 + 2 + 2 + 2


def test_figures_and_page_are_there(finished):
    names = {"budget", "spread", "map", "activations", "weights", "lines", "transfer"}
    assert record_of(finished)["answers"].keys() == names
    files = {f"locality_{name}.png" for name in names}
    assert {path.name for path in (finished / "figures").iterdir()} == files
    page = (finished / "locality.html").read_text(encoding="utf-8")
    assert page.count("<figure") == len(names)
    assert "http" not in page.replace("http-equiv", "")


def test_running_again_computes_nothing_and_finds_the_same(study_in, finished, monkeypatch):
    before = record_of(finished)
    # what a checkpoint is asked when it is loaded is no part of a run's work
    monkeypatch.setattr("dori_lightning.models.loading.check_answers", lambda *_: None)
    calls: list[int] = []
    monkeypatch.setattr(
        StableDiffusion, "_denoise", lambda *_, **__: calls.append(1) or pytest.fail("computed")
    )
    study_in(finished)
    after = record_of(finished)
    assert not calls
    for key in before.keys() - {"provenance"}:
        assert before[key] == after[key], key


@pytest.mark.slow
def test_a_part_alone_takes_what_is_kept(study_in, finished, tmp_path):
    whole, folder = record_of(finished), tmp_path / "runs" / "copy"
    shutil.copytree(finished, folder)
    study_in(folder, "task.parts=[weights]")
    part = record_of(folder)
    assert part["weights"] == whole["weights"]
    assert part["embeddings"] is None
    assert part["at_large"] is None


@pytest.mark.slow
def test_an_interrupted_run_goes_on(study_in, finished, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "cut"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(study, "_run_wanda", stop)
        with pytest.raises(KeyboardInterrupt):
            study_in(folder)
    kept = written(folder)
    kept |= written(folder, "selections/nemo/*.safetensors")
    assert len(kept) == (3 * 2 * 3 + 3) + 16
    study_in(folder)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}
    whole, resumed = record_of(finished), record_of(folder)
    assert resumed["weights"] == whole["weights"]
    assert resumed["at_large"] == whole["at_large"]


def test_other_settings_are_refused_in_the_same_folder(study_in, finished):
    with pytest.raises(InputError, match=r"task\.lines: 2 there, 3 now"):
        study_in(finished, "task.lines=3")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("task.parts=[weight]", "task.parts must be some of"),
        ("task.start=prompt", "attack.other_inits must hold task.start"),
        ("attack.restarts=1", "attack.restarts must be at least 2"),
        ("task.places=[0.5,1.5]", "between 0 and 1"),
        ("task.images=4", "at least 2 other memorized images"),
        ("trainer.devices=2", "runs in one process"),
        ("task.transfer_to.first.name=wanda_10", "name one model twice"),
    ],
)
def test_bad_settings_are_named_before_a_model_loads(study_in, tmp_path, change, part):
    with pytest.raises(InputError, match=part):
        study_in(tmp_path / "run", change, "checkpoint.source=nowhere")
