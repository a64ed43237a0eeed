"""What embeddings activate, and which weights pruning methods select with them.

Always on the checkpoint as it is, whatever model the triggers were searched on: the question is
where *it* holds the image.

Reference: Finding DoRI (2507.16880), section on locality. Activations: the mean over pairs of
embeddings of ||A(y_i) - A(y_j)||_2 at one fixed starting noise and timestep. Which tensor A is,
and how it is reduced, is not published; here it is all numbers of the layer, flattened: the output
of NeMo's value layers (T x C, independent of noise), the input of Wanda's feed-forward layers
(tokens x C). Weights: the mean over pairs of |A and B| / |A or B|, 1 where both selections are
empty. Two empty selections agree trivially and say nothing: how many there are is given beside
every mean, and so is what random selections of the same sizes would give.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from dori_lightning.locality.embeddings import (
    Group,
    GroupName,
    distances,
    lengths,
    relative_distances,
)
from dori_lightning.locality.estimates import Estimate, mean_estimate, pair_estimates
from dori_lightning.mitigations.activations import heard_inputs
from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime.cache import TENSORS, Tensors
from dori_lightning.runtime.logging import progress_bar, with_progress

MEMORY = 4 << 30
"""Bytes of activations in memory at once; layers beyond it get passes of their own."""

ROWS = 8
"""Embeddings of a pass."""

BYTES = 1 << 15
"""Bytes of selections that are compared at once: 100 rows of their bits are 100 MB as floats."""

Method = Literal["nemo", "wanda"]
METHODS: tuple[Method, ...] = ("nemo", "wanda")
GROUPS: tuple[GroupName, ...] = ("triggers", "starts", "memorized_prompts", "control_prompts")


def _places(groups: Sequence[Group]) -> Iterator[tuple[Group, slice]]:
    """Each group with its place among the embeddings of all groups, one after the other."""
    first = 0
    for group in groups:
        yield group, slice(first, first + len(group.labels))
        first += len(group.labels)


@dataclass(frozen=True)
class LayerActivation:
    """How far activations of one group are apart in one layer.

    Attributes:
        method: Whose layer: ``nemo`` or ``wanda``.
        layer: Module name.
        group: Which embeddings.
        count: How many.
        length: Mean Euclidean length of an activation.
        distance: Mean distance of two embeddings of one image (of two prompts).
        distance_between: The same for two images.
        relative: Mean distance divided by the lengths' root mean square, free of scale.
        relative_between: The same for two images.
    """

    method: Method
    layer: str
    group: GroupName
    count: int
    length: Estimate
    distance: Estimate
    distance_between: Estimate
    relative: Estimate
    relative_between: Estimate


@dataclass(frozen=True)
class ActivationFindings:
    """How differently embeddings activate layers, on the checkpoint as it is.

    Attributes:
        timestep: Where Wanda's layers are traced.
        noise_seed: Seed of the starting noise, which is the denoiser's input.
        layers: One entry per method, layer and group.
    """

    timestep: int
    noise_seed: int
    layers: tuple[LayerActivation, ...]


def value_distances(
    layers: Mapping[str, nn.Module], text: torch.Tensor, read: torch.Tensor | None = None
) -> Tensors:
    """Compare outputs of cross-attention value layers; the denoiser does not run.

    Args:
        layers: L layers by name.
        text: What they take (N, tokens, width); see ``TextToImage.value_input``.
        read: Which rows of the embeddings (N, T) the denoiser reads, the tokens first; padding
            counts as zero. None for all of them.

    Returns:
        ``distance`` (L, N, N) and ``length`` (L, N), float64.
    """

    def values(layer: nn.Module) -> torch.Tensor:
        assert isinstance(layer, nn.Linear)
        bias = None if layer.bias is None else layer.bias.float()
        rows = text.to(layer.weight.device, torch.float32)
        outputs = F.linear(rows, layer.weight.float(), bias)
        return outputs if read is None else outputs * read[:, : rows.shape[1], None].to(outputs)

    with torch.no_grad():
        shown = with_progress("compare activations", [*layers.values()])
        return _compared(map(values, shown))


def feed_forward_distances(
    model: TextToImage,
    layers: Mapping[str, nn.Module],
    embeddings: torch.Tensor,
    *,
    noise: torch.Tensor,
    timestep: torch.Tensor,
) -> Tensors:
    """Compare inputs of feed-forward output layers in one pass of the denoiser.

    Args:
        model: Checkpoint; left as it was.
        layers: L of its layers by name.
        embeddings: Text embeddings (N, T, D).
        noise: What the denoiser is given (C, h, w), the same for every embedding.
        timestep: Scalar.

    Returns:
        ``distance`` (L, N, N) and ``length`` (L, N), float64.
    """
    first = _inputs(model, layers, embeddings[:1], noise=noise, timestep=timestep)
    sizes = {name: 4 * value.numel() * len(embeddings) for name, value in first.items()}
    parts = list(_within_memory(sizes))

    def traced() -> Iterator[torch.Tensor]:
        with progress_bar("trace activations", len(parts) * len(embeddings)) as advance:
            for names in parts:
                chosen = {name: layers[name] for name in names}
                inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
                for rows in torch.split(embeddings, ROWS):
                    found = _inputs(model, chosen, rows, noise=noise, timestep=timestep)
                    for name, value in found.items():
                        inputs[name].append(value.cpu())
                    advance(len(rows))
                for name in names:
                    yield torch.cat(inputs.pop(name))

    return _compared(traced())


def activation_findings(
    compared: Mapping[Method, tuple[Sequence[str], Tensors]],
    groups: Sequence[Group],
    *,
    timestep: int,
    noise_seed: int,
    seed: int = 0,
) -> ActivationFindings:
    """Average distances within groups.

    Args:
        compared: Method to the names of its L layers and to ``distance`` (L, N, N) and ``length``
            (L, N) of the embeddings of all groups, one group after the other.
        groups: The groups.
        timestep: For the record.
        noise_seed: For the record.
        seed: Of the resampling.
    """
    rows = []
    for method, (names, tensors) in compared.items():
        for k, name in enumerate(with_progress(f"{method}: distances", names)):
            for group, place in _places(groups):
                apart, sizes = tensors["distance"][k, place, place], tensors["length"][k, place]
                rows.append(
                    LayerActivation(
                        method,
                        name,
                        group.name,
                        len(group.labels),
                        mean_estimate(sizes.tolist(), group.labels, seed=seed),
                        *pair_estimates(apart, group.labels, seed=seed),
                        *pair_estimates(relative_distances(apart, sizes), group.labels, seed=seed),
                    )
                )
    return ActivationFindings(timestep, noise_seed, tuple(rows))


def _compared(layers: Iterable[torch.Tensor]) -> Tensors:
    """Compare the N rows (N, ...) of each of L layers."""
    distance, length = zip(*((distances(rows), lengths(rows)) for rows in layers), strict=True)
    return {"distance": torch.stack(distance), "length": torch.stack(length)}


def _within_memory(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Layers whose activations are in memory together; at least one."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > MEMORY:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names


def _inputs(
    model: TextToImage,
    layers: Mapping[str, nn.Module],
    embeddings: torch.Tensor,
    *,
    noise: torch.Tensor,
    timestep: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Inputs (n, tokens, C) of layers in one pass of n embeddings, fp32."""
    inputs: dict[str, torch.Tensor] = {}

    def listen(name: str, values: torch.Tensor) -> None:
        inputs[name] = values.detach().float()

    count = len(embeddings)
    with heard_inputs(layers, listen), model.frozen(), torch.no_grad():
        model.predict_noise(
            noise.to(model.device).expand(count, -1, -1, -1),
            timestep.to(model.device).expand(count),
            embeddings.to(model.device),
        )
    return inputs


@dataclass(frozen=True)
class Selection:
    """What a pruning method selects with one embedding.

    Bits rather than masks, since hundreds of selections are compared: 6 MB each on Stable
    Diffusion 1.4.

    Attributes:
        bits: Weight's name to its flattened mask, eight units a byte, uint8, padded with zeros.
        units: Weight's name to what could be selected: output rows, or single weights.
        memorized: Whether the method took the embedding for memorized; None where it does not
            ask.
    """

    bits: dict[str, torch.Tensor]
    units: dict[str, int]
    memorized: bool | None

    @classmethod
    def of(cls, masks: Mapping[str, torch.Tensor], *, memorized: bool | None) -> Selection:
        """Pack boolean masks of any shape."""
        bits = {name: np.packbits(mask.flatten().cpu().numpy()) for name, mask in masks.items()}
        return cls(
            {name: torch.from_numpy(packed) for name, packed in bits.items()},
            {name: mask.numel() for name, mask in masks.items()},
            memorized,
        )


def _encode(selection: Selection) -> Tensors:
    # files sort tensors by name: the number in front keeps the order of layers
    bits = {f"{k:04}|{name}": row for k, (name, row) in enumerate(selection.bits.items())}
    memorized = -1 if selection.memorized is None else int(selection.memorized)
    return {
        **bits,
        "units": torch.tensor(list(selection.units.values())),
        "memorized": torch.tensor(memorized),
    }


def _decode(tensors: Tensors) -> Selection:
    units, memorized = tensors.pop("units").tolist(), int(tensors.pop("memorized"))
    bits = {name.split("|", 1)[1]: tensors[name] for name in sorted(tensors)}
    return Selection(
        bits, dict(zip(bits, units, strict=True)), None if memorized < 0 else bool(memorized)
    )


SELECTION = TENSORS.mapped(_encode, _decode)
"""File format of a `Selection`."""


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
    """Whether NeMo and Wanda select in the same transformer blocks for the same embedding.

    They prune different layers, so no weight can be in both selections; what can agree is where in
    the network they select.

    Attributes:
        group: Which embeddings.
        overlap: Mean of the sum over blocks of the smaller of the two selections' shares, in
            [0, 1]: both methods with the same embedding.
        overlap_other: The same with two different embeddings, as a control.
        other_images: Whether those are of different images; else of one image, or of two prompts.
        undefined: Embeddings with which one of the methods selects nothing in a common block.
    """

    group: GroupName
    overlap: Estimate
    overlap_other: Estimate
    other_images: bool
    undefined: int


@dataclass(frozen=True)
class WeightFindings:
    """What methods select with each embedding, on the checkpoint as it is.

    Attributes:
        settings: Method to its settings, plain values.
        layers: One entry per method, layer and group.
        memorized: Method to group to (embeddings it took for memorized, embeddings); a method that
            does not ask is not there.
        agreement: NeMo against Wanda, per group.
    """

    settings: Mapping[str, Mapping[str, object]]
    layers: tuple[LayerSelection, ...]
    memorized: Mapping[str, Mapping[str, tuple[int, int]]]
    agreement: tuple[BlockAgreement, ...]


def weight_findings(
    selections: Mapping[Method, Sequence[Selection]],
    groups: Sequence[Group],
    *,
    settings: Mapping[str, Mapping[str, object]],
    seed: int = 0,
) -> WeightFindings:
    """Compare selections within groups, layer by layer.

    Args:
        selections: Method to its selections with the N embeddings of all groups, one group after
            the other.
        groups: The groups.
        settings: For the record.
        seed: Of the resampling.
    """
    layers: list[LayerSelection] = []
    sizes: dict[str, dict[str, list[float]]] = {}
    memorized: dict[str, dict[str, tuple[int, int]]] = {}
    for method, chosen in selections.items():
        blocks = sizes.setdefault(method, {})
        for parameter, units in with_progress(f"{method}: shares", [*chosen[0].units.items()]):
            for group, place in _places(groups):
                shared = _intersections([one.bits[parameter] for one in chosen[place]])
                layers.append(_layer(method, parameter, group, shared, units=units, seed=seed))
                blocks.setdefault(parameter, []).extend(shared.diagonal())
        if any(one.memorized is not None for one in chosen):
            memorized[method] = {
                group.name: (sum(bool(one.memorized) for one in chosen[place]), len(group.labels))
                for group, place in _places(groups)
            }
    agreement = _block_agreements(sizes, groups, seed=seed) if len(sizes) == 2 else ()
    return WeightFindings(settings, tuple(layers), memorized, agreement)


def block_of(parameter: str) -> str:
    """Transformer block that a weight belongs to: its name up to the block."""
    return parameter.split(".transformer_blocks.")[0]


def _intersections(bits: Sequence[torch.Tensor]) -> np.ndarray:
    """Units that every two of N selections share (N, N), float64; their sizes on the diagonal."""
    total = torch.zeros(len(bits), len(bits), dtype=torch.float64)
    for part in torch.split(torch.stack(list(bits)), BYTES, dim=1):
        units = torch.from_numpy(np.unpackbits(part.numpy(), axis=1)).bool()
        # most weights are in no selection; counts below 2**24 are exact in float32
        rows = units[:, units.any(0)].float()
        total += rows @ rows.T
    return total.numpy()


def _layer(
    method: Method, parameter: str, group: Group, shared: np.ndarray, *, units: int, seed: int
) -> LayerSelection:
    sizes = shared.diagonal()
    both = sizes[:, None] + sizes[None]
    empty = both == 0
    iou = np.where(empty, 1.0, shared / np.maximum(both - shared, 1))
    # of random selections, by their expected intersection
    expected = sizes[:, None] * sizes[None] / units
    chance = np.where(empty, 1.0, expected / np.maximum(both - expected, 1e-300))
    within, between = pair_estimates(iou, group.labels, seed=seed)
    labels = np.array(group.labels)
    i, j = np.triu_indices(len(labels), 1)
    inside = labels[i] == labels[j]
    i, j = i[inside], j[inside]
    return LayerSelection(
        method=method,
        parameter=parameter,
        group=group.name,
        count=len(labels),
        units=units,
        size=float(sizes.mean()),
        smallest=int(sizes.min()),
        largest=int(sizes.max()),
        iou=within,
        iou_between=between,
        iou_nonempty=_mean(iou[i, j][~empty[i, j]]),
        chance=_mean(chance[i, j]),
        compared=len(i),
        both_empty=int(empty[i, j].sum()),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


def _block_agreements(
    sizes: Mapping[str, Mapping[str, Sequence[float]]], groups: Sequence[Group], *, seed: int
) -> tuple[BlockAgreement, ...]:
    """Compare in which blocks two methods select.

    Args:
        sizes: Method to weight's name to the sizes of its N selections.
        groups: The groups.
        seed: Of the resampling.
    """
    # by method: blocks, and selections; summed over the weights of a block
    tables = [pd.DataFrame(own).T.groupby(block_of).sum() for own in sizes.values()]
    common = tables[0].index.intersection(tables[1].index)
    shares = [(table.loc[common] / table.loc[common].sum()).to_numpy().T for table in tables]
    findings = []
    for group, place in _places(groups):
        ours, theirs = (own[place] for own in shares)
        defined = np.isfinite(ours).all(1) & np.isfinite(theirs).all(1)
        labels = [label for label, known in zip(group.labels, defined, strict=True) if known]
        overlaps = np.minimum(ours[defined][:, None], theirs[defined][None]).sum(2)
        within, between = pair_estimates((overlaps + overlaps.T) / 2, labels, seed=seed)
        findings.append(
            BlockAgreement(
                group=group.name,
                overlap=mean_estimate(overlaps.diagonal(), labels, seed=seed),
                overlap_other=between if between.count else within,
                other_images=between.count > 0,
                undefined=len(group.labels) - len(labels),
            )
        )
    return tuple(findings)
