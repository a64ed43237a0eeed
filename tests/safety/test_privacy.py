"""What a run writes is its user's alone, also where everything else of theirs is open."""

import os
import tempfile
from pathlib import Path

import pytest

from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.tracking import kept_id
from dori_lightning.types import InputError


@pytest.mark.parametrize("arguments", [["seed=1"], ["-m", "seed=1,2"]], ids=["a run", "a sweep"])
def test_folders_files_caches_and_temporary_files_are_private(
    run, tmp_path, monkeypatch, arguments
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    seen: list[Path] = []

    def task(cfg, folder):
        seen.append(folder)
        write_atomically(folder / "attacks" / "prompt" / "a.safetensors", b"x")
        write_atomically(Path(cfg.paths.cache) / "edits" / "a" / "edit.safetensors", b"x")
        (folder / "plain").write_text("x")
        kept_id(folder, "run")
        Path(tempfile.mkdtemp()).joinpath("x").touch()
        (temporary / "plain").touch()

    assert os.umask(0o022) == 0o022
    assert run(*arguments, task=task) == 0
    assert len(seen) == len(arguments)
    written = [*(tmp_path / "outputs").rglob("*"), *temporary.rglob("*")]
    names = {path.name for path in written}
    assert {"cache", "config.yaml", "dori.log", "status.json", "run.lock", "plain"} <= names
    assert ("multirun.yaml" in names) is (len(arguments) == 2)
    assert [str(path) for path in written if path.stat().st_mode & 0o077] == []
    assert (tmp_path / "outputs").stat().st_mode & 0o077 == 0


def test_locks_of_devices_are_not_written_into_others_folders(tmp_path):
    target = tmp_path / "mine"
    target.mkdir()
    (target / "0").write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(InputError, match="TMPDIR"):
        distributed.claim(["0"], link)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(InputError, match="this user alone"):
        distributed.claim(["0"], shared)
    assert (target / "0").read_text() == "precious"
