import logging
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from dori_lightning.runtime.checkpoints import FitCheckpoints, checkpoint_step, last_checkpoint


def save(folder, *steps):
    for step in steps:
        content = {"step": step, "x": torch.full((8,), float(step))}
        FitCheckpoints().save_checkpoint(content, folder / f"step-{step:08d}.ckpt")


def path_of(folder, step):
    (path,) = folder.glob(f"step-{step:08d}-*.ckpt")
    return path


def load(folder):
    path = last_checkpoint(folder, "fit")
    return None if path is None else int(FitCheckpoints().load_checkpoint(path)["step"])


def test_the_last_two_are_kept_and_the_last_is_read(tmp_path):
    assert load(tmp_path / "none") is None
    save(tmp_path, 1, 2, 3)
    assert sorted(checkpoint_step(path) for path in tmp_path.iterdir()) == [2, 3]
    assert load(tmp_path) == 3


def test_a_flipped_bit_is_noticed_and_the_one_before_is_used(tmp_path, caplog):
    save(tmp_path, 1, 2)
    path = path_of(tmp_path, 2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path) == 1
    assert f"{path.name} IS DAMAGED" in caplog.text
    path_of(tmp_path, 1).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path) is None
    assert "begins anew" in caplog.text


def test_what_was_cut_while_it_was_written_does_not_count_and_does_not_stay(tmp_path):
    save(tmp_path, 1, 9)
    cut = path_of(tmp_path, 9)
    cut.write_bytes(b"half")
    assert load(tmp_path) == 1
    save(tmp_path, 2)
    assert load(tmp_path) == 2
    assert not cut.exists()


def test_killed_while_saving_the_one_before_is_there_wherever_the_temporary_folder_is(
    tmp_path, monkeypatch
):
    """Lightning's own moves the file from the temporary folder, over the last good one."""
    other = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path
    monkeypatch.setattr(tempfile, "tempdir", str(other))
    save(tmp_path, 1)

    def cut(what, file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        torch.save = cut
        try:
            save(tmp_path, 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert load(tmp_path) == 1


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2)
    assert load(tmp_path) == 1
    assert len(list(tmp_path.iterdir())) == 1, "nothing half done is left"
