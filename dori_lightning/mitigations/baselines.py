"""What every mitigation is compared with: nothing, and as much pruning at random.

Reference: Finding NeMo (Hintersdorf et al., 2024), table 1, "random neurons".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dori_lightning.mitigations.base import Context, CostEstimate, Mitigation
from dori_lightning.mitigations.edits import EVERYBODY, EmptyEdit, MaskEdit, Origin, PairMaskEdit
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError, Pair


@dataclass(frozen=True)
class NoMitigation:
    """Leave the checkpoint as it is."""

    name: str = "none"

    def apply(self, model: TextToImage, pairs: Sequence[Pair], context: Context) -> EmptyEdit:
        """Return the empty edit."""
        del model, pairs, context
        return EmptyEdit()


@dataclass(frozen=True)
class RandomPruning:
    """Prune the same number of rows or weights of every parameter, and for every pair, at random.

    Attributes:
        name: How reports call it.
        like: The method to match; its edit is made first, or read where it was made already.
    """

    like: Mitigation
    name: str = "random_pruning"

    def estimate_cost(self, sampling: Sampling, pairs: int) -> CostEstimate:
        """Nothing besides the edit that it is like."""
        del sampling, pairs
        return CostEstimate(builds_on=(self.like,))

    def apply(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> MaskEdit | PairMaskEdit:
        """Draw the masks.

        Raises:
            InputError: The method to match does not prune.
        """
        edit = context.find(self.like, model, pairs).edit
        masks = {
            pair: {
                name: _shuffled(mask, context.seed, name, *([] if pair == EVERYBODY else [pair]))
                for name, mask in by_name.items()
            }
            for pair, by_name in edit.masks_by_pair().items()
        }
        if not masks:
            raise InputError(
                f"{self.name} needs a method that prunes, and {self.like.name} gives a "
                f"{type(edit).__name__}\n"
                f"  where: mitigation.like\n"
                f"  fix:   mitigation@mitigation.like=nemo, or another method that prunes"
            )
        origin = Origin(
            model.fingerprint, notes={"like": self.like.name, "like_edit": edit.identity}
        )
        return PairMaskEdit(origin, masks) if edit.pairs else MaskEdit(origin, masks[EVERYBODY])


def _shuffled(mask: torch.Tensor, *key: int | str) -> torch.Tensor:
    """A mask of the same shape with as many places set, anywhere."""
    order = torch.randperm(mask.numel(), generator=keyed_generator("random pruning", *key))
    chosen = torch.zeros(mask.numel(), dtype=torch.bool)
    chosen[order[: int(mask.sum())]] = True
    return chosen.view(mask.shape)
