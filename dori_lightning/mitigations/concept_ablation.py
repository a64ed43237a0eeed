"""Train a memorized caption to mean what ordinary prompts near it mean.

Reference: Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., 2023),
https://arxiv.org/abs/2303.13516, the recipe for memorized images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

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
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Pair


@dataclass(frozen=True)
class ConceptAblation(FinetunedMitigation):
    """Concept Ablation of memorized captions, all weights of the denoiser.

    The published method makes one model per image; an audit of N pairs would need N models, so
    one model is trained on the captions of all pairs in turn. How the DoRI paper ran it is
    unknown, as are its settings. The defaults are the published ones: the learning rate is 5e-7
    per image of a batch, times 4.

    Attributes:
        name: How reports call it.
        anchors: How ordinary prompts and images near a memorized one are found.
        steps: Optimizer steps in all.
        batch: Anchors of a step.
        prior_weight: Weight of the ordinary loss on the anchors with their own prompts, which
            keeps what those mean.
        finetune: Optimizer settings.
    """

    name: str
    anchors: AnchorSettings = field(default_factory=AnchorSettings)
    steps: int = 400
    batch: int = 4
    prior_weight: float = 1.0
    finetune: FinetuneSettings = field(default_factory=lambda: FinetuneSettings(lr=2e-6))

    def __post_init__(self) -> None:
        require_at_least_one(self, "steps", "batch")
        require(self.prior_weight >= 0, "prior_weight must be >= 0", self.prior_weight)

    def estimate_cost(self, sampling: Sampling, pairs: int) -> CostEstimate:
        """Estimate what finding the edit takes for a number of pairs to forget."""
        return self.anchors.estimate_cost(sampling, pairs, training=2 * self.steps * self.batch)

    def training(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> Callable[[], ConceptAblationTraining]:
        """Find anchors with the model as it is, then train."""
        anchors = find_anchors(model, pairs, context, self.anchors)
        return lambda: ConceptAblationTraining(model, self, pairs, context, anchors=anchors)


class ConceptAblationTraining(Finetuning):
    """The training of ``ConceptAblation``."""

    def __init__(
        self,
        model: TextToImage,
        method: ConceptAblation,
        pairs: Sequence[Pair],
        context: Context,
        *,
        anchors: Anchors,
    ) -> None:
        """Train on captions and anchors of ``pairs``, whose prompts ``context`` has encoded."""
        super().__init__(model, method.finetune)
        self.method, self.seed, self.anchors = method, context.seed, anchors
        prompts = context.data.batch(pairs).embeddings
        # every prompt that brings an image back, with its pair
        self.targets = [
            (pair.id, row)
            for k, pair in enumerate(pairs)
            for row in (prompts[k], *anchors.targets[pair.id])
        ]

    @property
    def notes(self) -> dict[str, Any]:
        """How many anchors and targets there are."""
        return self.anchors.notes

    @property
    def reused(self) -> int:
        """What others spent on its anchors."""
        return self.anchors.reused

    def training_step(self, *_: Any) -> torch.Tensor:
        """Loss between captions' and anchors' predictions, plus the anchors' ordinary loss.

        The anchor prediction is the current model's, without gradient. It is the same number as
        the one that the ordinary loss needs with gradient, so one pass gives both.
        """
        method, model, step = self.method, self.model, self.global_step
        device = model.device
        generator = keyed_generator("concept_ablation", self.seed, step)
        rows = shuffled_indices(
            "concept_ablation", self.seed, step, batch=method.batch, count=len(self.targets)
        )
        ids = [self.targets[k][0] for k in rows]
        captions = torch.stack([self.targets[k][1] for k in rows])
        latents, prompts = self.anchors.draw(ids, generator)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(model.num_train_timesteps, (len(ids),), generator=generator)
        shard = distributed.shard(len(ids))
        captions, prompts = captions[shard.rows], prompts[shard.rows]
        noise, timesteps = noise[shard.rows].to(device), timesteps[shard.rows].to(device)
        noised = model.noised(latents[shard.rows].to(device), noise, timesteps)
        predicted = model.predict_noise(
            torch.cat([noised, noised]),
            torch.cat([timesteps, timesteps]),
            torch.cat([captions, prompts]).to(device),
        )
        caption, anchor = predicted.chunk(2)
        ablation = shard.weight * F.mse_loss(caption, anchor.detach())
        prior = shard.weight * F.mse_loss(anchor, noise)
        self.log("finetune/ablation_loss", ablation)
        self.log("finetune/prior_loss", prior)
        return ablation + method.prior_weight * prior
