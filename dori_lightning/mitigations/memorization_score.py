"""How strongly the text steers the first denoising step: high where a prompt is memorized.

Reference: Wen et al., Detecting, explaining, and mitigating memorization in diffusion models
(ICLR 2024), section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dori_lightning.models.protocol import Sampling, TextToImage

__all__ = ["FirstStep", "memorization_score"]

ROWS = 8
"""Pictures of every forward pass. Passes are filled up to one shape, so that a picture gets the
same bits on the CPU in any company; more would need more memory for the gradient."""


def memorization_score(
    model: TextToImage, embeddings: torch.Tensor, noise: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """How strongly the text steers the first denoising step: high where it is memorized.

    The score is the Euclidean norm, over a picture's latent, of the difference between the noise
    predicted with the embedding and with the empty prompt, at the sampler's first timestep. The
    reference also averages over all steps and reports that the first alone works. A v prediction
    is converted to noise first, which makes its scores small.

    Args:
        model: Checkpoint; left as it was.
        embeddings: Text embeddings (N, T, D).
        noise: Starting noise (N, C, h, w), standard normal: the samplers start from it unscaled.
        sampling: Says which timestep is the first.

    Returns:
        Scores (N,) >= 0, fp32, on the model's device; depends on latent size.
    """
    with model.frozen(), torch.no_grad():
        return FirstStep(model, noise, sampling).score(embeddings.to(model.device))


class FirstStep:
    """A sampler's first denoising step of N pictures, ``ROWS`` pictures to a pass."""

    def __init__(self, model: TextToImage, noise: torch.Tensor, sampling: Sampling) -> None:
        self.model, self.noise = model, noise.to(model.device, torch.float32)
        self.timestep = model.sampling_timesteps(sampling)[0].to(model.device)
        self.empty = torch.zeros_like(self.noise)
        everyone = torch.arange(len(noise), device=model.device)
        unconditional = model.empty_embedding().expand(ROWS, -1, -1)
        with torch.no_grad():
            for index, count in _passes(everyone):
                self.empty[index[:count]] = self._predicted(index, unconditional)[:count]

    def score(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scores (N,)."""
        found = self.noise.new_zeros(len(embeddings))
        for index, count in _passes(torch.arange(len(embeddings), device=found.device)):
            found[index[:count]] = self._score(index, embeddings[index])[:count]
        return found

    def gradient(
        self, embeddings: torch.Tensor, active: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (N,) and their gradients (N, T, D), zero for rows that are not active (N,)."""
        score = self.noise.new_zeros(len(embeddings))
        gradient = torch.zeros_like(embeddings)
        for index, count in _passes(active.nonzero()[:, 0]):
            with torch.enable_grad():
                rows = embeddings[index].detach().requires_grad_(True)
                value = self._score(index, rows)
                (slope,) = torch.autograd.grad(value.sum(), rows)
            score[index[:count]] = value.detach()[:count]
            gradient[index[:count]] = slope[:count]
        return score, gradient

    def _score(self, index: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        difference = self._predicted(index, embeddings) - self.empty[index]
        score: torch.Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
        return score

    def _predicted(self, index: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        timesteps = self.timestep.expand(len(index))
        return self.model.predict_noise(self.noise[index], timesteps, embeddings)


def _passes(rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """Row numbers (M,) in parts of ``ROWS``, the last filled up with its first; how many count."""
    for part in torch.split(rows, ROWS):
        yield torch.cat([part, part[:1].expand(ROWS - len(part))]), len(part)
