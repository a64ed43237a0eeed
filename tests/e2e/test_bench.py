"""The measurement of speed on a tiny checkpoint: its files, and going on where it was cut."""

import json
from pathlib import Path

import pytest

from dori_lightning.types import InputError
from support.runs import run_task, write_pairs
from support.tiny import write_tiny

SMALL = (
    "task=bench", "pairs=folder", "checkpoint.name=tiny", "checkpoint.device=cpu", "trainer=cpu",
    "sampling.steps=2", "sampling.images_per_pair=1", "task.sampler.steps=1",
    "task.sampler.images_per_pair=1", "task.pairs=2", "task.steps=1", "task.noise_batch=1",
    "task.repeats=1", "task.quality_pairs=0", "task.compile=false", "task.sampling_pairs=1",
    "task.nemo_pairs=1", "task.wanda_pairs=1", "task.wanda.steps=1", "task.finetuning_pairs=1",
    "task.scaling_pairs=[2]", "task.scaling_budgets=[1,2]", "task.scaling_steps=2",
    "task.scaling_repeats=1", "task.startup_repeats=1", "task.audit_pairs=2",
    "task.audit_steps=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    place = tmp_path_factory.mktemp("material")
    write_tiny(place / "checkpoint")
    write_pairs(place / "pairs", vm=2, control=0)
    return (*SMALL, f"checkpoint.source={place / 'checkpoint'}", f"pairs.path={place / 'pairs'}")


@pytest.mark.slow
def test_families_are_measured_once_and_joined(material: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    run_task(folder, *material, "task.rows=[attack]")
    first = (folder / "rows" / "attack.json").stat().st_mtime_ns
    run_task(folder, *material, "task.rows=[attack,scaling]")
    assert (folder / "rows" / "attack.json").stat().st_mtime_ns == first, "it was there already"
    record = json.loads((folder / "bench.json").read_text())
    assert set(record["families"]) == {"attack", "scaling"}
    assert {"device", "threads", "packages", "git_sha", "task"} <= record["provenance"].keys()
    rows = {row["name"]: row for row in record["families"]["attack"]["rows"]}
    assert rows["B2"]["skipped"]
    assert rows["ours"]["median_seconds"] > 0
    assert "encoded each step 2" in (folder / "bench.md").read_text()
    assert (folder / "figures" / "speed.png").is_file()
    with pytest.raises(InputError, match=r"task\.steps"):
        run_task(folder, *material, "task.steps=2")
    with pytest.raises(InputError, match="attacks 3 pairs of kind vm, and the list has 2"):
        run_task(tmp_path / "other", *material, "task.pairs=3", "task.rows=[attack]")


@pytest.mark.slow
def test_the_program_is_started_and_audits(material: tuple[str, ...], tmp_path: Path) -> None:
    """As a user starts it: with the run's own checkpoint and pairs on its command line."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "dori_lightning", *material, "task.rows=[startup,audit]",
         f"paths.output={tmp_path}", "name=bench"],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    families = json.loads((tmp_path / "bench" / "bench.json").read_text())["families"]
    assert [row["name"] for row in families["startup"]["rows"]] == ["--help", "--cfg job", "audit"]
    ours, again = families["audit"]["rows"]
    assert ours["samples"] > 0
    assert again["samples"] == 0, "everything was there"
