"""How differently embeddings activate the layers that pruning methods look at.

Reference: Finding DoRI (2507.16880), section on locality: the mean over pairs of embeddings of
||A(y_i) - A(y_j)||_2 at one fixed starting noise and timestep. Which tensor A is, and how it is
reduced, is not published; here it is all numbers of the layer, flattened: the output of NeMo's
value layers (T x C, independent of noise), the input of Wanda's feed-forward layers (tokens x C).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional as F

from dori_lightning.locality.distances import distances, relative_distances
from dori_lightning.locality.estimates import Estimate, mean_estimate, pair_estimates
from dori_lightning.progress import stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from dori_lightning.locality.groups import Group, GroupName
    from dori_lightning.models.protocol import Stage, TextToImage

__all__ = [
    "ActivationFindings",
    "Compared",
    "LayerActivation",
    "activation_findings",
    "feed_forward_distances",
    "value_distances",
]

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
    with stage("trace activations", len(batches) * len(embeddings)) as advance:
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
