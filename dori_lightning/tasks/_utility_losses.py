"""Denoising losses of ordinary pictures, under draws that depend on names alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dori_lightning.attacks.draws import keyed_generator
from dori_lightning.models.pictures import CPU_PICTURES

if TYPE_CHECKING:
    from collections.abc import Callable

    from dori_lightning.models.protocol import TextToImage

__all__ = ["LossExamples", "corpus_id", "denoising_losses"]


def corpus_id(place: int) -> str:
    """Name of an element of the corpus; per-pair edits choose by it whose mask the row sees."""
    return f"corpus_{place:04d}"


@dataclass(frozen=True)
class LossExamples:
    """Ordinary pictures with captions, and how often noise is drawn for each.

    Attributes:
        prompts: N captions.
        embeddings: Their embeddings (N, T, D).
        latents: Scaled latents (N, C, h, w) of the pictures.
        draws: Draws for each, R.
        seed: Seed of the draws.
    """

    prompts: tuple[str, ...]
    embeddings: torch.Tensor
    latents: torch.Tensor
    draws: int
    seed: int

    def draw(self, place: int, number: int, timesteps: int) -> tuple[torch.Tensor, int]:
        """Noise (C, h, w) and timestep of one draw; the same for every model and device.

        The R timesteps of an example are uniform on R equal parts of the schedule, one on each:
        their mean is that of uniform timesteps, with less scatter.
        """
        generator = keyed_generator("utility", self.seed, corpus_id(place), number)
        noise = torch.randn(self.latents.shape[1:], generator=generator)
        within = float(torch.rand((), generator=generator, dtype=torch.float64))
        return noise, math.floor((number + within) / self.draws * timesteps)


@torch.no_grad()
def denoising_losses(
    model: TextToImage,
    examples: LossExamples,
    *,
    batch: int,
    advance: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Denoising loss of every example under every draw.

    Under an edit that differs by pair, example k sees the mask that its name is given by
    ``mitigations.edits.owner_of``. So the masks of the edited pairs are used in turn, and the mean
    is what an edit costs on average over pairs. A defence that filters embeddings when pictures
    are generated leaves the denoiser as it is: it costs nothing by this measure, and is judged by
    its pictures.

    Args:
        model: Carries the edit, or none.
        examples: N examples with R draws each.
        batch: Rows of a pass; on the CPU every pass has the same shape whatever this says, so that
            a model without an edit gives the same bits again.
        advance: Called with the number of rows that just became done.

    Returns:
        Mean squared errors (N, R), fp64 on the CPU.
    """
    places = [(k, r) for k in range(len(examples.prompts)) for r in range(examples.draws)]
    width = CPU_PICTURES if model.device.type == "cpu" else batch
    values: list[torch.Tensor] = []
    for start in range(0, len(places), width):
        part = places[start : start + width]
        full = [*part, *[part[0]] * (width - len(part))]
        drawn = [examples.draw(k, r, model.num_train_timesteps) for k, r in full]
        rows = [k for k, _ in full]
        losses = model.denoising_loss(
            examples.latents[rows].to(model.device),
            torch.stack([noise for noise, _ in drawn]).to(model.device),
            torch.tensor([timestep for _, timestep in drawn], device=model.device),
            examples.embeddings[rows].to(model.device),
            pair_ids=[corpus_id(k) for k in rows],
        )
        values.append(losses[: len(part)].double().cpu())
        if advance is not None:
            advance(len(part))
    return torch.cat(values).reshape(len(examples.prompts), examples.draws)
