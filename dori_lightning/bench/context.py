"""What the package's own attack, sampler and mitigations are measured on: a checkpoint's pairs."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from dori_lightning.mitigations.base import Context
from dori_lightning.models.generation import (
    GenerationRequest,
    generate_images,
    image_seeds,
    load_images,
)
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import Pair


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
