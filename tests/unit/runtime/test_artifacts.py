import logging
import os
import signal
from types import SimpleNamespace

import pytest

from dori_lightning.runtime import artifacts
from dori_lightning.runtime.artifacts import (
    check_folder,
    check_space,
    claim_folder,
    drop_keys,
    is_held,
    one_writer,
    write_atomically,
)
from dori_lightning.types import InputError
from support.processes import python

HOLDER = """
import sys, time
from pathlib import Path
from dori_lightning.runtime.artifacts import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def holder(folder):
    process = python(HOLDER, folder)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_too_little_is_refused_with_both_numbers_and_what_is_there_counts(tmp_path, monkeypatch):
    (tmp_path / "kept").write_bytes(os.urandom(30_000))
    monkeypatch.setattr(
        artifacts.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000_000)
    )
    check_space(tmp_path, 1_000_030_000, fix="pray")
    with pytest.raises(
        InputError, match=r"1\.00 GB free, but up to 1\.50 GB(.|\n)*fix:   free space, pray$"
    ):
        check_space(tmp_path, 1_500_030_000, fix="pray")


def test_the_same_method_finds_its_folder_again(tmp_path):
    method = {"attack": {"lr": 0.1, "inits": ("prompt",)}, "seed": 0}
    claim_folder(tmp_path / "run", method)
    before = (tmp_path / "run" / "method.json").read_bytes()
    claim_folder(tmp_path / "run", {"seed": 0, "attack": {"inits": ["prompt"], "lr": 0.1}})
    assert (tmp_path / "run" / "method.json").read_bytes() == before


def test_every_setting_that_differs_is_named(tmp_path):
    claim_folder(tmp_path, {"attack": {"lr": 0.1, "steps": 50}, "old": 1})
    with pytest.raises(InputError) as caught:
        claim_folder(tmp_path, {"attack": {"lr": 0.2, "steps": 50}, "new": 2})
    message = str(caught.value)
    assert "attack.lr: 0.1 there, 0.2 now" in message
    assert "old: 1 there, None now" in message
    assert "new: None there, 2 now" in message
    assert "steps" not in message
    assert "name=NAME" in message


def test_what_is_not_known_yet_is_compared_later(tmp_path):
    claim_folder(tmp_path, {"checkpoint": {"source": "x", "fingerprint": "abc"}})
    early = {"checkpoint": {"source": "x"}}
    assert check_folder(tmp_path, early, unknown=["checkpoint.fingerprint"])
    with pytest.raises(InputError, match=r"checkpoint\.fingerprint: 'abc' there, 'def' now"):
        claim_folder(tmp_path, {"checkpoint": {"source": "x", "fingerprint": "def"}})


def test_settings_without_those_that_change_no_result():
    assert drop_keys({"batch": 3, "steps": 5}, "batch", "absent") == {"steps": 5}


def test_a_second_writer_to_a_locked_folder_is_told_who_the_first_is(tmp_path):
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


def test_what_a_killed_run_left_is_taken_over_with_a_notice(tmp_path, caplog):
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


def test_a_sweeps_folder_has_a_lock_of_its_own(tmp_path):
    with one_writer(tmp_path, "sweep.lock"), one_writer(tmp_path):
        again = one_writer(tmp_path, "sweep.lock")
        with pytest.raises(InputError, match="sweep=NAME"):
            again.__enter__()
    assert not is_held(tmp_path / "nowhere")
