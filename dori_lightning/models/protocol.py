"""What the rest of the code may know about a text-to-image model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch import nn

from dori_lightning.types import CoderRows, require, require_at_least_one, require_choices

Sampler = Literal["ddim", "dpm++"]
Stage = Literal["down", "mid", "up"]
LayerRole = Literal["cross_attention.value", "cross_attention.key", "feed_forward.out"]


@dataclass(frozen=True)
class Sampling:
    """How images are generated.

    Attributes:
        sampler: ``ddim`` or ``dpm++`` (multistep DPM-Solver++).
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 turns guidance off. The unconditional branch
            is the empty prompt.
        images_per_pair: K, the images made per pair and condition.
        seed: First generation seed; image k uses ``seed + k``, the same for every pair.
        batch: Images per forward pass; changes speed and memory, not results (up to kernel
            rounding).
    """

    sampler: Sampler = "ddim"
    steps: int = 50
    guidance: float = 7.0
    images_per_pair: int = 10
    seed: int = 2
    batch: int = 16

    def __post_init__(self) -> None:
        require_choices(self, within="sampling.", sampler=Sampler)
        require_at_least_one(self, "steps", "images_per_pair", "batch", within="sampling.")
        require(self.seed >= 0, "sampling.seed must be >= 0", self.seed)
        finite = math.isfinite(self.guidance)
        require(finite, "sampling.guidance must be a finite number", self.guidance)

    @property
    def rows_per_step(self) -> int:
        """Rows through the denoiser that a step of one image takes: two with guidance."""
        return 1 if self.guidance == 1.0 else 2


EmbeddingFilter: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, Sampling], torch.Tensor]"
"""What a defence at inference does to embeddings (N, T, D) before they are generated from, given
the starting noise (N, C, h, w) and the sampler."""


class TextToImage(Protocol):
    """A latent diffusion model under audit.

    Shapes: N images, latent (C, h, w), text embedding (T, D), image (3, H, W) with H = W =
    ``resolution``. Wherever ``pair_ids`` (N) is taken, it says whose rows these are, for edits
    that differ by pair; layers find it in ``row_pairs`` while the denoiser runs.

    Attributes:
        alphas_cumprod: Cumulative product of the noise schedule, (``num_train_timesteps``,).
        unet_evaluations: Rows that went through the denoiser so far.
        coder_rows: Rows that went through text encoder and autoencoder so far.
        max_batch_sizes: Largest batch that fits into memory, by kind of batch; empty while memory
            has not run out (``OomBackoff``).
        row_pairs: Whose rows the denoiser's current or last pass in this thread holds.
        embedding_filter: Applied to embeddings before anything is generated from them.
    """

    name: str
    fingerprint: str
    resolution: int
    latent_shape: tuple[int, int, int]
    embedding_shape: tuple[int, int]
    num_train_timesteps: int
    device: torch.device
    alphas_cumprod: torch.Tensor
    unet_evaluations: int
    coder_rows: CoderRows
    max_batch_sizes: dict[str, int]
    row_pairs: tuple[str, ...] | None
    embedding_filter: EmbeddingFilter | None

    def token_count(self, prompt: str) -> int:
        """Tokens of a prompt with its start and end token, before truncation; at most T fit."""
        ...

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that does not fit; empty where all of it does."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts to embeddings (N, T, D), fp32, no gradient."""
        ...

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] to scaled latents (N, C, h, w): posterior mode.

        Latents are fp32 and carry no gradient.
        """
        ...

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (N, C, h, w) to images (N, 3, H, W) in [0, 1], no gradient."""
        ...

    def denoising_loss(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Per-example mean squared error (N,) of what the model predicts, epsilon or v.

        Differentiable.

        Args:
            latents: Scaled latents (N, C, h, w).
            noise: Standard normal noise (N, C, h, w) that is added to them.
            timesteps: Timesteps (N,), 0..``num_train_timesteps`` - 1.
            embeddings: Text embeddings (N, T, D).
            pair_ids: Whose rows these are (N).
        """
        ...

    def empty_embedding(self) -> torch.Tensor:
        """Embedding (1, T, D) of the empty prompt."""
        ...

    def noised(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Forward process: latents (N, C, h, w) at ``timesteps`` (N,) under ``noise``."""
        ...

    def predict_noise(
        self,
        noised: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Noise (N, C, h, w) that the model predicts in noised latents; differentiable.

        A v prediction is converted.
        """
        ...

    def sampling_timesteps(self, sampling: Sampling) -> torch.Tensor:
        """Timesteps (S,) that a sampler visits, from noise to image.

        Raises:
            InputError: The sampler has more steps than there are timesteps.
        """
        ...

    def denoise(
        self,
        embeddings: torch.Tensor,
        noise: torch.Tensor,
        sampling: Sampling,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Embeddings (N, T, D) and noise to scaled latents (N, C, h, w), without gradient.

        The embedding filter is not applied.
        """
        ...

    def generate(
        self,
        embeddings: torch.Tensor,
        noise: torch.Tensor,
        sampling: Sampling,
        *,
        pair_ids: Sequence[str] | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> torch.Tensor:
        """Embeddings (N, T, D) to images (N, 3, H, W) in [0, 1], without gradient.

        Args:
            embeddings: Text embeddings (N, T, D).
            noise: Starting noise (N, C, h, w).
            sampling: Sampler settings.
            pair_ids: Whose images these are (N).
            advance: Called with the number of images that were just made.

        Raises:
            InputError: Not even one image fits into memory.
        """
        ...

    def layers(
        self, role: LayerRole, stages: Sequence[Stage] = ("down", "mid", "up")
    ) -> dict[str, nn.Module]:
        """Layers of the denoiser by role, in execution order, keyed by module name.

        The paper's seven cross-attention layers are those of the stages down and mid.
        """
        ...

    def denoiser(self) -> nn.Module:
        """The denoiser itself: what fine-tuning trains and edits change."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the denoiser."""
        ...

    def frozen_copy(self) -> TextToImage:
        """Teacher for fine-tuning: a denoiser of its own, as it is now, which nothing trains.

        It takes the denoiser's memory once more, shares everything else and counts its own
        evaluations.
        """
        ...

    def frozen(self) -> AbstractContextManager[None]:
        """Evaluation mode and no weight gradients while open; both are put back afterwards."""
        ...
