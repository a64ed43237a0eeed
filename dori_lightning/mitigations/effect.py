"""Whether an edit does anything: a mask over zero weights leaves a model as it is."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from dori_lightning.mitigations.edit_tensors import parameters_of
from dori_lightning.mitigations.edits import EmptyEdit, MaskEdit, PairMaskEdit, WeightEdit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from dori_lightning.mitigations.edits import Edit
    from dori_lightning.models.protocol import TextToImage

__all__ = ["changed_weights"]

log = logging.getLogger(__name__)


def changed_weights(edit: Edit, model: TextToImage) -> int | None:
    """Count the weights that differ under an edit, and say so in the log.

    Args:
        edit: The edit.
        model: The checkpoint, without the edit.

    Returns:
        Weights that have another value under it, for per-pair edits under any pair's; None where
        it works without changing weights, as a defence at inference does.

    Raises:
        InputError: The edit was made for another checkpoint.
    """
    if isinstance(edit, EmptyEdit):
        return 0
    if isinstance(edit, MaskEdit):
        changed = _pruned(model, [edit.masks])
    elif isinstance(edit, PairMaskEdit):
        changed = _pruned(model, edit.masks.values())
    elif isinstance(edit, WeightEdit):
        parameters = parameters_of(model, edit.weights)
        changed = sum(
            int((parameters[name].detach() != value.to(parameters[name])).sum())
            for name, value in edit.weights.items()
        )
    else:
        return None
    whole = sum(parameter.numel() for parameter in model.parameters())
    say = log.info if changed else log.warning
    say("the edit changes %d of %d weights (%.3g %%)", changed, whole, 100 * changed / whole)
    return changed


def _pruned(model: TextToImage, each: Iterable[Mapping[str, torch.Tensor]]) -> int:
    """Weights that are not zero and that any of several sets of masks prunes."""
    union: dict[str, torch.Tensor] = {}
    for masks in each:
        for name, mask in masks.items():
            union[name] = union[name] | mask if name in union else mask
    parameters = parameters_of(model, union, rows=True)
    return sum(
        int(parameters[name].detach()[mask.to(parameters[name].device)].count_nonzero())
        for name, mask in union.items()
    )
