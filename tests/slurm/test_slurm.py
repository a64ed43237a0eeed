"""Sweeps, fine-tuning over nodes, preemption and time limits on a real SLURM."""

import subprocess
import time

import pytest

from dori_lightning.runtime.job_status import read_status
from support.processes import PROGRAM, begin, ended, said, until
from support.records import written
from support.runs import SMALL, on_tiny

pytestmark = [pytest.mark.slurm, pytest.mark.enable_socket]

SMALL_NODES = (
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.timeout_min=20",
)


def command(material, output, *more):
    return [
        PROGRAM, "-m", *on_tiny(material, *SMALL, "attack.pairs_per_forward=1"),
        "sampling.images_per_pair=2", *SMALL_NODES, f"paths.output={output}",
        f"paths.cache={output / 'cache'}", *more,
    ]  # fmt: skip


def text_of(process, folder):
    """What a command printed until it ended, and what its jobs did."""
    text = said(process, seconds=900)
    logs = sorted(folder.glob("sweeps/*/.submitit/*/*_log.*"))
    return text + "".join(f"\n== {p.name}\n{p.read_text()[-3000:]}" for p in logs)


def test_a_sweep_is_an_array_with_as_many_jobs_at_once_as_asked_for(cluster, material, tmp_path):
    arguments = command(
        material, tmp_path, "sweep=grid", "mitigation=none,random_pruning",
        "attack/budget=l2_small,unbounded", "attack.budget.steps=2", "hydra/launcher=slurm",
        "hydra.launcher.array_parallelism=2",
    )  # fmt: skip
    process = begin(tmp_path, *arguments, env=cluster.environment)
    most, numbers = 0, set()
    while process.poll() is None:
        queue = cluster.queue()
        most = max(most, sum(job.state == "RUNNING" for job in queue))
        numbers |= {job.number.partition("_")[0] for job in queue}
        time.sleep(0.5)
    text = text_of(process, tmp_path)
    assert process.returncode == 0, text
    assert len(numbers) == 1, "one array"
    assert most == 2
    folder = tmp_path / "sweeps" / "grid"
    assert len(list(folder.glob("*/report.json"))) == 4, text
    assert all(p.parent.stat().st_mode & 0o077 == 0 for p in folder.glob("*/report.json"))
    status = ended(
        tmp_path, PROGRAM, "task=status", f"task.runs={folder}", f"paths.output={tmp_path}",
        env=cluster.environment,
    )  # fmt: skip
    assert "4 done of 4 jobs; 20 pairs attacked." in status.stderr


def test_two_nodes_fine_tune_one_model(cluster, material, tmp_path):
    arguments = command(
        material, tmp_path, "sweep=nodes", "seed=3", "mitigation=esd_x",
        "mitigation.steps=2", "mitigation.batch=2", "mitigation.sampling_steps=2",
        "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=2",
        "hydra/launcher=slurm_ddp",
    )  # fmt: skip
    process = begin(tmp_path, *arguments, env=cluster.environment)
    nodes = set()
    while process.poll() is None:
        nodes |= {job.node for job in cluster.queue()}
        time.sleep(0.5)
    text = text_of(process, tmp_path)
    assert process.returncode == 0, text
    assert "n[1-2]" in nodes
    (folder,) = (p.parent for p in (tmp_path / "sweeps" / "nodes").glob("*/report.json"))
    assert len(written(folder)) == 5
    assert len(list((tmp_path / "cache" / "edits").glob("*.safetensors"))) == 1


def test_a_preempted_job_goes_back_into_the_queue_and_on_from_where_it_was(
    cluster, material, tmp_path
):
    arguments = command(
        material, tmp_path, "sweep=preempted", "seed=1", "attack.budget.steps=150",
        "hydra/launcher=slurm",
    )  # fmt: skip
    process = begin(tmp_path, *arguments, env=cluster.environment)
    sweep = tmp_path / "sweeps" / "preempted"
    until(lambda: written(sweep, "*/attacks/*/*.safetensors"), process)
    (place,) = (path.parent for path in sweep.glob("*/status.json"))
    (job,) = cluster.queue()
    cluster.ask("scancel", "--signal=USR2", job.number)
    until(lambda: any(j.state == "PENDING" for j in cluster.queue()), process)
    before = written(place)
    assert 1 <= len(before) < 5
    status = read_status(place)
    assert status is not None
    assert status.state == "interrupted"
    # SLURM would wait two minutes
    until(lambda: _start_now(cluster, job.number), process)
    text = text_of(process, tmp_path)
    assert process.returncode == 0, text
    after = written(place)
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
        material, tmp_path, "sweep=late", "seed=2", "attack.budget.steps=5000",
        "hydra/launcher=slurm", *SMALL_NODES, "hydra.launcher.max_num_timeout=0",
        "hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=30",
    )  # fmt: skip
    process = begin(tmp_path, *arguments, env=cluster.environment)
    text = text_of(process, tmp_path)
    assert process.returncode == 1, text
    assert "timed-out too many times" in text
    (place,) = (p.parent for p in (tmp_path / "sweeps" / "late").glob("*/status.json"))
    assert not (place / "report.json").exists()
    status = read_status(place)
    assert status is not None
    assert status.state == "interrupted"
