"""A sweep on one box whose worker is killed, and the same command after it."""

import json
import os
import signal

import pytest

from support.processes import PROGRAM, begin, said, until
from support.records import written
from support.runs import SMALL, on_tiny

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]
ATTACKS = "*/attacks/*/*.safetensors"


def sweep(material, place):
    """Four jobs, two at once."""
    return begin(
        place, PROGRAM, "-m", "hydra/launcher=gpus", "sweep=four", "seed=0,1,2,3",
        *on_tiny(material, *SMALL, "attack.budget.steps=3", "sampling.images_per_pair=2"),
        f"paths.output={place}", f"paths.cache={place / 'cache'}",
    )  # fmt: skip


def working(folder):
    """Jobs that run, with the worker that each is with."""
    owners = folder.glob("*/run.lock.owner")
    return {path.parent.name: json.loads(path.read_text())["pid"] for path in owners}


def reports(folder):
    return {path.parent.name for path in folder.glob("*/report.json")}


def test_a_killed_worker_ends_the_sweep_with_one_message_and_the_same_command_goes_on(
    material, tmp_path
):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    folder = tmp_path / "sweeps" / "four"
    process, busy = sweep(material, tmp_path), {}

    def one_has_ended_and_another_runs():
        busy.clear()
        busy.update(working(folder))
        return reports(folder) and busy

    until(one_has_ended_and_another_runs, process)
    job, worker = busy.popitem()
    os.kill(worker, signal.SIGKILL)
    text = said(process, seconds=600)
    assert process.returncode == 1, text
    assert text.count("dori: ") == 1, text
    assert "Traceback" not in text
    message = text[text.index("dori: a worker of the sweep was killed") :]
    assert job in message.partition("\n")[0]
    assert 1 <= len(reports(folder)) < 4
    kept = written(folder, ATTACKS)
    assert kept
    again = sweep(material, tmp_path)
    text = said(again)
    assert again.returncode == 0, text
    assert len(reports(folder)) == 4
    assert kept.items() <= written(folder, ATTACKS).items(), "what was done is not done again"
