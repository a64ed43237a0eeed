"""Whether a pruning method, run with each embedding, selects the same weights for one image.

Reference: Finding DoRI (2507.16880), section on locality. Two empty selections agree trivially and
say nothing: how many there are is told beside every mean, and so is what random selections of the
same sizes would give.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from dori_lightning.locality.estimates import Estimate, mean_estimate, pair_estimates
from dori_lightning.mitigations.agreement import LayerAgreement, agreement_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dori_lightning.locality.groups import Group, GroupName

__all__ = [
    "BlockAgreement",
    "LayerSelection",
    "Selections",
    "WeightFindings",
    "block_of",
    "weight_findings",
]

Method = Literal["nemo", "wanda"]


@dataclass(frozen=True)
class Selections:
    """What a method selects with each of N embeddings.

    Attributes:
        parameters: Names of the weights it selects in, in order.
        masks: From a weight's name to N boolean masks of one shape; a function, because together
            they may not fit into memory.
        memorized: For each embedding, whether the method found it memorized at all; None where
            the method does not ask.
    """

    parameters: tuple[str, ...]
    masks: Callable[[str], Sequence[torch.Tensor]]
    memorized: tuple[bool | None, ...]


@dataclass(frozen=True)
class LayerSelection:
    """How far selections of one group agree in one layer.

    Attributes:
        method: ``nemo`` (whole output rows) or ``wanda`` (single weights).
        parameter: Name of the weight.
        group: Which embeddings.
        count: How many.
        units: What could be selected: rows, or weights.
        size: Mean size of a selection.
        smallest: Smallest size.
        largest: Largest size.
        iou: Mean intersection over union of two embeddings of one image (of two prompts), 1 where
            both are empty.
        iou_between: The same for two images.
        iou_nonempty: Mean over the pairs that are not both empty; NaN where there is none.
        chance: Mean that random selections of these sizes would have.
        compared: Pairs of embeddings of one image.
        both_empty: How many of them are both empty.
    """

    method: Method
    parameter: str
    group: GroupName
    count: int
    units: int
    size: float
    smallest: int
    largest: int
    iou: Estimate
    iou_between: Estimate
    iou_nonempty: float
    chance: float
    compared: int
    both_empty: int


@dataclass(frozen=True)
class BlockAgreement:
    """Whether two methods select in the same transformer blocks for the same embedding.

    NeMo and Wanda prune different layers, so no weight can be in both selections; what can agree
    is where in the network they select.

    Attributes:
        group: Which embeddings.
        blocks: Blocks in which both could select.
        nemo: Mean share of NeMo's selection that lies in each block.
        wanda: The same for Wanda.
        shared_parameters: Weights in which both could select.
        overlap: Mean of the sum over blocks of the smaller share, in [0, 1]: both methods with the
            same embedding.
        overlap_other: The same with two different embeddings, as a control.
        overlap_other_images: Whether those are of different images; else of one image, or of two
            prompts.
        undefined: Embeddings with which one of the methods selects nothing there.
    """

    group: GroupName
    blocks: tuple[str, ...]
    nemo: tuple[float, ...]
    wanda: tuple[float, ...]
    shared_parameters: int
    overlap: Estimate
    overlap_other: Estimate
    overlap_other_images: bool
    undefined: int


@dataclass(frozen=True)
class WeightFindings:
    """What methods select with each embedding, on the checkpoint as it is.

    Attributes:
        settings: Method to its settings, plain values.
        layers: One entry per method, layer and group.
        memorized: Method to group to (embeddings it found memorized, embeddings); a method that
            does not ask is not there.
        agreement: NeMo against Wanda, per group.
    """

    settings: Mapping[str, Mapping[str, object]]
    layers: tuple[LayerSelection, ...]
    memorized: Mapping[str, Mapping[str, tuple[int, int]]]
    agreement: tuple[BlockAgreement, ...]


def weight_findings(
    selections: Mapping[Method, Selections],
    groups: Sequence[Group],
    *,
    settings: Mapping[str, Mapping[str, object]],
    seed: int = 0,
) -> WeightFindings:
    """Compare selections within groups, layer by layer.

    Args:
        selections: Method to selections for the embeddings of all groups, one group after the
            other.
        groups: The groups.
        settings: For the record.
        seed: Of the resampling.
    """
    layers: list[LayerSelection] = []
    counts: dict[Method, list[Counter[str]]] = {}
    for method, chosen in selections.items():
        counts[method] = [Counter() for _ in chosen.memorized]
        for parameter in chosen.parameters:
            masks = chosen.masks(parameter)
            first = 0
            for group in groups:
                count = len(group.labels)
                found = agreement_of(parameter, masks[first : first + count])
                layers.append(_layer(method, group, found, seed=seed))
                for place, size in enumerate(found.sizes):
                    counts[method][first + place][parameter] = size
                first += count
    return WeightFindings(
        settings=settings,
        layers=tuple(layers),
        memorized={
            method: _memorized(chosen.memorized, groups)
            for method, chosen in selections.items()
            if any(value is not None for value in chosen.memorized)
        },
        agreement=_agreements(selections, counts, groups, seed=seed),
    )


def block_of(parameter: str) -> str:
    """Transformer block that a weight belongs to: its name up to the block."""
    return parameter.split(".transformer_blocks.")[0]


def _memorized(
    asked: Sequence[bool | None], groups: Sequence[Group]
) -> dict[str, tuple[int, int]]:
    found, first = {}, 0
    for group in groups:
        own = asked[first : first + len(group.labels)]
        first += len(group.labels)
        found[str(group.name)] = (sum(value is True for value in own), len(own))
    return found


def _layer(method: Method, group: Group, found: LayerAgreement, *, seed: int) -> LayerSelection:
    iou, between = pair_estimates(found.iou.numpy(), group.labels, seed=seed)
    units = math.prod(found.shape)
    inside = [
        (i, j)
        for i, j in combinations(range(len(group.labels)), 2)
        if group.labels[i] == group.labels[j]
    ]
    full = [(i, j) for i, j in inside if found.sizes[i] or found.sizes[j]]
    expected = [_chance(found.sizes[i], found.sizes[j], units) for i, j in inside]
    return LayerSelection(
        method=method,
        parameter=found.parameter,
        group=group.name,
        count=len(group.labels),
        units=units,
        size=float(np.mean(found.sizes)),
        smallest=min(found.sizes),
        largest=max(found.sizes),
        iou=iou,
        iou_between=between,
        iou_nonempty=_mean([float(found.iou[i, j]) for i, j in full]),
        chance=_mean(expected),
        compared=len(inside),
        both_empty=len(inside) - len(full),
    )


def _chance(first: int, second: int, units: int) -> float:
    """Intersection over union that two random selections have, by expected intersection."""
    if not first and not second:
        return 1.0
    shared = first * second / units
    return shared / (first + second - shared)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _agreements(
    selections: Mapping[Method, Selections],
    counts: Mapping[Method, Sequence[Counter[str]]],
    groups: Sequence[Group],
    *,
    seed: int,
) -> tuple[BlockAgreement, ...]:
    if not {"nemo", "wanda"} <= set(selections):
        return ()
    names = {m: list(dict.fromkeys(map(block_of, s.parameters))) for m, s in selections.items()}
    blocks = tuple(name for name in names["nemo"] if name in names["wanda"])
    shared = set(selections["nemo"].parameters) & set(selections["wanda"].parameters)
    found, first = [], 0
    for group in groups:
        own = slice(first, first + len(group.labels))
        first += len(group.labels)
        shares = {method: _shares(rows[own], blocks) for method, rows in counts.items()}
        found.append(_agreement(group, blocks, shares, shared=len(shared), seed=seed))
    return tuple(found)


def _shares(rows: Sequence[Counter[str]], blocks: Sequence[str]) -> np.ndarray:
    """Share of each selection by block (N, blocks); NaN where nothing is selected there."""
    sizes = np.zeros((len(rows), len(blocks)))
    for place, row in enumerate(rows):
        for parameter, size in row.items():
            if block_of(parameter) in blocks:
                sizes[place, blocks.index(block_of(parameter))] += size
    total = sizes.sum(1, keepdims=True)
    return np.where(total > 0, sizes / np.where(total > 0, total, 1), np.nan)


def _agreement(
    group: Group,
    blocks: tuple[str, ...],
    shares: Mapping[Method, np.ndarray],
    *,
    shared: int,
    seed: int,
) -> BlockAgreement:
    nemo, wanda = shares["nemo"], shares["wanda"]
    defined = np.isfinite(nemo).all(1) & np.isfinite(wanda).all(1)
    places = np.flatnonzero(defined)
    labels = [group.labels[k] for k in places]
    overlaps = np.minimum(nemo[places][:, None], wanda[places][None]).sum(2)
    same: dict[str, list[float]] = {}
    for k, label in enumerate(labels):
        same.setdefault(label, []).append(float(overlaps[k, k]))
    symmetric = (overlaps + overlaps.T) / 2
    within, between = pair_estimates(symmetric, labels, seed=seed)
    return BlockAgreement(
        group=group.name,
        blocks=blocks,
        nemo=tuple(map(float, nemo[places].mean(0))) if len(places) else (),
        wanda=tuple(map(float, wanda[places].mean(0))) if len(places) else (),
        shared_parameters=shared,
        overlap=mean_estimate(same, seed=seed),
        overlap_other=between if between.count else within,
        overlap_other_images=between.count > 0,
        undefined=len(group.labels) - len(places),
    )
