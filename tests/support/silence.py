"""No stage is silent: what models are asked while no progress bar is open."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from rich.progress import Progress
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CLIPTextModel

from dori_lightning.runtime import logging as progress

PARTS = (UNet2DConditionModel, Encoder, Decoder, CLIPTextModel)

MOST = 3
"""Passes of a stage that need no progress bar."""

PROBES = {"check_answers", "measure_batch"}
"""Fixed small questions: what a checkpoint is asked on loading, what memory a row takes."""


@dataclass
class Silence:
    """Passes through parts of models outside of progress bars.

    Attributes:
        open: Progress bars that are open.
        passes: Passes since one was.
        found: Where in the code the first pass too many was, of each silent stage.
    """

    open: int = 0
    passes: int = 0
    found: list[str] = field(default_factory=list)

    def look(self, module: nn.Module, _: Any) -> None:
        """Notice a pass."""
        if self.open or not isinstance(module, PARTS) or _is_probe():
            return
        self.passes += 1
        if self.passes == MOST + 1:
            frames = [f for f in traceback.extract_stack() if "dori_lightning/" in f.filename]
            self.found.append(" > ".join(f"{f.name}, line {f.lineno}" for f in frames[-6:]))


def _is_probe() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in PROBES:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@contextmanager
def no_silent_stage() -> Iterator[Silence]:
    """Fail at the end where more than ``MOST`` passes went by while no progress bar was open."""
    silence = Silence()

    class Watched(Progress):
        def __enter__(self) -> "Watched":
            silence.open, silence.passes = silence.open + 1, 0
            super().__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            silence.open, silence.passes = silence.open - 1, 0
            super().__exit__(*error)

    with pytest.MonkeyPatch.context() as patch, register_module_forward_pre_hook(silence.look):
        patch.setattr(progress, "Progress", Watched)
        yield silence
    assert not silence.found, "stages without progress:\n" + "\n".join(silence.found)
