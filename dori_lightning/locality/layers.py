"""How differently embeddings activate the layers that pruning methods look at.

Reference: Finding DoRI (2507.16880), section on locality: the mean over pairs of embeddings of
||A(y_i) - A(y_j)||_2 at one fixed starting noise and timestep. Which tensor A is, and how it is
reduced, is not published; here it is all numbers of the layer, flattened: the output of NeMo's
value layers (T x C, independent of noise), the input of Wanda's feed-forward layers (tokens x C).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from dori_lightning.locality.embeddings import Group, GroupName, distances, relative_distances
from dori_lightning.locality.estimates import Estimate, mean_estimate, pair_estimates
from dori_lightning.mitigations.edits import EVERYBODY, Edit
from dori_lightning.models.protocol import Stage, TextToImage
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import InputError

# -------- activations

MEMORY = 4 << 30
"""Bytes of activations that are held at once; layers beyond it get passes of their own."""

ROWS = 8
"""Embeddings of a pass."""


@dataclass(frozen=True)
class Compared:
    """Activations of N embeddings in one layer, compared with each other.

    Attributes:
        distance: Euclidean distances (N, N).
        length: Euclidean lengths (N,).
    """

    distance: torch.Tensor
    length: torch.Tensor


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

    method: Literal["nemo", "wanda"]
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
        timestep: Where Wanda's layers are looked at.
        noise_seed: Seed of the starting noise, which is the denoiser's input.
        layers: One entry per method, layer and group.
    """

    timestep: int
    noise_seed: int
    layers: tuple[LayerActivation, ...]


def value_distances(
    model: TextToImage, embeddings: torch.Tensor, stages: Sequence[Stage]
) -> dict[str, Compared]:
    """Compare outputs of the cross-attention value layers; the denoiser does not run.

    Args:
        model: Checkpoint.
        embeddings: Text embeddings (N, T, D).
        stages: Which layers.

    Returns:
        Layer name, in execution order, to how far the N are apart.
    """
    found = {}
    for name, layer in model.layers("cross_attention.value", stages).items():
        weight = _tensor(layer.weight)
        bias = None if layer.bias is None else _tensor(layer.bias).float()
        with torch.no_grad():
            values = F.linear(embeddings.to(weight.device, torch.float32), weight.float(), bias)
        found[name] = _compared(values)
    return found


def feed_forward_distances(
    model: TextToImage,
    embeddings: torch.Tensor,
    stages: Sequence[Stage],
    *,
    noise: torch.Tensor,
    timestep: torch.Tensor,
) -> dict[str, Compared]:
    """Compare inputs of the feed-forward output layers in one pass of the denoiser.

    Args:
        model: Checkpoint; left as it was.
        embeddings: Text embeddings (N, T, D).
        stages: Which layers.
        noise: What the denoiser is given (C, h, w), the same for every embedding.
        timestep: Scalar.

    Returns:
        Layer name, in execution order, to how far the N are apart.
    """
    layers = model.layers("feed_forward.out", stages)
    first = _inputs(model, layers, embeddings[:1], noise=noise, timestep=timestep)
    sizes = {name: 4 * value.numel() * len(embeddings) for name, value in first.items()}
    found: dict[str, Compared] = {}
    batches = list(_within_memory(sizes))
    with progress_bar("trace activations", len(batches) * len(embeddings)) as advance:
        for names in batches:
            chosen = {name: layers[name] for name in names}
            parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
            for rows in torch.split(embeddings, ROWS):
                own = _inputs(model, chosen, rows, noise=noise, timestep=timestep)
                for name, value in own.items():
                    parts[name].append(value.cpu())
                advance(len(rows))
            for name in names:
                found[name] = _compared(torch.cat(parts.pop(name)))
    return {name: found[name] for name in layers}


def activation_findings(
    compared: Mapping[Literal["nemo", "wanda"], Mapping[str, Compared]],
    groups: Sequence[Group],
    *,
    timestep: int,
    noise_seed: int,
    seed: int = 0,
) -> ActivationFindings:
    """Average distances within groups.

    Args:
        compared: Method to layer name to distances among the embeddings of all groups, one group
            after the other.
        groups: The groups.
        timestep: For the record.
        noise_seed: For the record.
        seed: Of the resampling.
    """
    rows = []
    for method, layers in compared.items():
        for layer, values in layers.items():
            first = 0
            for group in groups:
                own = slice(first, first + len(group.labels))
                first += len(group.labels)
                rows.append(_row(method, layer, group, values, own, seed=seed))
    return ActivationFindings(timestep, noise_seed, tuple(rows))


def _row(
    method: Literal["nemo", "wanda"],
    layer: str,
    group: Group,
    values: Compared,
    own: slice,
    *,
    seed: int,
) -> LayerActivation:
    distance, length = values.distance[own, own], values.length[own]
    mean, between = pair_estimates(distance, group.labels, seed=seed)
    relative, relative_between = pair_estimates(
        relative_distances(distance, length), group.labels, seed=seed
    )
    lengths: dict[str, list[float]] = {}
    for label, value in zip(group.labels, length.tolist(), strict=True):
        lengths.setdefault(label, []).append(value)
    return LayerActivation(
        method=method,
        layer=layer,
        group=group.name,
        count=len(group.labels),
        length=mean_estimate(lengths, seed=seed),
        distance=mean,
        distance_between=between,
        relative=relative,
        relative_between=relative_between,
    )


def _compared(rows: torch.Tensor) -> Compared:
    return Compared(distances(rows), rows.flatten(1).double().norm(dim=1).cpu())


def _within_memory(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Layers that are held together; at least one."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > MEMORY:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
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
    seen: dict[str, torch.Tensor] = {}

    def listener(name: str) -> Any:
        def listen(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name] = inputs[0].detach().float()

        return listen

    count = len(embeddings)
    handles = [layer.register_forward_pre_hook(listener(name)) for name, layer in layers.items()]
    try:
        with model.frozen(), torch.no_grad():
            model.predict_noise(
                noise.to(model.device).expand(count, -1, -1, -1),
                timestep.to(model.device).expand(count),
                embeddings.to(model.device),
            )
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _tensor(value: Any) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


# -------- selections
# Selections of weights on disk: one file per method and embedding, a bit per weight.

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


# -------- agreement
# How far edits choose the same weights: intersection over union, by layer.
#
# Two edits that choose nothing agree perfectly and say nothing, so how often that happens is told
# beside every mean.
#
# Reference: Finding DoRI (2507.16880), section on locality: the mean over pairs of embeddings of
# |A and B| / |A or B|, 1 where both are empty.

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
    masks = edit.masks_by_pair()
    if not masks:
        raise InputError(
            f"{_name(edit)} chooses no weights, so it cannot be compared by what it chooses\n"
            f"  fix:   compare pruning methods"
        )
    return masks


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
        mean=_mean_agreement(pairs),
        mean_nonempty=_mean_agreement(pairs[~void]),
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
            f"  fix:   compare edits for the same pairs"
        )
    chosen = [(_of(ours, pair), _of(theirs, pair)) for pair in pairs]
    names = [list(dict.fromkeys(n for row in chosen for n in row[side])) for side in (0, 1)]
    common = [name for name in names[0] if name in names[1]]
    if not common:
        raise InputError(
            f"{_name(first)} and {_name(second)} have no weight in common: the first chooses in "
            f"{_some(names[0])}, the second in {_some(names[1])}\n"
            f"  fix:   compare edits of the same layers"
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


def _mean_agreement(values: torch.Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


def _check_shapes(first: torch.Tensor, second: torch.Tensor, what: str) -> None:
    if first.dtype != torch.bool or second.dtype != torch.bool:
        raise TypeError(f"masks must be boolean, got {first.dtype} and {second.dtype}")
    if first.shape != second.shape:
        raise InputError(
            f"{what}: masks of shape {tuple(first.shape)} and {tuple(second.shape)} cannot be "
            f"compared (one dimension: whole rows; two: single weights)\n"
            f"  fix:   compare edits that prune in the same way"
        )


def _name(edit: Edit) -> str:
    origin = edit.origin
    return (origin.mitigation if origin is not None else "") or type(edit).__name__


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


# -------- weights
# Whether a pruning method, run with each embedding, selects the same weights for one image.
#
# Reference: Finding DoRI (2507.16880), section on locality. Two empty selections agree trivially
# and say nothing: how many there are is told beside every mean, and so is what random selections
# of the same sizes would give.

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
