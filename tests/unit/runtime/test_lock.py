import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dori_lightning.runtime.artifacts import is_held, one_writer
from dori_lightning.types import InputError

HOLDER = """
import sys, time
from pathlib import Path
from dori_lightning.runtime.artifacts import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path) -> None:
    other = holder(tmp_path)
    try:
        assert is_held(tmp_path)
        with pytest.raises(InputError) as caught, one_writer(tmp_path):
            pass
        message = str(caught.value)
        assert f"process {other.pid} on " in message
        assert "name=NAME" in message
    finally:
        other.kill()
        other.wait()


def test_what_a_killed_run_left_is_taken_over_with_a_notice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = holder(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert not is_held(tmp_path)
    with caplog.at_level(logging.WARNING), one_writer(tmp_path):
        assert is_held(tmp_path)
    assert f"taken over from a run that was cut: process {other.pid} on " in caplog.text
    caplog.clear()
    with one_writer(tmp_path):
        pass
    assert not caplog.records, "a run that ended leaves nothing to take over"


def test_a_sweeps_folder_has_a_lock_of_its_own(tmp_path: Path) -> None:
    with one_writer(tmp_path, "sweep.lock"), one_writer(tmp_path):
        again = one_writer(tmp_path, "sweep.lock")
        with pytest.raises(InputError, match="sweep=NAME"):
            again.__enter__()
    assert not is_held(tmp_path / "nowhere")
