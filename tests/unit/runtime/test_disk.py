import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from dori_lightning.runtime import artifacts
from dori_lightning.runtime.artifacts import check_space
from dori_lightning.types import InputError


def test_too_little_is_refused_with_both_numbers_and_what_is_there_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").write_bytes(os.urandom(30_000))
    monkeypatch.setattr(
        artifacts.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000_000)
    )
    check_space(tmp_path, 1_000_030_000, fix="pray")
    with pytest.raises(
        InputError, match=r"1\.00 GB free, but up to 1\.50 GB(.|\n)*fix:   free space, pray$"
    ):
        check_space(tmp_path, 1_500_030_000, fix="pray")
