"""What the unmitigated model does, kept for all the jobs of a sweep."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save

from dori_lightning.files import write_atomically
from dori_lightning.models.pictures import unmitigated_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dori_lightning.models.protocol import Sampling, TextToImage

__all__ = ["Unmitigated"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unmitigated:
    """Places for pictures and losses of one unmitigated model.

    Attributes:
        folder: Shared by the jobs of a sweep.
        model: The model.
        sampling: How pictures are generated; how many of each prompt does not matter.
    """

    folder: Path
    model: TextToImage
    sampling: Sampling

    @property
    def place(self) -> Path:
        """Folder of this model as it computes here.

        Device and precision change roundings, which a ratio near 1 would show.
        """
        precision = str(getattr(self.model, "autocast", None) or torch.float32)
        machine = f"{self.model.device.type}-{precision.removeprefix('torch.')}"
        return self.folder / unmitigated_name(self.model, self.sampling) / f"utility-{machine}"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Other jobs that want the same wait for this one instead of computing it too."""
        self.place.mkdir(parents=True, exist_ok=True)
        with FileLock(self.place / "lock"):
            yield

    def pictures(self, prompt: str) -> Path:
        """Folder of a prompt's pictures."""
        return self.place / _hash(prompt)

    def losses(
        self, key: tuple[int | str, ...], compute: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Read losses that were computed before, or compute and keep them.

        Args:
            key: Everything besides the model that decides them.
            compute: Gives them, fp64.
        """
        path = self.place / f"losses-{_hash(*key)}.safetensors"
        if path.is_file():
            try:
                return load(path.read_bytes())["losses"]
            except (KeyError, ValueError, RuntimeError, SafetensorError):
                log.warning("%s is damaged and is computed again", path)
        losses = compute()
        write_atomically(path, save({"losses": losses}))
        return losses


def _hash(*parts: float | str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
