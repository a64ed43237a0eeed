"""What a measurement of speed compares: on what, how often, and at which sizes."""

import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from dori_lightning.mitigations.base import Context
from dori_lightning.models.generation import (
    GenerationRequest,
    generate_images,
    image_seeds,
    load_images,
)
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import InputError, Pair

FAMILIES = ("attack", "sampling", "nemo", "wanda", "finetuning", "audit", "sd14")
"""What can be measured, in the order in which it is."""


@dataclass(frozen=True)
class ShapeSettings:
    """The attack on Stable Diffusion 1.4's UNet with random weights.

    Attributes:
        latent: Side of a latent; 64 is the checkpoint's own, 512 pixels.
        pairs: Pairs attacked.
        steps: Steps of the attack.
        noise_batch: Noise samples of a step.
        repeats: Timed rounds.
        dtype: ``bf16``: weights in it. ``fp32``: weights in it, autocast to bf16 where there is a
            GPU, as a loaded checkpoint has them.
        compile: Whether the compiled loop is measured: minutes of warm-up on a CPU.
    """

    latent: int = 64
    pairs: int = 8
    steps: int = 1
    noise_batch: int = 8
    repeats: int = 3
    dtype: str = "bf16"
    compile: bool = False

    def __post_init__(self) -> None:
        _check_counts(self, "task.sd14")
        if self.latent < 8 or self.latent % 8:
            raise InputError(f"task.sd14.latent must be a multiple of 8, got {self.latent}")
        if self.dtype not in ("bf16", "fp32"):
            raise InputError(f"task.sd14.dtype must be bf16 or fp32, got {self.dtype!r}")


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often.

    Attributes:
        rows: Families to measure, some of `FAMILIES`, in this order.
        repeats: Timed rounds.
        pairs: Pairs of the attack.
        steps: Its steps; each takes the same time.
        noise_batch: Noise samples of a step.
        compile: Whether the compiled loop is measured.
        sampling_pairs: Pairs that images are generated for.
        nemo_pairs: Pairs whose neurons NeMo searches.
        wanda_pairs: Pairs that Wanda makes masks for.
        finetuning_pairs: Pairs that adversarial fine-tuning forgets.
        finetuning_updates: Its optimizer steps after one search.
        audit_pairs: Pairs of the whole audit.
        audit_steps: Steps of its attack.
        threshold: Similarity by the primary descriptor from which an image is a copy, for the
            audit, which has no controls to calibrate with.
        sd14: The attack on Stable Diffusion 1.4's shape.
    """

    rows: tuple[str, ...] = FAMILIES
    repeats: int = 5
    pairs: int = 16
    steps: int = 4
    noise_batch: int = 8
    compile: bool = True
    sampling_pairs: int = 8
    nemo_pairs: int = 8
    wanda_pairs: int = 8
    finetuning_pairs: int = 8
    finetuning_updates: int = 10
    audit_pairs: int = 8
    audit_steps: int = 10
    threshold: float = 0.62
    sd14: ShapeSettings = field(default_factory=ShapeSettings)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        unknown = [name for name in self.rows if name not in FAMILIES]
        if unknown or not self.rows or len(set(self.rows)) != len(self.rows):
            raise InputError(
                f"task.rows must be different ones of {', '.join(FAMILIES)}, "
                f"got {', '.join(map(str, self.rows)) or 'none'}"
            )
        _check_counts(self, "task")

    @property
    def most_pairs(self) -> int:
        """How many pairs of kind vm the list must have."""
        parts = (self.sampling_pairs, self.nemo_pairs, self.wanda_pairs, self.finetuning_pairs)
        return max(self.pairs, *parts)


def _check_counts(settings: Any, where: str) -> None:
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.type is int and value < 1:
            raise InputError(f"{where}.{item.name} must be >= 1, got {value}")


@dataclass(frozen=True)
class BenchContext:
    """A checkpoint with its pairs.

    Attributes:
        model: The checkpoint.
        pairs: Pairs of kind vm.
        context: What mitigations work with: encoded pairs, reference images, sampler, seed.
        folder: Where the package's attack and sampler write; emptied between runs.
    """

    model: StableDiffusion
    pairs: tuple[Pair, ...]
    context: Context
    folder: Path

    def scratch(self, name: str) -> Path:
        """An empty folder."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def generate(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Images from the first pairs' embeddings (N, T, D), in batches and files, as in an audit.

        Returns:
            K images of each pair (N, K, 3, H, W) in [0, 1].
        """
        sampling, folder = self.context.sampling, self.scratch("images")
        requests = [
            GenerationRequest(folder / pair.id, embedding, pair.id)
            for pair, embedding in zip(self.pairs, embeddings, strict=False)
        ]
        generate_images(self.model, requests, sampling)
        seeds = image_seeds(sampling)
        return torch.stack([load_images(request.folder, seeds) for request in requests])
