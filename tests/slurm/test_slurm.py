"""Sweeps, fine-tuning over nodes, preemption and time limits on a real SLURM."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dori_lightning.runtime.job_status import read_status

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slurm, pytest.mark.enable_socket]

SMALL_NODES = (
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.timeout_min=20",
)


def command(material, output, *more):
    return [
        sys.executable, "-m", "dori_lightning",
        "pairs=folder", f"pairs.path={material / 'pairs'}",
        "checkpoint.name=tiny", f"checkpoint.source={material / 'checkpoint'}",
        "checkpoint.device=cpu", "trainer=cpu",
        "attack.budget.steps=2", "attack.noise_batch=2", "attack.snapshots=[]",
        "attack.inits=[prompt]", "attack.pairs_per_forward=1",
        "sampling.steps=2", "sampling.images_per_pair=2",
        "metrics.descriptors.local_correlation.threshold=0.5",
        "utility=none", "report.images=none",
        f"paths.output={output}", f"paths.cache={output / 'cache'}",
        *more,
    ]  # fmt: skip


def begin(cluster, arguments, cwd):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        arguments,
        cwd=cwd,
        env={**cluster.environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process, folder, seconds=900):
    """What a command printed until it ended, and what its jobs did."""
    text = process.communicate(timeout=seconds)[0]
    logs = sorted(folder.glob("sweeps/*/.submitit/*/*_log.*"))
    return text + "".join(f"\n== {p.name}\n{p.read_text()[-3000:]}" for p in logs)


def until(ready, process, seconds=600):
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.2)


def attacked(folder):
    """Finished attacks, by file, with the time they were written."""
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("attacks/*/*.safetensors")}


def test_a_sweep_is_an_array_with_as_many_jobs_at_once_as_asked_for(cluster, material, tmp_path):
    arguments = command(
        material, tmp_path, "-m", "sweep=grid", "mitigation=none,random_pruning",
        "attack/budget=l2_small,unbounded", "attack.budget.steps=2", "hydra/launcher=slurm",
        "hydra.launcher.array_parallelism=2", *SMALL_NODES,
    )  # fmt: skip
    process = begin(cluster, arguments, tmp_path)
    most, numbers = 0, set()
    while process.poll() is None:
        queue = cluster.queue()
        most = max(most, sum(job.state == "RUNNING" for job in queue))
        numbers |= {job.number.partition("_")[0] for job in queue}
        time.sleep(0.5)
    text = said(process, tmp_path)
    assert process.returncode == 0, text
    assert len(numbers) == 1, "one array"
    assert most == 2
    folder = tmp_path / "sweeps" / "grid"
    assert len(list(folder.glob("*/report.json"))) == 4, text
    assert all(p.parent.stat().st_mode & 0o077 == 0 for p in folder.glob("*/report.json"))
    status = subprocess.run(
        [sys.executable, "-m", "dori_lightning", "task=status", f"task.runs={folder}",
         f"paths.output={tmp_path}"],
        cwd=tmp_path, env=cluster.environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "4 done of 4 jobs; 20 pairs attacked." in status.stderr


def test_two_nodes_fine_tune_one_model(cluster, material, tmp_path):
    arguments = command(
        material, tmp_path, "-m", "sweep=nodes", "seed=3", "mitigation=esd_x",
        "mitigation.steps=2", "mitigation.batch=2", "mitigation.sampling_steps=2",
        "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2",
        "hydra/launcher=slurm_ddp", *SMALL_NODES,
    )  # fmt: skip
    arguments.remove("trainer=cpu")
    process = begin(cluster, arguments, tmp_path)
    nodes: set[str] = set()
    while process.poll() is None:
        nodes |= {job.node for job in cluster.queue()}
        time.sleep(0.5)
    text = said(process, tmp_path)
    assert process.returncode == 0, text
    assert "n[1-2]" in nodes
    (folder,) = (p.parent for p in (tmp_path / "sweeps" / "nodes").glob("*/report.json"))
    assert len(attacked(folder)) == 5
    assert len(list((tmp_path / "cache" / "edits").glob("*.safetensors"))) == 1


LONG = ("attack.budget.steps=150",)


def test_a_preempted_job_goes_back_into_the_queue_and_on_from_where_it_was(
    cluster, material, tmp_path
):
    arguments = command(
        material, tmp_path, "-m", "sweep=preempted", "seed=1", *LONG, "hydra/launcher=slurm",
        *SMALL_NODES,
    )  # fmt: skip
    process = begin(cluster, arguments, tmp_path)
    sweep = tmp_path / "sweeps" / "preempted"

    def folder():
        return next((p.parent for p in sweep.glob("*/status.json")), None)

    until(lambda: (place := folder()) is not None and len(attacked(place)) >= 1, process)
    place = folder()
    assert place is not None
    (job,) = cluster.queue()
    cluster.ask("scancel", "--signal=USR2", job.number)
    until(lambda: any(j.state == "PENDING" for j in cluster.queue()), process)
    before = attacked(place)
    assert 1 <= len(before) < 5
    status = read_status(place)
    assert status is not None
    assert status.state == "interrupted"
    # SLURM would wait two minutes
    until(lambda: _start_now(cluster, job.number), process)
    text = said(process, tmp_path)
    assert process.returncode == 0, text
    after = attacked(place)
    assert len(after) == 5
    assert before.items() <= after.items(), "what was done is not done again"
    assert (place / "report.json").is_file()


def _start_now(cluster, number):
    """Whether a requeued job may start at once."""
    done = subprocess.run(
        ["scontrol", "update", f"JobId={number}", "StartTime=now"],
        env=cluster.environment, check=False, capture_output=True, timeout=60,
    )  # fmt: skip
    return done.returncode == 0


def test_a_job_whose_time_is_up_leaves_before_it_is_killed(cluster, material, tmp_path):
    # SLURM counts in minutes; the signal comes 30 seconds before the end
    arguments = command(
        material, tmp_path, "-m", "sweep=late", "seed=2", "attack.budget.steps=5000",
        "hydra/launcher=slurm", *SMALL_NODES, "hydra.launcher.max_num_timeout=0",
        "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=30",
    )  # fmt: skip
    process = begin(cluster, arguments, tmp_path)
    text = said(process, tmp_path)
    assert process.returncode == 1, text
    assert "timed-out too many times" in text
    (place,) = (p.parent for p in (tmp_path / "sweeps" / "late").glob("*/status.json"))
    assert not (place / "report.json").exists()
    status = read_status(place)
    assert status is not None
    assert status.state == "interrupted"
