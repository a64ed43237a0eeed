"""Selections of weights on disk: one file per method and embedding, a bit per weight."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dori_lightning.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["SelectionStore"]

log = logging.getLogger(__name__)

LAYOUT = "1"


@dataclass(frozen=True)
class SelectionStore:
    """Selections of one method, valid for one checkpoint and one set of settings.

    Attributes:
        folder: Where the files are.
        identity: Hash of what decides a selection besides the embedding.
    """

    folder: Path
    identity: str

    def identity_of(self, embedding: torch.Tensor, pair: str) -> str:
        """Hash of everything that decides one selection.

        Args:
            embedding: Text embedding (T, D).
            pair: Hash of the picture that the method may be shown.
        """
        digest = hashlib.sha256(f"{LAYOUT}|{self.identity}|{pair}|".encode())
        digest.update(embedding.detach().cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()[:24]

    def path(self, name: str) -> Path:
        """Where the selection of an embedding lies."""
        return self.folder / f"{name}.safetensors"

    def write(
        self,
        name: str,
        identity: str,
        masks: Mapping[str, torch.Tensor],
        *,
        memorized: bool | None,
    ) -> None:
        """Keep one selection.

        Args:
            name: Of the embedding.
            identity: From ``identity_of``.
            masks: Weight's name to boolean mask.
            memorized: Whether the method found the embedding memorized; None if it does not ask.
        """
        shapes = {weight: list(mask.shape) for weight, mask in masks.items()}
        tensors = {
            weight: torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))
            for weight, mask in masks.items()
        }
        note = {
            "identity": identity,
            "shapes": json.dumps(shapes),
            "memorized": json.dumps(memorized),
        }
        write_atomically(self.path(name), save(tensors, metadata=note))

    def holds(self, name: str, identity: str) -> bool:
        """Whether a whole selection with this identity is there."""
        path = self.path(name)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                return bool((file.metadata() or {}).get("identity") == identity)
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged and is computed anew: %s", path, error)
            return False

    def parameters(self, name: str) -> tuple[str, ...]:
        """Weights that a selection is about, in their order."""
        with safe_open(self.path(name), framework="pt") as file:
            return tuple(json.loads(file.metadata()["shapes"]))

    def memorized(self, name: str) -> bool | None:
        """Whether the method found the embedding memorized; None if it does not ask."""
        with safe_open(self.path(name), framework="pt") as file:
            answer: bool | None = json.loads(file.metadata()["memorized"])
            return answer

    def masks(self, names: Sequence[str], parameter: str) -> list[torch.Tensor]:
        """Masks of one weight for several embeddings."""
        found = []
        for name in names:
            with safe_open(self.path(name), framework="pt") as file:
                shape = json.loads(file.metadata()["shapes"])[parameter]
                bits = np.unpackbits(file.get_tensor(parameter).numpy(), count=math.prod(shape))
            found.append(torch.from_numpy(bits.astype(bool)).view(*shape))
        return found
