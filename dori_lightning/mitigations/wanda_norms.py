"""Norms of what layers get as input while pictures are drawn, for each prompt and step.

Reference: Chavhan et al., Memorized images in diffusion models share a subspace that can be
located and deleted (2024), after Wanda (Sun et al., 2024), section 2.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from dori_lightning.models.pictures import generation_noise
from dori_lightning.progress import stage
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from dori_lightning.models.protocol import Sampling, Stage, TextToImage

__all__ = ["Tracing", "input_norms", "pooled"]

CPU_ROWS = 8
"""Embeddings of every pass on the CPU: kernels are chosen by shape, so with passes of one shape
an embedding gets the same norms in any company."""


@dataclass(frozen=True)
class Tracing:
    """Which passes of a sampler are looked at.

    Attributes:
        sampling: Sampler, steps and guidance. With guidance both halves, the prompt's and the
            empty prompt's, count, as in the reference.
        steps: First steps of the sampler that are looked at; the rest is not run.
        seed: First seed of the starting noise, the same noise for every embedding.
        seeds: Starting noises ``seed``, ``seed + 1``, ...; their norms are pooled.
        stages: Which feed-forward layers.
    """

    sampling: Sampling
    steps: int = 10
    seed: int = 0
    seeds: int = 1
    stages: tuple[Stage, ...] = ("down", "mid", "up")

    def check(self) -> None:
        """Refuse more steps than the sampler takes.

        Raises:
            InputError: Says both numbers.
        """
        if self.steps > self.sampling.steps:
            raise InputError(
                f"Wanda looks at the first {self.steps} steps, but the sampler takes "
                f"{self.sampling.steps}\n"
                f"  where: mitigation.steps\n"
                f"  mend:  mitigation.steps={self.sampling.steps}, or a sampler with more steps"
            )


class _EnoughError(Exception):
    """The steps that are looked at are done."""


def input_norms(
    model: TextToImage, embeddings: torch.Tensor, tracing: Tracing
) -> dict[str, torch.Tensor]:
    """Norms of the inputs of every feed-forward output layer, for each embedding by itself.

    Every token's input vector is scaled to length 1 first, so that no token counts more than
    another; then each input's Euclidean norm is taken over tokens, guidance halves and seeds, in
    fp32. Nothing is decoded, and the sampler is left after the last step that counts.

    Args:
        model: Checkpoint; left as it was.
        embeddings: Text embeddings (N, T, D), of prompts or from anywhere else.
        tracing: Which passes.

    Returns:
        Layer name, in execution order, to norms (N, ``steps``, C_in) >= 0, fp32, on the model's
        device.

    Raises:
        InputError: The sampler takes fewer steps.
    """
    tracing.check()
    layers = model.layers("feed_forward.out", tracing.stages)
    cpu = model.device.type == "cpu"
    width = CPU_ROWS if cpu else max(1, tracing.sampling.batch)
    count = len(embeddings)
    squares = {
        name: torch.zeros(count, tracing.steps, _width(layer), device=model.device)
        for name, layer in layers.items()
    }
    total = count * tracing.seeds
    with model.frozen(), stage("wanda: trace", total) as advance:
        for seed in range(tracing.seed, tracing.seed + tracing.seeds):
            noise = generation_noise(seed, model.latent_shape)
            for start in range(0, count, width):
                own = list(range(start, min(start + width, count)))
                # the last pass is filled up with copies, whose norms are dropped
                rows = own + [start] * (width - len(own)) if cpu else own
                found = _trace(model, layers, embeddings[rows], noise=noise, tracing=tracing)
                for name, value in found.items():
                    squares[name][own] += value[: len(own)]
                advance(len(own))
    return {name: value.sqrt() for name, value in squares.items()}


def pooled(norms: torch.Tensor) -> torch.Tensor:
    """Root mean square over embeddings: norms (N, S, C_in) to (S, C_in).

    The reference adds squares over as many target as base prompts. The mean gives the same
    choice there, and is comparable where the numbers differ.
    """
    # a square root's square is not the number: one embedding must stay as it is
    return norms[0] if len(norms) == 1 else norms.square().mean(0).sqrt()


def _width(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[1])


def _trace(
    model: TextToImage,
    layers: dict[str, nn.Module],
    embeddings: torch.Tensor,
    *,
    noise: torch.Tensor,
    tracing: Tracing,
) -> dict[str, torch.Tensor]:
    """Squared norms (n, steps, C_in) of one pass of n embeddings from one starting noise."""
    count = len(embeddings)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    with _listening(model, layers, seen, count=count, steps=tracing.steps):
        try:
            model.denoise(embeddings, noise.expand(count, -1, -1, -1), tracing.sampling)
        except _EnoughError:
            pass
        else:
            raise RuntimeError(f"the sampler ended before its step {tracing.steps}")
    return {name: torch.stack(steps, 1) for name, steps in seen.items()}


@contextmanager
def _listening(
    model: TextToImage,
    layers: dict[str, nn.Module],
    seen: dict[str, list[torch.Tensor]],
    *,
    count: int,
    steps: int,
) -> Iterator[None]:
    """Hooks while open: note every layer's inputs, and stop after ``steps`` passes."""
    done = 0

    def listener(name: str) -> Any:
        def listen(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[name].append(_squares(inputs[0], count))

        return listen

    def finish(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == steps:
            raise _EnoughError

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(listener(name)))
        # after the pass, not before the next: that one would be counted as an evaluation
        handles.append(model.denoiser().register_forward_hook(finish))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _squares(inputs: torch.Tensor, count: int) -> torch.Tensor:
    """Squared column norms (n, C_in) of token-normalised inputs (halves x n, tokens, C_in).

    Rows of the halves follow each other: row k of every half belongs to embedding k.
    """
    rows = F.normalize(inputs.detach().float(), dim=-1).square().sum(1)
    return rows.view(-1, count, rows.shape[1]).sum(0)
