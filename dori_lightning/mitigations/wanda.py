"""Zero the feed-forward weights that a memorized prompt uses more than the empty one.

Reference: Chavhan et al., Memorized images in diffusion models share a subspace that can be
located and deleted (2024); the scores are Wanda's (Sun et al., 2024).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from dori_lightning.mitigations.activations import heard_inputs
from dori_lightning.mitigations.base import (
    Context,
    CostEstimate,
    Evaluations,
    layers_of,
    require,
    require_at_least_one,
    require_choices,
    require_pairs,
    require_stages,
)
from dori_lightning.mitigations.edits import MaskEdit, Origin, PairMaskEdit
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.runtime.batching import fixed_batches
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import InputError, Pair

Scope = Literal["pair", "union"]

CPU_ROWS = 8
"""Embeddings of a batch on the CPU: kernels are chosen by shape, so in batches of one shape an
embedding gets the same norms in any company."""


@dataclass(frozen=True)
class Wanda:
    """Wanda scores against the empty prompt, row by row, over the first denoising steps.

    What the paper on attacks does not say is a field: its sparsity (only 10 % is named) and
    whether masks are per pair. Defaults are those of the published scripts, with masks per pair.

    Masks of single weights take a byte per weight and pair: about 50 MB a pair for Stable
    Diffusion, in memory and on the device where the edit is applied. The file keeps places only.

    Attributes:
        name: How reports call it.
        fraction: r, share of each output row that may be pruned, in (0, 1).
        steps: tau_max, first steps of the sampler that are looked at; a weight is pruned where
            any of them chooses it.
        scope: ``pair``: each pair has its own mask. ``union``: one mask, everything that any
            pair's mask has.
        stages: Which feed-forward layers; None for all, as in the reference.
        seed: Of the starting noise.
    """

    name: str = "wanda"
    fraction: float = 0.01
    steps: int = 10
    scope: Scope = "pair"
    stages: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stages is not None:
            object.__setattr__(self, "stages", tuple(self.stages))
        require(0 < self.fraction < 1, "fraction must be in (0, 1)", self.fraction)
        require_at_least_one(self, "steps")
        require_choices(self, scope=Scope)
        require_stages(self.stages)

    def estimate_cost(self, sampling: Sampling, pairs: int) -> CostEstimate:
        """Estimate what finding the edit takes for a number of pairs to forget."""
        rows = (pairs + 1) * self.steps * sampling.rows_per_step
        return CostEstimate(Evaluations(forward=rows))

    def apply(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> MaskEdit | PairMaskEdit:
        """Choose weights by the pairs' prompts; their images are not read.

        Raises:
            InputError: There is no pair, the sampler takes fewer steps, or ``fraction`` of a row
                is less than one weight.
        """
        require_pairs(pairs, self.name)
        masks = self.find(model, context.data.batch(pairs).embeddings, context)
        if self.scope == "pair":
            own = {pair.id: mask for pair, mask in zip(pairs, masks, strict=True)}
            origin = Origin(model.fingerprint, notes=_notes(list(own.values()), ids=list(own)))
            return PairMaskEdit(origin, own)
        merged = next(masks)
        for mask in masks:
            merged = {name: value | mask[name] for name, value in merged.items()}
        return MaskEdit(Origin(model.fingerprint, notes=_notes([merged])), merged)

    def find(
        self, model: TextToImage, embeddings: torch.Tensor, context: Context
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Choose weights by embeddings, whether they are those of prompts or not.

        The model runs before this returns, in batches that all embeddings share; masks are made
        one by one, since each is as large as the layers. On the CPU an embedding's mask does not
        depend on the others.

        Args:
            model: Checkpoint; left as it was.
            embeddings: Text embeddings (N, T, D).
            context: Gives the sampler.

        Returns:
            For each embedding in turn: ``<layer>.weight`` to (C_out, C_in), True where pruned, on
            the CPU.

        Raises:
            InputError: The sampler takes fewer steps, or ``fraction`` of a row is less than one
                weight.
        """
        layers = self._layers(model)
        device = model.device
        norms = input_norms(
            model,
            torch.cat([embeddings.to(device), model.empty_embedding().to(device)]),
            context.sampling,
            steps=self.steps,
            seed=self.seed,
            stages=self.stages,
        )

        def masks() -> Iterator[dict[str, torch.Tensor]]:
            with progress_bar("wanda: select", len(embeddings)) as advance:
                for k in range(len(embeddings)):
                    yield {
                        f"{name}.weight": select_over_time(
                            layer.weight, norms[name][k], norms[name][-1], self.fraction
                        ).cpu()
                        for name, layer in layers.items()
                    }
                    advance(1)

        return masks()

    def _layers(self, model: TextToImage) -> dict[str, nn.Linear]:
        """Feed-forward output layers by name.

        Raises:
            InputError: ``fraction`` of a row is less than one weight.
        """
        layers = layers_of(model, "feed_forward.out", self.stages)
        for name, layer in layers.items():
            if _row_count(layer.in_features, self.fraction) < 1:
                raise InputError(
                    f"{self.fraction} of the {layer.in_features} weights in a row of {name} is "
                    f"less than one weight\n"
                    f"  where: mitigation.fraction\n"
                    f"  fix:   at least {1 / layer.in_features:.4g}, or drop the layer's stage "
                    f"from mitigation.stages"
                )
        return layers


def _notes(
    masks: Sequence[Mapping[str, torch.Tensor]], ids: Sequence[str] | None = None
) -> dict[str, Any]:
    """Share of weights pruned, in all and by layer, on average over masks; pairs without any."""
    counts = [{name: int(mask.sum()) for name, mask in own.items()} for own in masks]
    sizes = {name: mask.numel() for name, mask in masks[0].items()}
    total = sum(sizes.values()) * len(masks)
    notes: dict[str, Any] = {
        "share_pruned": sum(sum(own.values()) for own in counts) / total,
        "share_pruned_by_layer": {
            name: sum(own[name] for own in counts) / (size * len(masks))
            for name, size in sizes.items()
        },
    }
    if ids is not None:
        notes["share_pruned_by_pair"] = {
            pair: sum(own.values()) * len(masks) / total
            for pair, own in zip(ids, counts, strict=True)
        }
        notes["pairs_without_mask"] = [
            pair for pair, own in zip(ids, counts, strict=True) if not sum(own.values())
        ]
    return notes


def input_norms(
    model: TextToImage,
    embeddings: torch.Tensor,
    sampling: Sampling,
    *,
    steps: int,
    seed: int = 0,
    stages: Sequence[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Norms of the inputs of every feed-forward output layer, for each embedding by itself.

    Every token's input vector is scaled to length 1 first, so that no token counts more than
    another; then each input's Euclidean norm is taken over tokens and guidance halves, in fp32.
    Nothing is decoded, and the sampler is left after the last step that counts.

    Args:
        model: Checkpoint; left as it was.
        embeddings: Text embeddings (N, T, D), of prompts or from anywhere else.
        sampling: Sampler, steps and guidance. With guidance both halves, the prompt's and the
            empty prompt's, count, as in the reference.
        steps: First steps of the sampler that are looked at; the rest is not run.
        seed: Of the starting noise, the same for every embedding.
        stages: Which feed-forward layers; None for all.

    Returns:
        Layer name, in execution order, to norms (N, ``steps``, C_in) >= 0, fp32, on the model's
        device.

    Raises:
        InputError: The sampler takes fewer steps.
    """
    if steps > sampling.steps:
        raise InputError(
            f"Wanda looks at the first {steps} steps, but the sampler takes "
            f"{sampling.steps}\n"
            f"  where: mitigation.steps\n"
            f"  fix:   mitigation.steps={sampling.steps}, or a sampler with more steps"
        )
    layers = layers_of(model, "feed_forward.out", stages)
    on_cpu = model.device.type == "cpu"
    batch_size = CPU_ROWS if on_cpu else max(1, sampling.batch)
    count = len(embeddings)
    squares = {
        name: torch.zeros(count, steps, layer.in_features, device=model.device)
        for name, layer in layers.items()
    }
    noise = generation_noise(seed, model.latent_shape)
    with model.frozen(), progress_bar("wanda: trace", count) as advance:
        for batch, valid in fixed_batches(range(count), batch_size):
            rows = batch if on_cpu else batch[:valid]
            traced = _trace(
                model, layers, embeddings[rows], noise=noise, sampling=sampling, steps=steps
            )
            for name, value in traced.items():
                squares[name][batch[:valid]] = value[:valid]
            advance(valid)
    return {name: value.sqrt() for name, value in squares.items()}


class _EnoughError(Exception):
    """The steps that are looked at are done."""


def _trace(
    model: TextToImage,
    layers: Mapping[str, nn.Linear],
    embeddings: torch.Tensor,
    *,
    noise: torch.Tensor,
    sampling: Sampling,
    steps: int,
) -> dict[str, torch.Tensor]:
    """Squared norms (n, steps, C_in) of one batch of n embeddings from one starting noise."""
    count, done = len(embeddings), 0
    squares: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def listen(name: str, inputs: torch.Tensor) -> None:
        squares[name].append(_squares(inputs, count))

    def finish(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == steps:
            raise _EnoughError

    # after the step, not before the next: that one would be counted as an evaluation
    with heard_inputs(layers, listen), model.denoiser().register_forward_hook(finish):
        try:
            model.denoise(embeddings, noise.expand(count, -1, -1, -1), sampling)
        except _EnoughError:
            return {name: torch.stack(each, 1) for name, each in squares.items()}
    raise RuntimeError(f"the sampler ended before its step {steps}")


def _squares(inputs: torch.Tensor, count: int) -> torch.Tensor:
    """Squared column norms (n, C_in) of token-normalised inputs (halves x n, tokens, C_in).

    Rows of the halves follow each other: row k of every half belongs to embedding k.
    """
    rows = F.normalize(inputs.detach().float(), dim=-1).square().sum(1)
    return rows.view(-1, count, rows.shape[1]).sum(0)


def select(
    weight: torch.Tensor, target_norm: torch.Tensor, base_norm: torch.Tensor, fraction: float
) -> torch.Tensor:
    """Weights that are among a row's most important and more important than for the base.

    Args:
        weight: (C_out, C_in), any float dtype; scores are fp32.
        target_norm: Norms of a step's inputs under the target (C_in,), >= 0.
        base_norm: The same under the base (C_in,).
        fraction: r; the floor(r C_in) highest scores |weight| * norm of each row are candidates.

    Returns:
        Boolean mask (C_out, C_in).
    """
    size = weight.detach().abs().float()
    target, base = size * target_norm, size * base_norm
    top = target.topk(_row_count(weight.shape[1], fraction), dim=1).indices
    chosen = torch.zeros_like(target, dtype=torch.bool).scatter_(1, top, True)
    return chosen & (target > base)


def select_over_time(
    weight: torch.Tensor, target_norms: torch.Tensor, base_norms: torch.Tensor, fraction: float
) -> torch.Tensor:
    """Weights that ``select`` chooses in any of S steps, by the norms (S, C_in) of each."""
    chosen = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    for target, base in zip(target_norms, base_norms, strict=True):
        chosen |= select(weight, target, base, fraction)
    return chosen


def _row_count(width: int, fraction: float) -> int:
    # 0.29 * 100 is 28.999...96 in floating point
    return math.floor(fraction * width + 1e-9)
