"""Erase a caption by training the model to predict the opposite of what the caption adds.

Reference: Erasing Concepts from Diffusion Models (Gandikota et al., 2023),
https://arxiv.org/abs/2303.07345. The concept of a memorized image is its whole caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch.nn import functional as F

from dori_lightning.mitigations.base import (
    Context,
    CostEstimate,
    Evaluations,
    require,
    require_at_least_one,
    require_choices,
)
from dori_lightning.mitigations.finetuning import (
    FinetunedMitigation,
    FinetuneSettings,
    Finetuning,
    shuffled_indices,
)
from dori_lightning.models.protocol import Sampler, Sampling, TextToImage
from dori_lightning.runtime import distributed
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Pair

Variant = Literal["x", "u"]


@dataclass(frozen=True)
class ESD(FinetunedMitigation):
    """Erased Stable Diffusion.

    The published method makes one model per concept; an audit of N pairs would need N models, so
    one model is trained on the captions of all pairs in turn. How the DoRI paper ran it is
    unknown, as are its settings. The defaults are the published ones of the first release (Adam:
    AdamW without weight decay; no clipping).

    A frozen copy of the denoiser takes its memory once more.

    Attributes:
        name: How reports call it.
        variant: ``x`` trains all weights through which text enters, ``u`` all others but time
            embedding and output.
        steps: Optimizer steps in all.
        batch: Captions of a step.
        eta: How far beyond the unconditional prediction the target lies, away from the caption's.
        guidance: Guidance scale of the partial sampling, which the model in training does, as in
            the first release.
        sampling_steps: Steps of the sampler that is stopped on its way; None for the run's.
        finetune: Optimizer settings.
    """

    name: str
    variant: Variant = "x"
    steps: int = 1000
    batch: int = 1
    eta: float = 1.0
    guidance: float = 3.0
    sampling_steps: int | None = 50
    finetune: FinetuneSettings = field(
        default_factory=lambda: FinetuneSettings(lr=1e-5, weight_decay=0.0, clip=None)
    )

    def __post_init__(self) -> None:
        require_choices(self, variant=Variant)
        require_at_least_one(self, "steps", "batch")
        require(self.eta > 0, "eta must be > 0", self.eta)
        visited = self.sampling_steps
        require(visited is None or visited >= 1, "sampling_steps must be >= 1 or null", visited)

    def estimate_cost(self, sampling: Sampling, pairs: int) -> CostEstimate:
        """Estimate what finding the edit takes for a number of pairs to forget."""
        del pairs
        rows = self.steps * self.batch
        visited = self.sampling_steps or sampling.steps
        # on average the sampler is stopped half way; then the teacher predicts with and without
        partly = rows * (visited - 1)
        return CostEstimate(
            Evaluations(forward=partly + 2 * rows, training=rows),
            stored_weights={"x": 0.051, "u": 0.946}[self.variant],
        )

    def trains(self, model: TextToImage, name: str) -> bool:
        """Whether the variant trains a parameter.

        In Stable Diffusion text enters by cross-attention, ``attn2``. ``u`` leaves that out, and
        ``time_embedding`` and the output ``conv_norm_out`` and ``conv_out`` (first release:
        ``attn2``, ``time_embed``, ``out.``); it does train the projections ``time_emb_proj`` of
        the blocks, as that does.
        """
        if self.variant == "x":
            return model.is_text_weight(name)
        return not (model.is_text_weight(name) or model.is_outer_weight(name))

    def training(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> Callable[[], ESDTraining]:
        """Train on the pairs' captions; their images are not used."""
        return lambda: ESDTraining(model, self, pairs, context)


class ESDTraining(Finetuning):
    """The training of ``ESD``."""

    def __init__(
        self, model: TextToImage, method: ESD, pairs: Sequence[Pair], context: Context
    ) -> None:
        """Train on the prompts of ``pairs``, which ``context`` has encoded."""
        super().__init__(model, method.finetune, trained=partial(method.trains, model))
        self.method, self.seed = method, context.seed
        self.prompts = context.data.batch(pairs).embeddings
        # a list hides the teacher from this module's state
        self._teacher = [model.frozen_copy()]
        steps = method.sampling_steps or context.sampling.steps
        sampler: Sampler = "ddim" if "ddim" in model.samplers else model.samplers[0]
        sampling = replace(context.sampling, sampler=sampler, steps=steps)
        self.visited = model.sampling_timesteps(sampling).cpu()

    def training_step(self, *_: Any) -> torch.Tensor:
        """Mean squared error between the prediction and ESD's target."""
        method, model, teacher = self.method, self.model, self._teacher[0]
        step, device = self.global_step, model.device
        generator = keyed_generator("esd", self.seed, step)
        rows = shuffled_indices(
            "esd", self.seed, step, batch=method.batch, count=len(self.prompts)
        )
        prompts = self.prompts[rows].to(device)
        noise = torch.randn((len(rows), *model.latent_shape), generator=generator)
        reached = torch.randint(len(self.visited), (len(rows),), generator=generator)
        timesteps = self._timesteps(reached, generator).to(device)
        shard = distributed.shard(len(rows))
        prompts, noise = prompts[shard.rows], noise[shard.rows]
        reached, timesteps = reached[shard.rows], timesteps[shard.rows]
        with torch.no_grad():
            latents = partly_denoised(
                model,
                prompts,
                noise.to(device),
                timesteps=self.visited.to(device),
                reached=reached,
                guidance=method.guidance,
            )
            without, with_prompt = _both(teacher, latents, timesteps, prompts)
            target = without - method.eta * (with_prompt - without)
            # the teacher counts for itself
            model.unet_evaluations += teacher.unet_evaluations
            teacher.unet_evaluations = 0
        loss = shard.weight * F.mse_loss(model.predict_noise(latents, timesteps, prompts), target)
        self.log("finetune/loss", loss)
        return loss

    def _timesteps(self, reached: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Timesteps (N,) between where the sampler stopped and the step before.

        The first release draws from the same interval, but is one sampler step further on: it
        skips the noisiest step and stops after a step where its count says before.
        """
        low = self.visited[reached]
        before = torch.cat(
            [torch.tensor([self.model.num_train_timesteps]), self.visited[:-1].long()]
        )
        drawn = torch.rand(len(reached), generator=generator)
        return (low + (drawn * (before[reached] - low)).floor()).long()


def _both(
    model: TextToImage, latents: torch.Tensor, timesteps: torch.Tensor, prompts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (N, C, h, w) predicted without and with the prompts, in one pass."""
    empty = model.empty_embedding().expand_as(prompts)
    both = model.predict_noise(
        torch.cat([latents, latents]),
        torch.cat([timesteps, timesteps]),
        torch.cat([empty, prompts]),
    )
    without, with_prompt = both.chunk(2)
    return without, with_prompt


@torch.no_grad()
def partly_denoised(
    model: TextToImage,
    prompts: torch.Tensor,
    noise: torch.Tensor,
    *,
    timesteps: torch.Tensor,
    reached: torch.Tensor,
    guidance: float,
) -> torch.Tensor:
    """Run a guided DDIM sampler, each row as far as it says; for flow matching it is Euler's.

    Args:
        model: The model that is sampled.
        prompts: Embeddings (N, T, D).
        noise: Starting noise (N, C, h, w), at ``timesteps[0]``.
        timesteps: Timesteps that the sampler visits (S,), falling.
        reached: Steps of each row (N,), 0..S - 1, on the CPU.
        guidance: Guidance scale.

    Returns:
        Latents (N, C, h, w), row n at the noise level of ``timesteps[reached[n]]``.
    """
    latents = noise.clone()
    for k in range(int(reached.max())):
        rows = (reached > k).nonzero()[:, 0].to(latents.device)
        x, t = latents[rows], timesteps[k].expand(len(rows))
        clean, predicted = model.predict_clean_and_noise(x, t, prompts[rows], guidance=guidance)
        signal, spread = model.scales(timesteps[k + 1])
        latents[rows] = signal * clean + spread * predicted
    return latents
