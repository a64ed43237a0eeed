"""Libraries' remarks: once, through the run's handlers, and only what asks for attention."""

import logging
import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from dori_lightning.runtime.logging import quiet_libraries


def test_lightning_speaks_once_and_of_trouble_only(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet_libraries()
    with caplog.at_level(logging.INFO):
        L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").warning("mind this")
    assert [record.getMessage() for record in caplog.records] == ["mind this"]
    assert "TPU" not in capsys.readouterr().err


def test_writing_a_checkpoint_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quiet_libraries()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=0)
    trainer.fit(BoringModel())
    with caplog.at_level(logging.INFO):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert [record.getMessage() for record in caplog.records] == []


def test_remarks_on_nothing_are_dropped_and_others_kept(caplog: pytest.LogCaptureFixture) -> None:
    quiet_libraries()
    diffusers = logging.getLogger("diffusers.models.modeling_utils")
    diffusers.warning("There are modules in UNet that should be kept in float32: []. Casting")
    diffusers.warning("There are modules in UNet that should be kept in float32: [norm]. Casting")
    assert ["[norm]" in record.getMessage() for record in caplog.records] == [True]


def test_the_hint_at_srun_is_dropped_and_other_warnings_kept() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn(
            "The `srun` command is available on your system but is not used.", stacklevel=1
        )
        warnings.warn("The `srun` command failed.", stacklevel=1)
    assert [str(w.message) for w in heard] == ["The `srun` command failed."]
