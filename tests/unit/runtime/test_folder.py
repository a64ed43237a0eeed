from pathlib import Path

import pytest

from dori_lightning.runtime.artifacts import claim_folder, drop_keys
from dori_lightning.types import InputError


def test_the_same_method_finds_its_folder_again(tmp_path: Path) -> None:
    method = {"attack": {"lr": 0.1, "inits": ("prompt",)}, "seed": 0}
    claim_folder(tmp_path / "run", method)
    before = (tmp_path / "run" / "method.json").read_bytes()
    claim_folder(tmp_path / "run", {"seed": 0, "attack": {"inits": ["prompt"], "lr": 0.1}})
    assert (tmp_path / "run" / "method.json").read_bytes() == before


def test_every_setting_that_differs_is_named(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"attack": {"lr": 0.1, "steps": 50}, "old": 1})
    with pytest.raises(InputError) as caught:
        claim_folder(tmp_path, {"attack": {"lr": 0.2, "steps": 50}, "new": 2})
    message = str(caught.value)
    assert "attack.lr: 0.1 there, 0.2 now" in message
    assert "old: 1 there, None now" in message
    assert "new: None there, 2 now" in message
    assert "steps" not in message
    assert "name=NAME" in message


def test_settings_without_those_that_change_no_result() -> None:
    assert drop_keys({"batch": 3, "steps": 5}, "batch", "absent") == {"steps": 5}
