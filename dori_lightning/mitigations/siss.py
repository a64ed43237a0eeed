"""Unlearn images by the keep gradient minus a fixed length of the forget gradient.

Reference: Data Unlearning in Diffusion Models (Alberti et al., ICLR 2025),
https://openreview.net/forum?id=SuHScQv5gP: subtracted importance sampled scores (SISS).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from dori_lightning.mitigations.base import Context, CostEstimate, require, require_at_least_one
from dori_lightning.mitigations.finetuning import (
    FinetunedMitigation,
    FinetuneSettings,
    Finetuning,
    shuffled_indices,
)
from dori_lightning.mitigations.replacements import Anchors, AnchorSettings, find_anchors
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.runtime import distributed
from dori_lightning.runtime.logging import with_progress
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError, Pair

MEASURED_BATCHES = 4
"""Batches whose naive deletion gradients are averaged to set ``scaling_norm``."""

NAIVE_SHARE = 0.1
"""The forget gradient's length as a share of theirs, as the published repository recommends."""


@dataclass(frozen=True)
class SISS(FinetunedMitigation):
    """SISS on all weights of the denoiser.

    The published method makes one model per prompt, from images of that prompt that k-means
    sorted into memorized and not. An audit of N pairs would need N models, so one model is
    trained on all pairs in turn; what is forgotten is the pair's own image, what is kept are its
    anchors. It trains at the last timestep only, as published. How the DoRI paper ran it is
    unknown, as are its settings. The defaults are the published ones, except for the gradient's
    length: the published 750 fits Stable Diffusion v1.4 alone.

    Attributes:
        name: How reports call it.
        anchors: How the images to keep are found.
        steps: Optimizer steps in all.
        batch: Images of a step; the published 16 are one by one.
        micro_batch: Images of a forward pass; changes memory, not results (up to rounding).
        mixture: Share of images to forget in the mixture (lambda).
        scaling_norm: Length that the forget gradient is given. None: a tenth of the length of the
            naive deletion gradient (the ordinary loss of the images to keep) of the model as it
            is, which is what the published 750 is.
        finetune: Optimizer settings.
    """

    name: str
    anchors: AnchorSettings = field(default_factory=AnchorSettings)
    steps: int = 35
    batch: int = 16
    micro_batch: int = 1
    mixture: float = 0.5
    scaling_norm: float | None = None
    finetune: FinetuneSettings = field(default_factory=lambda: FinetuneSettings(lr=1e-5))

    def __post_init__(self) -> None:
        require_at_least_one(self, "steps", "batch", "micro_batch")
        require(0 < self.mixture < 1, "mixture must be in (0, 1)", self.mixture)
        norm = self.scaling_norm
        require(norm is None or norm >= 0, "scaling_norm must be >= 0 or null", norm)
        if self.finetune.precision == "16-mixed":
            raise InputError(
                "mitigation.finetune.precision must be 32-true or bf16-mixed for SISS: its two "
                "gradients are sums over pixels, which leave the range of 16-mixed"
            )

    def estimate_cost(self, sampling: Sampling, pairs: int) -> CostEstimate:
        """Estimate what finding the edit takes for a number of pairs to forget."""
        # two gradients of one forward pass
        return self.anchors.estimate_cost(sampling, pairs, training=2 * self.steps * self.batch)

    def training(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> Callable[[], SISSTraining]:
        """Find anchors with the model as it is, then train."""
        anchors = find_anchors(model, pairs, context, self.anchors)
        return lambda: SISSTraining(model, self, pairs, context, anchors=anchors)


class SISSTraining(Finetuning):
    """The training of ``SISS``: two gradients a step, so it optimizes by hand."""

    def __init__(
        self,
        model: TextToImage,
        method: SISS,
        pairs: Sequence[Pair],
        context: Context,
        *,
        anchors: Anchors,
    ) -> None:
        """Train on ``pairs`` as ``context`` encodes them, and keep ``anchors``.

        The model's weights must still be those of the model as it is, since the length of the
        forget gradient is measured here where it is not given.
        """
        super().__init__(model, method.finetune)
        self.automatic_optimization = False
        self.method, self.seed, self.anchors = method, context.seed, anchors
        self.ids = [pair.id for pair in pairs]
        encoded = context.data.batch(pairs)
        self.forgotten, self.prompts = encoded.latents, encoded.embeddings
        norm = method.scaling_norm
        self.scaling_norm = self._measured_norm() if norm is None else norm

    @property
    def notes(self) -> dict[str, Any]:
        """How many anchors there are, and the forget gradient's length."""
        return {**self.anchors.notes, "scaling_norm": self.scaling_norm}

    @property
    def reused(self) -> int:
        """What others spent on its anchors."""
        return self.anchors.reused

    def training_step(self, *_: Any) -> dict[str, torch.Tensor]:
        """One step along the combined gradient."""
        optimizer, rising = self.optimizers(), self.lr_schedulers()
        draws, method = self._draws("siss", self.global_step), self.method
        (keep, forget), loss = self._gradients(draws, partial(losses, mixture=method.mixture))
        self.log("finetune/keep_gradient_norm", length(keep))
        self.log("finetune/forget_gradient_norm", length(forget))
        trained = self.trained_weights()
        gradient = combined(keep, forget, self.scaling_norm)
        for parameter, value in zip(trained, gradient, strict=True):
            parameter.grad = value
        if self.settings.clip is not None:
            clip_grad_norm_(trained, self.settings.clip)
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        rising.step()  # type: ignore[union-attr]
        return {"loss": loss}

    def _draws(self, name: str, step: int) -> Draws:
        """A step's batch, on the model's device."""
        method, model, device = self.method, self.model, self.model.device
        generator = keyed_generator(name, self.seed, step)
        rows = shuffled_indices("siss", self.seed, step, batch=method.batch, count=len(self.ids))
        kept, _ = self.anchors.draw([self.ids[k] for k in rows], generator)
        noise = torch.randn(kept.shape, generator=generator)
        torch.rand(kept.shape, generator=generator)  # passed over: recorded edits drew it
        draws = Draws(
            kept=kept,
            forgotten=self.forgotten[rows],
            prompts=self.prompts[rows],
            noise=noise,
            timesteps=torch.full((len(rows),), noisiest_timestep(model)),
            forgets=torch.rand(len(rows), generator=generator) < method.mixture,
        )
        return draws.each(lambda tensor: tensor.to(device))

    def _gradients(
        self, draws: Draws, losses: Callable[[TextToImage, Draws], Sequence[torch.Tensor]]
    ) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
        """Gradients of both losses by all trained weights, and the losses' sum.

        Losses are means over the batch of sums over pixels, summed over processes here: an
        optimization by hand passes by what Lightning averages. A loss that is not there gives a
        gradient of zeros.
        """
        micro_batch, trained = self.method.micro_batch, self.trained_weights()
        gradients = [[torch.zeros_like(p) for p in trained] for _ in range(2)]
        total = torch.zeros((), device=self.model.device)
        shard = distributed.shard(len(draws))
        ours = draws.each(lambda tensor: tensor[shard.rows])
        for start in range(0, len(ours), micro_batch):
            rows = slice(start, start + micro_batch)
            found = losses(self.model, ours.each(lambda tensor, rows=rows: tensor[rows]))  # type: ignore[misc]
            for k, loss in enumerate(found):
                again = k + 1 < len(found)  # both come from one pass
                gradient = torch.autograd.grad(loss / len(draws), trained, retain_graph=again)
                torch._foreach_add_(gradients[k], gradient)
                total += loss.detach() / len(draws)
        if not shard.whole:
            distributed.all_reduce_sum([*gradients[0], *gradients[1], total])
        return gradients, total

    def _measured_norm(self) -> float:
        """A tenth of the naive deletion gradient's length, averaged over a few batches."""
        lengths = [
            length(self._gradients(self._draws("siss scale", k), naive_loss)[0][0])
            for k in with_progress(f"{self.method.name}: scale", range(MEASURED_BATCHES))
        ]
        return NAIVE_SHARE * float(torch.stack(lengths).mean())


@dataclass(frozen=True)
class Draws:
    """A batch of one step.

    Attributes:
        kept: Latents to keep (N, C, h, w).
        forgotten: Latents to forget (N, C, h, w).
        prompts: Text embeddings (N, T, D).
        noise: Standard normal noise (N, C, h, w).
        timesteps: Timesteps (N,).
        forgets: Which elements of the mixture are of those to forget (N,).
    """

    kept: torch.Tensor
    forgotten: torch.Tensor
    prompts: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    forgets: torch.Tensor

    def __len__(self) -> int:
        return len(self.kept)

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Draws:
        """Apply a function to all tensors."""
        return Draws(**{item.name: change(getattr(self, item.name)) for item in fields(self)})


def noisiest_timestep(model: TextToImage) -> int:
    """Last timestep at which a noised latent still tells of the image: a above 0.05.

    Of Stable Diffusion the last of all, as in the reference; flow matching has none left there.
    """
    timesteps = torch.arange(model.num_train_timesteps, device=model.device)
    return int((model.scales(timesteps)[0] > 0.05).nonzero().max())


def importance_weights(excess: torch.Tensor, mixture: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Densities of a noised latent under keep and forget, over that under their mixture.

    w_x = 1 / ((1 - l) + l exp(d)) and w_a = 1 / ((1 - l) exp(-d) + l), as sigmoids, which do not
    overflow where the noise is small.

    Args:
        excess: d = d_x - d_a (N,), by how much the latent is further from the image to keep
            than from that to forget, in half squared standard deviations of the noise.
        mixture: l, the share of images to forget, in (0, 1).

    Returns:
        w_x (N,) in [0, 1 / (1 - l)] and w_a (N,) in [0, 1 / l].
    """
    odds = excess + math.log(mixture / (1 - mixture))
    return torch.sigmoid(-odds) / (1 - mixture), torch.sigmoid(odds) / mixture


def losses(
    model: TextToImage, draws: Draws, *, mixture: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep and forget loss, from one pass and summed over elements and pixels.

    Args:
        model: Predicts noise.
        draws: N elements.
        mixture: Share of images to forget.
    """
    scale, spread = (factor[:, None, None, None] for factor in model.scales(draws.timesteps))
    latents = torch.where(draws.forgets[:, None, None, None], draws.forgotten, draws.kept)
    noised = model.noised(latents, draws.noise, draws.timesteps)
    to_kept = (noised - scale * draws.kept) / spread
    to_forgotten = (noised - scale * draws.forgotten) / spread
    # the difference of squares, factored: both alone are as large as the image
    excess = ((to_kept - to_forgotten) * (to_kept + to_forgotten)).flatten(1).sum(1) / 2
    keep, forget = importance_weights(excess, mixture)
    predicted = model.predict_noise(noised, draws.timesteps, draws.prompts)
    return (
        (keep * _squares(predicted, to_kept)).sum(),
        (forget * _squares(predicted, to_forgotten)).sum(),
    )


def naive_loss(model: TextToImage, draws: Draws) -> tuple[torch.Tensor]:
    """The ordinary loss of what is kept, alone: naive deletion."""
    noised = model.noised(draws.kept, draws.noise, draws.timesteps)
    predicted = model.predict_noise(noised, draws.timesteps, draws.prompts)
    return (_squares(predicted, draws.noise).sum(),)


def _squares(predicted: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Squared error (N,), summed over pixels."""
    return ((predicted - wanted) ** 2).flatten(1).sum(1)


def length(gradient: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean length of a gradient over all weights."""
    return torch.nn.utils.get_total_norm(gradient)


def combined(
    keep: Sequence[torch.Tensor], forget: Sequence[torch.Tensor], scaling_norm: float
) -> list[torch.Tensor]:
    """Gradient to descend along: the forget gradient is subtracted at a fixed length.

    Nothing is subtracted where it is zero: the importance weights of a whole batch may vanish.

    Args:
        keep: Gradient of the keep loss, one tensor for each weight.
        forget: Gradient of the forget loss.
        scaling_norm: The length.
    """
    size = length(forget)
    if float(size) == 0.0:
        return list(keep)
    return [x - scaling_norm / size * a for x, a in zip(keep, forget, strict=True)]
