"""Told to leave, a run ends between two steps, says how to go on, and goes on to the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dori_lightning.runtime.artifacts import one_writer
from dori_lightning.runtime.job_status import read_status
from support.runs import write_pairs
from support.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def command(place, *more):
    return [
        sys.executable, "-m", "dori_lightning",
        "pairs=folder", f"pairs.path={place / 'pairs'}",
        "checkpoint.name=tiny", f"checkpoint.source={place / 'checkpoint'}",
        "checkpoint.device=cpu", "trainer=cpu", "attack.budget.steps=60",
        "attack.noise_batch=2", "attack.snapshots=[]", "attack.inits=[prompt]",
        "attack.pairs_per_forward=1", "sampling.steps=2", "sampling.images_per_pair=2",
        "metrics.descriptors.local_correlation.threshold=0.5", "name=run",
        f"paths.output={place}", *more,
    ]  # fmt: skip


def start(place):
    return subprocess.Popen(
        command(place),
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_ends_between_two_steps_and_says_how_to_go_on(tmp_path):
    write_tiny(tmp_path / "checkpoint")
    write_pairs(tmp_path / "pairs")
    process, folder = start(tmp_path), tmp_path / "run"
    deadline = time.monotonic() + 600
    while not list(folder.glob("attacks/*/*.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert out == ""
    assert "Traceback" not in said
    assert "SIGTERM: leaving after this step" in said
    assert "To resume:" in said
    assert "python -m dori_lightning pairs=folder" in said
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.error) == ("interrupted", "Interrupted")
    done = {p: p.stat().st_mtime_ns for p in folder.glob("attacks/*/*.safetensors")}
    assert 1 <= len(done) < 5
    with one_writer(folder):
        second = start(tmp_path)
        _, said = second.communicate(timeout=300)
    assert second.returncode == 2
    assert f"process {os.getpid()} on " in said
    resumed = start(tmp_path)
    out, said = resumed.communicate(timeout=500)
    assert resumed.returncode == 0, said
    assert "taken over" not in said, "it left in good order"
    after = {p: p.stat().st_mtime_ns for p in folder.glob("attacks/*/*.safetensors")}
    assert len(after) == 5
    assert done.items() <= after.items()
