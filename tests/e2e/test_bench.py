"""The measurement of speed on a tiny checkpoint: its files, and going on where it was cut."""

import json

import pytest

from dori_lightning.types import InputError
from support.processes import PROGRAM, ended
from support.runs import on_tiny, run_task, write_material

BENCH = (
    "task=bench", "sampling.steps=2", "sampling.images_per_pair=1", "task.pairs=2", "task.steps=1",
    "task.noise_batch=1", "task.repeats=1", "task.sampling_pairs=1",
    "task.nemo_pairs=1", "task.wanda_pairs=1", "task.wanda.steps=1", "task.finetuning_pairs=1",
    "task.audit_pairs=2", "task.audit_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    place = write_material(tmp_path_factory.mktemp("material"), vm=2, control=0)
    return on_tiny(place, *BENCH)


@pytest.mark.slow
def test_families_are_measured_once_and_joined(material, tmp_path):
    folder = tmp_path / "bench"
    run_task(folder, *material, "task.rows=[attack]")
    first = (folder / "rows" / "attack.json").stat().st_mtime_ns
    run_task(folder, *material, "task.rows=[attack,sampling]")
    assert (folder / "rows" / "attack.json").stat().st_mtime_ns == first, "it was there already"
    record = json.loads((folder / "bench.json").read_text())
    assert set(record["families"]) == {"attack", "sampling"}
    assert {"device", "threads", "packages", "git_sha", "task"} <= record["provenance"].keys()
    rows = {row["name"]: row for row in record["families"]["attack"]["rows"]}
    assert rows["ours"]["seconds"]
    assert (folder / "figures" / "speed.png").is_file()
    run_task(folder, *material, "task.rows=[attack,nemo]", "task.seconds=1e-6")
    record = json.loads((folder / "bench.json").read_text())
    assert record["left_out"] == {"nemo": "no time left"}
    assert set(record["families"]) == {"attack", "sampling"}, "what is there is kept"
    with pytest.raises(InputError, match=r"task\.steps"):
        run_task(folder, *material, "task.steps=2")
    with pytest.raises(InputError, match=r"3 pairs of kind vm, and the list has 2"):
        run_task(tmp_path / "other", *material, "task.pairs=3", "task.rows=[attack]")


@pytest.mark.slow
def test_a_whole_audit_is_started_as_a_user_does(material, tmp_path):
    """With the run's own checkpoint and pairs on its command line."""
    ended(
        tmp_path, PROGRAM, *material, "task.rows=[audit]", f"paths.output={tmp_path}", "name=bench"
    )
    families = json.loads((tmp_path / "bench" / "bench.json").read_text())["families"]
    ours, again = families["audit"]["rows"]
    assert ours["samples"] > 0
    assert again["samples"] == 0, "everything was there"


@pytest.mark.slow
def test_the_measurement_of_a_gpu_runs_on_a_cpu_too(tmp_path, monkeypatch):
    """In miniature; a part that fails is named, and costs the others nothing."""

    def fails(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr("dori_lightning.tasks.bench.sampling_family", fails)
    folder = tmp_path / "gpu"
    with pytest.raises(RuntimeError, match="no room"):
        run_task(
            folder, "trainer=cpu", "checkpoint.width=32", "checkpoint.resolution=64",
            "checkpoint.device=cpu", "task.rows=[attack,sampling,nemo,finetuning]",
            "task.repeats=1", "task.pairs=2", "task.steps=1", "task.noise_batch=1",
            "task.nemo_pairs=2", "task.nemo.samples=2", "task.nemo.refine=false",
            "task.finetuning_pairs=1", "task.finetuning_updates=1", "sampling.steps=2",
            "sampling.images_per_pair=1", experiment="bench_gpu",
        )  # fmt: skip
    record = json.loads((folder / "bench.json").read_text())
    assert record["left_out"] == {"sampling": "it failed: no room"}
    assert set(record["families"]) == {"attack", "nemo", "finetuning"}
    assert record["provenance"]["numerics"]["tf32_matmul"] is False
    alone, ours = record["families"]["nemo"]["rows"]
    assert ours["samples"] > 0
    assert alone["flops"] > 0
    text = (folder / "bench.md").read_text()
    assert "not measured: sampling: it failed: no room" in text
    assert record["provenance"]["device"] in text
