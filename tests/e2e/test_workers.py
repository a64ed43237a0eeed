"""A sweep on one box whose worker is killed, and the same command after it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.runs import write_pairs
from support.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]


def sweep(place):
    """Four jobs, two at once."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [
            sys.executable, "-m", "dori_lightning", "-m", "hydra/launcher=gpus", "sweep=four",
            "seed=0,1,2,3", "pairs=folder", f"pairs.path={place / 'pairs'}",
            "attack.budget.steps=3", "attack.noise_batch=2", "attack.inits=[prompt]",
            "attack.snapshots=[]", "sampling.steps=2", "sampling.images_per_pair=2",
            "checkpoint.name=tiny", f"checkpoint.source={place / 'checkpoint'}",
            "checkpoint.device=cpu", "trainer=cpu", "utility=none", "report.images=none",
            "metrics.descriptors.local_correlation.threshold=0.5",
            f"paths.output={place}", f"paths.cache={place / 'cache'}",
        ],
        cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def working(folder):
    """Jobs that run, with the worker that each is with."""
    owners = folder.glob("*/run.lock.owner")
    return {path.parent.name: json.loads(path.read_text())["pid"] for path in owners}


def reports(folder):
    return {path.parent.name for path in folder.glob("*/report.json")}


def attacked(folder):
    """Finished attacks of all jobs, with the time they were written."""
    return {p: p.stat().st_mtime_ns for p in folder.glob("*/attacks/*/*.safetensors")}


def test_a_killed_worker_ends_the_sweep_with_one_message_and_the_same_command_goes_on(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    write_tiny(tmp_path / "checkpoint")
    write_pairs(tmp_path / "pairs")
    folder = tmp_path / "sweeps" / "four"
    process = sweep(tmp_path)
    try:
        deadline = time.monotonic() + 600
        while not (reports(folder) and (busy := working(folder))):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no job has ended"
            time.sleep(0.02)
        job, worker = busy.popitem()
        os.kill(worker, signal.SIGKILL)
        said = process.communicate(timeout=600)[0]
    finally:
        process.kill()
    assert process.returncode == 1, said
    assert said.count("dori: ") == 1, said
    assert "Traceback" not in said
    message = said[said.index("dori: a worker of the sweep was killed") :]
    assert job in message.partition("\n")[0]
    assert 1 <= len(reports(folder)) < 4
    kept = attacked(folder)
    assert kept
    again = sweep(tmp_path)
    try:
        said = again.communicate(timeout=1200)[0]
    finally:
        again.kill()
    assert again.returncode == 0, said
    assert len(reports(folder)) == 4
    assert kept.items() <= attacked(folder).items(), "what was done is not done again"
