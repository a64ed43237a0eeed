"""Shift the text embedding until the denoiser hardly distinguishes it from the empty prompt.

Reference: Wen et al., Detecting, explaining, and mitigating memorization in diffusion models
(ICLR 2024), sections 3 and 4.3 (inference-time mitigation).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from dori_lightning.attacks.solver import RowAdam
from dori_lightning.mitigations.base import (
    Context,
    CostEstimate,
    Evaluations,
    require,
    require_at_least_one,
)
from dori_lightning.mitigations.edits import Edit, Origin
from dori_lightning.models.progress import passes_shown
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.runtime.batching import fixed_batches
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Pair

log = logging.getLogger(__name__)

ROWS = 8
"""Images of every forward pass; more would need more memory for the gradient."""


@dataclass(frozen=True)
class AdjustmentSettings:
    """How an embedding is shifted: AdamW on all tokens but the first.

    AdamW's decay pulls the tokens that move towards zero, as in the reference. There it also
    shrinks the first token, whose gradient is set to zero, by at most 0.5 %; here that token
    stays exactly as it is.

    Attributes:
        lr: Learning rate; 0.05 in the reference's experiments.
        iterations: Steps at most.
        weight_decay: AdamW's decay; the reference uses PyTorch's default.
    """

    lr: float = 0.05
    iterations: int = 10
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        require(
            self.lr > 0 and self.iterations >= 1 and self.weight_decay >= 0,
            "adjusting needs lr > 0, iterations >= 1 and weight_decay >= 0",
            self,
        )


@dataclass(frozen=True)
class PromptAdjustment:
    """Adjust every embedding at inference; no weight changes.

    Whatever embedding reaches the generator is adjusted, so adversarial ones are as well. The
    attack itself does not see the defence: it searches against the plain denoiser, and what it
    finds is adjusted afterwards. An attack that takes the adjustment into account may do better,
    so the rate under attack is a lower bound.

    The reference adjusts one embedding for a batch of images and takes the norm over the whole
    batch, so its targets depend on the batch: a value for n images is about sqrt(n) times that
    of one. Here each image has its own embedding, norm and stop; a target of the reference is
    to be divided by sqrt(n) (its notebook: 3 for 4 images, so about 1.5).

    No pair is read.

    Attributes:
        name: How reports call it.
        target: An image's embedding is left as it is from the step where its score
            (``memorization_score``) is at most this. None: found on ordinary prompts, since a
            usual score is a property of the checkpoint.
        quantile: Which quantile of the scores of ordinary prompts is the target; not used where
            ``target`` is given.
        calibration_prompts: How many ordinary prompts, of the corpus' calibration split.
        adjusting: How embeddings are shifted.
    """

    name: str = "prompt_adjustment"
    target: float | None = None
    quantile: float = 0.5
    calibration_prompts: int = 64
    adjusting: AdjustmentSettings = AdjustmentSettings()

    def __post_init__(self) -> None:
        require(self.target is None or self.target >= 0, "target must be >= 0", self.target)
        require(0 <= self.quantile <= 1, "quantile must be in [0, 1]", self.quantile)
        require_at_least_one(self, "calibration_prompts")

    def estimate_cost(self, sampling: Sampling, pairs: int) -> CostEstimate:
        """Estimate what finding the target takes, and adjusting an image's embedding."""
        del sampling, pairs
        scored = self.calibration_prompts if self.target is None else 0
        return CostEstimate(
            Evaluations(forward=2 * scored), evaluations_per_image=self.adjusting.iterations
        )

    def apply(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> PromptAdjustmentEdit:
        """Find the target, unless it is given.

        Raises:
            InputError: The corpus has too few prompts.
            RuntimeError: Scores of ordinary prompts are not finite.
        """
        del pairs
        target, notes = self.target, {}
        if target is None:
            scores = self._ordinary_scores(model, context)
            target = float(scores.quantile(self.quantile))
            notes = {"ordinary_scores": scores.tolist()}
        return PromptAdjustmentEdit(
            Origin(model.fingerprint, notes={"target": target, **notes}),
            target,
            self.adjusting,
        )

    def _ordinary_scores(self, model: TextToImage, context: Context) -> torch.Tensor:
        count, shape = self.calibration_prompts, model.latent_shape
        keys = [keyed_generator("prompt adjustment", context.seed, k) for k in range(count)]
        noise = torch.stack([torch.randn(shape, generator=key) for key in keys])
        embeddings = context.prompts(model, "calibration", count)
        with passes_shown(model, f"mitigate: {self.name}", 2 * math.ceil(count / ROWS)):
            scores = memorization_score(model, embeddings, noise, context.sampling).cpu()
        if not bool(scores.isfinite().all()):
            raise RuntimeError(
                f"{self.name}: scores of ordinary prompts are not finite, so there is no target; "
                f"checkpoint.precision=fp32 may help"
            )
        return scores


@dataclass(frozen=True, eq=False)
class PromptAdjustmentEdit(Edit):
    """What is put before the generator; there is nothing to write, it is cheap to make again.

    Attributes:
        origin: Where it comes from.
        target: Score from which on an embedding is left as it is, >= 0.
        adjusting: How embeddings are shifted.
    """

    origin: Origin
    target: float
    adjusting: AdjustmentSettings = AdjustmentSettings()

    @cached_property
    def identity(self) -> str:
        """Hash of the checkpoint's fingerprint, the target and how embeddings are shifted."""
        what = f"prompt adjustment|{self.origin.fingerprint}|{self.target!r}|{self.adjusting!r}"
        return hashlib.sha256(what.encode()).hexdigest()[:24]

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[None]:
        """Adjust what is generated from while open, after what a filter there did already.

        Raises:
            InputError: The edit was made for another checkpoint.
        """
        self.origin.check(model)
        previous = model.embedding_filter

        def adjusted(
            embeddings: torch.Tensor, noise: torch.Tensor, sampling: Sampling
        ) -> torch.Tensor:
            if previous is not None:
                embeddings = previous(embeddings, noise, sampling)
            return self.adjusted(model, embeddings, noise, sampling)

        model.embedding_filter = adjusted
        try:
            yield
        finally:
            model.embedding_filter = previous

    def adjusted(
        self, model: TextToImage, embeddings: torch.Tensor, noise: torch.Tensor, sampling: Sampling
    ) -> torch.Tensor:
        """Adjusted embeddings (N, T, D), each image's by itself.

        An image whose score or gradient is not finite keeps its embedding from there on, with a
        warning. ``noise`` and ``sampling`` are those that the images will be generated with.
        """
        start = embeddings.detach().to(model.device)
        rows = start.float()
        optimizer = RowAdam(rows, lr=self.adjusting.lr)
        moving = model.free().to(rows).expand_as(rows).clone()
        moving[:, 0] = 0.0
        keep = 1 - self.adjusting.lr * self.adjusting.weight_decay * moving
        active = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        with model.frozen():
            passes = FirstStep(model, noise, sampling)
            for _ in range(self.adjusting.iterations):
                score, gradient = passes.gradient(rows, active)
                finite = score.isfinite() & gradient.flatten(1).isfinite().all(1)
                broken = active & ~finite
                if bool(broken.any()):
                    log.warning(
                        "prompt adjustment: %d embeddings are left, their score or gradient is "
                        "not finite",
                        int(broken.sum()),
                    )
                active = active & finite & (score > self.target)
                if not bool(active.any()):
                    break
                decayed = torch.where(active[:, None, None], rows * keep, rows)
                rows = optimizer.step(decayed, gradient * moving, active)
        return rows.to(start.dtype)


def memorization_score(
    model: TextToImage, embeddings: torch.Tensor, noise: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """How strongly the text steers the first denoising step: high where it is memorized.

    The score is the Euclidean norm, over an image's latent, of the difference between the noise
    predicted with the embedding and with the empty prompt, at the sampler's first timestep. The
    reference also averages over all steps and reports that the first alone works. A v prediction
    is converted to noise first, which makes its scores small; of a velocity the image that it
    implies is compared.

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
    """A sampler's first denoising step of N images, in batches of ``ROWS``."""

    def __init__(self, model: TextToImage, noise: torch.Tensor, sampling: Sampling) -> None:
        self.model, self.noise = model, noise.to(model.device, torch.float32)
        self.timestep = model.sampling_timesteps(sampling)[0].to(model.device)
        self.empty = torch.zeros_like(self.noise)
        unconditional = model.empty_embedding().expand(ROWS, -1, -1)
        with torch.no_grad():
            for index, count in fixed_batches(range(len(noise)), ROWS):
                self.empty[index[:count]] = self._predicted(index, unconditional)[:count]

    def score(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Scores (N,)."""
        scores = self.noise.new_zeros(len(embeddings))
        for index, count in fixed_batches(range(len(embeddings)), ROWS):
            scores[index[:count]] = self._score(index, embeddings[index])[:count]
        return scores

    def gradient(
        self, embeddings: torch.Tensor, active: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (N,) and their gradients (N, T, D), zero for rows that are not active (N,)."""
        score = self.noise.new_zeros(len(embeddings))
        gradient = torch.zeros_like(embeddings)
        for index, count in fixed_batches(active.nonzero()[:, 0].tolist(), ROWS):
            with torch.enable_grad():
                rows = embeddings[index].detach().requires_grad_(True)
                value = self._score(index, rows)
                (slope,) = torch.autograd.grad(value.sum(), rows)
            score[index[:count]] = value.detach()[:count]
            gradient[index[:count]] = slope[:count]
        return score, gradient

    def _score(self, index: list[int], embeddings: torch.Tensor) -> torch.Tensor:
        difference = self._predicted(index, embeddings) - self.empty[index]
        score: torch.Tensor = torch.linalg.vector_norm(difference.flatten(1), dim=1)
        return score

    def _predicted(self, index: list[int], embeddings: torch.Tensor) -> torch.Tensor:
        timesteps, noise = self.timestep.expand(len(index)), self.noise[index]
        if self.model.prediction_type == "velocity":
            # at full noise a velocity says nothing of the noise, and all of the image
            return self.model.predict_clean_and_noise(noise, timesteps, embeddings)[0]
        return self.model.predict_noise(noise, timesteps, embeddings)
