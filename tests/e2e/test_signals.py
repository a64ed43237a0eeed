"""Told to leave, a run ends between two steps, says how to go on, and goes on to the same bits."""

import os
import signal
import subprocess

import pytest

from dori_lightning.runtime.artifacts import one_writer
from dori_lightning.runtime.job_status import read_status
from support.processes import PROGRAM, begin, until
from support.records import written
from support.runs import SMALL, on_tiny

pytestmark = pytest.mark.slow


def start(material, place):
    overrides = on_tiny(
        material, *SMALL, "attack.budget.steps=60", "attack.pairs_per_forward=1", "name=run",
        f"paths.output={place}",
    )  # fmt: skip
    return begin(place, PROGRAM, *overrides, stderr=subprocess.PIPE)


def test_sigterm_ends_between_two_steps_and_says_how_to_go_on(material, tmp_path):
    process, folder = start(material, tmp_path), tmp_path / "run"
    until(lambda: written(folder), process)
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
    done = written(folder)
    assert 1 <= len(done) < 5
    with one_writer(folder):
        second = start(material, tmp_path)
        _, said = second.communicate(timeout=300)
    assert second.returncode == 2
    assert f"process {os.getpid()} on " in said
    resumed = start(material, tmp_path)
    out, said = resumed.communicate(timeout=500)
    assert resumed.returncode == 0, said
    assert "taken over" not in said, "it left in good order"
    after = written(folder)
    assert len(after) == 5
    assert done.items() <= after.items()
