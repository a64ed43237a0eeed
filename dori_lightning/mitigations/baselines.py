"""Prune as much as another method does, but anything: the control that it must beat.

Reference: Finding NeMo (Hintersdorf et al., 2024), table 1, "random neurons".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dori_lightning.mitigations.base import Context, Mitigation
from dori_lightning.mitigations.edits import EmptyEdit, MaskEdit, Origin, PairMaskEdit
from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError, Pair

# -------- none
# Leave the checkpoint as it is: the row that every mitigation is compared with.


@dataclass(frozen=True)
class NoMitigation:
    """Change nothing."""

    name: str = "none"

    def apply(self, model: TextToImage, pairs: Sequence[Pair], context: Context) -> EmptyEdit:
        """Return the empty edit."""
        del model, pairs, context
        return EmptyEdit()


# -------- random_pruning


@dataclass(frozen=True)
class RandomPruning:
    """Prune the same number of rows or weights of every parameter, and for every pair, at random.

    Attributes:
        name: How reports call it.
        like: The method to match; its edit is made first, or read where it was made already.
    """

    like: Mitigation
    name: str = "random_pruning"

    def apply(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> MaskEdit | PairMaskEdit:
        """Draw the masks.

        Raises:
            InputError: The method to match does not prune.
        """
        found = context.find(self.like, model, pairs)
        edit, seed = found.edit, context.seed
        origin = Origin(
            model.fingerprint, notes={"like": self.like.name, "like_edit": edit.identity}
        )
        if isinstance(edit, MaskEdit):
            return MaskEdit(
                origin, {name: _shuffled(mask, seed, name) for name, mask in edit.masks.items()}
            )
        if isinstance(edit, PairMaskEdit):
            return PairMaskEdit(
                origin,
                {
                    pair: {name: _shuffled(mask, seed, name, pair) for name, mask in own.items()}
                    for pair, own in edit.masks.items()
                },
            )
        raise InputError(
            f"{self.name} needs a method that prunes, and {self.like.name} gives a "
            f"{type(edit).__name__}\n"
            f"  where: mitigation.like\n"
            f"  fix:   mitigation@mitigation.like=nemo, or another method that prunes"
        )


def _shuffled(mask: torch.Tensor, *key: int | str) -> torch.Tensor:
    """A mask of the same shape with as many places set, anywhere."""
    order = torch.randperm(mask.numel(), generator=keyed_generator("random pruning", *key))
    chosen = torch.zeros(mask.numel(), dtype=torch.bool)
    chosen[order[: int(mask.sum())]] = True
    return chosen.view(mask.shape)
