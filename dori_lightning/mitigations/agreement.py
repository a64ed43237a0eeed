"""How far edits choose the same weights: intersection over union, by layer.

Two edits that choose nothing agree perfectly and say nothing, so how often that happens is told
beside every mean.

Reference: Finding DoRI (2507.16880), section on locality: the mean over pairs of embeddings of
|A and B| / |A or B|, 1 where both are empty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dori_lightning.mitigations.edits import MaskEdit, PairMaskEdit
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dori_lightning.mitigations.edits import Edit

__all__ = [
    "EVERYBODY",
    "LayerAgreement",
    "LayerOverlap",
    "Overlap",
    "agreement",
    "agreement_of",
    "iou",
    "overlap",
    "selected",
]

EVERYBODY = "*"
"""Stands for all pairs in what an edit chooses for everybody; no pair id may hold it."""

COLUMNS = 1 << 18
"""Weights that are compared at once: 100 masks of them are 100 MB as floats."""


@dataclass(frozen=True, eq=False)
class LayerAgreement:
    """How far N masks of one layer agree.

    Attributes:
        parameter: Name of the layer's weight.
        shape: Shape of its masks: whole rows (C_out,) or single weights (C_out, C_in).
        sizes: How much each mask chooses (N,).
        iou: Intersection over union of every two masks, (N, N) in [0, 1], 1 where both are empty.
        mean: Mean over the pairs i < j, NaN where N < 2.
        mean_nonempty: The same over pairs that are not both empty, NaN where there is none.
        both_empty: How many pairs i < j are both empty.
        compared: How many pairs i < j there are.
    """

    parameter: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    iou: torch.Tensor
    mean: float
    mean_nonempty: float
    both_empty: int
    compared: int


@dataclass(frozen=True)
class LayerOverlap:
    """How far two edits agree in one layer, on average over the pairs they were compared for.

    Attributes:
        parameter: Name of the layer's weight.
        first: Mean size of the first edit's masks.
        second: Mean size of the second's.
        shared: Mean size of what both choose.
        iou: Mean intersection over union, 1 where both are empty.
        both_empty: For how many pairs both are empty.
    """

    parameter: str
    first: float
    second: float
    shared: float
    iou: float
    both_empty: int


@dataclass(frozen=True)
class Overlap:
    """How far two edits agree.

    Attributes:
        pairs: Pairs they were compared for; ``EVERYBODY`` alone where neither differs by pair.
        layers: One entry per weight that both edits have masks of, in the first edit's order.
        only_first: Weights that only the first edit has masks of.
        only_second: Weights that only the second has masks of.
    """

    pairs: tuple[str, ...]
    layers: tuple[LayerOverlap, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def selected(edit: Edit) -> dict[str, dict[str, torch.Tensor]]:
    """What an edit chooses: pair id, or ``EVERYBODY``, to parameter name to boolean mask.

    Raises:
        InputError: It is no mask: trained weights choose nothing.
    """
    if isinstance(edit, MaskEdit):
        return {EVERYBODY: dict(edit.masks)}
    if isinstance(edit, PairMaskEdit):
        return {pair: dict(own) for pair, own in edit.masks.items()}
    raise InputError(
        f"{_name(edit)} chooses no weights, so it cannot be compared by what it chooses\n"
        f"  mend:  compare pruning methods"
    )


def iou(first: torch.Tensor, second: torch.Tensor) -> float:
    """Intersection over union of two boolean masks of one shape; 1 where both are empty.

    Raises:
        InputError: Their shapes differ.
    """
    _check_shapes(first, second, "two masks")
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def agreement_of(parameter: str, masks: Sequence[torch.Tensor]) -> LayerAgreement:
    """Compare every two of N masks of one layer.

    Args:
        parameter: Name of the layer's weight.
        masks: N boolean masks of one shape, at least one.

    Raises:
        InputError: There is none, or their shapes differ.
    """
    if not masks:
        raise InputError(f"there is no mask of {parameter} to compare")
    for mask in masks:
        _check_shapes(masks[0], mask, parameter)
    both = _intersections([mask.flatten() for mask in masks])
    sizes = both.diagonal()
    union = sizes[:, None] + sizes[None] - both
    empty = union == 0
    value = torch.where(empty, 1.0, both / union.clamp_min(1))
    # pairs i < j
    i, j = torch.triu_indices(len(masks), len(masks), offset=1)
    pairs, void = value[i, j], empty[i, j]
    return LayerAgreement(
        parameter=parameter,
        shape=tuple(masks[0].shape),
        sizes=tuple(int(size) for size in sizes.tolist()),
        iou=value,
        mean=_mean(pairs),
        mean_nonempty=_mean(pairs[~void]),
        both_empty=int(void.sum()),
        compared=len(pairs),
    )


def agreement(masks: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, LayerAgreement]:
    """Compare N choices layer by layer.

    Args:
        masks: For each of N embeddings or pairs: parameter name to boolean mask. Where one lacks
            a parameter that another has, it chooses nothing there.

    Returns:
        Parameter name, in the order of first appearance, to how far the N agree.

    Raises:
        InputError: There is none, or shapes of one parameter differ.
    """
    if not masks:
        raise InputError("there are no masks to compare")
    shapes: dict[str, torch.Tensor] = {}
    for own in masks:
        for name, mask in own.items():
            shapes.setdefault(name, mask)
    return {
        name: agreement_of(
            name, [own[name] if name in own else torch.zeros_like(like) for own in masks]
        )
        for name, like in shapes.items()
    }


def overlap(first: Edit, second: Edit) -> Overlap:
    """Compare two edits, of any checkpoints of one architecture.

    Edits that differ by pair are compared pair by pair, for the pairs that both have; one that is
    the same for everybody is compared with every pair's.

    Raises:
        InputError: One is no mask, they have no pair or no weight in common, or masks of a weight
            have different shapes, such as whole rows and single weights.
    """
    ours, theirs = selected(first), selected(second)
    pairs = _common_pairs(ours, theirs)
    if not pairs:
        raise InputError(
            f"{_name(first)} and {_name(second)} have no pair in common\n"
            f"  mend:  compare edits for the same pairs"
        )
    chosen = [(_of(ours, pair), _of(theirs, pair)) for pair in pairs]
    names = [list(dict.fromkeys(n for row in chosen for n in row[side])) for side in (0, 1)]
    common = [name for name in names[0] if name in names[1]]
    if not common:
        raise InputError(
            f"{_name(first)} and {_name(second)} have no weight in common: the first chooses in "
            f"{_some(names[0])}, the second in {_some(names[1])}\n"
            f"  mend:  compare edits of the same layers"
        )
    return Overlap(
        pairs=pairs,
        layers=tuple(_layer_overlap(name, chosen) for name in common),
        only_first=tuple(name for name in names[0] if name not in common),
        only_second=tuple(name for name in names[1] if name not in common),
    )


def _common_pairs(ours: Mapping[str, object], theirs: Mapping[str, object]) -> tuple[str, ...]:
    if EVERYBODY in ours:
        return tuple(theirs)
    return tuple(ours) if EVERYBODY in theirs else tuple(pair for pair in ours if pair in theirs)


def _of(chosen: Mapping[str, dict[str, torch.Tensor]], pair: str) -> Mapping[str, torch.Tensor]:
    return chosen[EVERYBODY] if EVERYBODY in chosen else chosen[pair]


def _layer_overlap(
    name: str,
    chosen: Sequence[tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]],
) -> LayerOverlap:
    like = next(row[name] for both in chosen for row in both if name in row)
    none = torch.zeros_like(like)
    sizes, values, empty = [], [], 0
    for ours, theirs in chosen:
        a, b = ours.get(name, none), theirs.get(name, none)
        _check_shapes(a, b, name)
        values.append(iou(a, b))
        sizes.append((int(a.sum()), int(b.sum()), int((a & b).sum())))
        empty += not (sizes[-1][0] or sizes[-1][1])
    first, second, shared = (sum(column) / len(sizes) for column in zip(*sizes, strict=True))
    return LayerOverlap(name, first, second, shared, sum(values) / len(values), empty)


def _intersections(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sizes of what every two of N flat masks share, (N, N), float64, exact."""
    total = torch.zeros(len(masks), len(masks), dtype=torch.float64, device=masks[0].device)
    for start in range(0, len(masks[0]), COLUMNS):
        part = torch.stack([mask[start : start + COLUMNS] for mask in masks])
        # most weights are in no mask; counts below 2**24 are exact in float32
        rows = part[:, part.any(0)].float()
        total += rows @ rows.T
    return total.cpu()


def _mean(values: torch.Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _check_shapes(first: torch.Tensor, second: torch.Tensor, what: str) -> None:
    if first.dtype != torch.bool or second.dtype != torch.bool:
        raise TypeError(f"masks must be boolean, got {first.dtype} and {second.dtype}")
    if first.shape != second.shape:
        raise InputError(
            f"{what}: masks of shape {tuple(first.shape)} and {tuple(second.shape)} cannot be "
            f"compared (one dimension: whole rows; two: single weights)\n"
            f"  mend:  compare edits that prune in the same way"
        )


def _name(edit: Edit) -> str:
    origin = edit.origin
    return (origin.mitigation if origin is not None else "") or type(edit).__name__


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
