"""Leave the checkpoint as it is: the row that every mitigation is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori_lightning.mitigations.edits import EmptyEdit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.mitigations.base import Workshop
    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.types import Pair

__all__ = ["NoMitigation"]


@dataclass(frozen=True)
class NoMitigation:
    """Change nothing."""

    name: str = "none"

    def apply(self, model: TextToImage, pairs: Sequence[Pair], workshop: Workshop) -> EmptyEdit:
        """Return the empty edit."""
        del model, pairs, workshop
        return EmptyEdit()
