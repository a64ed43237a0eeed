"""What is measured: a model with pairs, and a model of Stable Diffusion 1.4's shape without."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dori_lightning.attacks.draws import keyed_generator, random_embedding
from dori_lightning.bench.attack_loops import AttackTask
from dori_lightning.metrics.statistics import wilson_interval

if TYPE_CHECKING:
    from pathlib import Path

    import lightning.pytorch as L

    from dori_lightning.metrics.measure import Originals
    from dori_lightning.mitigations.base import Workshop
    from dori_lightning.models.protocol import Sampling
    from dori_lightning.models.stable_diffusion import StableDiffusion
    from dori_lightning.types import Pair

__all__ = ["Subject", "compiler", "random_task", "rate_of"]


@dataclass(frozen=True)
class Subject:
    """A model with the pairs it is asked for.

    Attributes:
        model: The checkpoint.
        pairs: Pairs of kind vm.
        workshop: Encoded pairs, their originals, the sampler; what mitigations work with.
        trainer: Runs the package's attack.
        folder: Where the package's attack may write; emptied between runs.
        threshold: Similarity above which a picture is a copy.
        seed: Run seed.
    """

    model: StableDiffusion
    pairs: tuple[Pair, ...]
    workshop: Workshop
    trainer: L.Trainer
    folder: Path
    threshold: float
    seed: int

    @property
    def originals(self) -> Originals:
        """The pairs' pictures."""
        return self.workshop.originals

    @property
    def sampling(self) -> Sampling:
        """How pictures are generated."""
        return self.workshop.sampling

    def task(self, pairs: int, *, steps: int, noise_batch: int) -> AttackTask:
        """The attack on the first pairs from random embeddings."""
        chosen = self.pairs[:pairs]
        batch = self.workshop.data.batch(chosen)
        places = [self.originals.places[pair.id] for pair in chosen]
        initial = [
            random_embedding(self.seed, pair.id, 0, self.model.embedding_shape) for pair in chosen
        ]
        return AttackTask(
            ids=tuple(pair.id for pair in chosen),
            images=self.originals.images[places],
            latents=batch.latents,
            initial=torch.stack(initial),
            steps=steps,
            noise_batch=noise_batch,
            seed=self.seed,
        )

    def scratch(self, name: str) -> Path:
        """An empty folder."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def memorization(
        self, embeddings: torch.Tensor, sampling: Sampling | None = None
    ) -> tuple[bool, ...]:
        """Which of the first N pairs' pictures embeddings (N, T, D) bring back."""
        sampling = sampling or self.sampling
        pictures = sampling.images_per_pair
        noise = torch.stack(
            [
                torch.randn(
                    self.model.latent_shape,
                    generator=torch.Generator("cpu").manual_seed(sampling.seed + k),
                )
                for k in range(pictures)
            ]
        )
        images = self.model.generate(
            embeddings.repeat_interleave(pictures, 0),
            noise.repeat(len(embeddings), 1, 1, 1),
            sampling,
            pair_ids=[p.id for p in self.pairs[: len(embeddings)] for _ in range(pictures)],
        )
        decider = self.originals.measures.decider
        return tuple(
            bool(
                self.originals.measure(pair, own.cpu()).similarity[decider].max() >= self.threshold
            )
            for pair, own in zip(self.pairs, torch.split(images, pictures), strict=False)
        )


def rate_of(hits: tuple[bool, ...]) -> dict[str, Any]:
    """Memorization rate with its interval."""
    low, high = wilson_interval(sum(hits), len(hits))
    return {"hits": sum(hits), "n": len(hits), "mr": sum(hits) / len(hits), "ci95": [low, high]}


def random_task(
    model: StableDiffusion, *, pairs: int, steps: int, noise_batch: int, seed: int
) -> AttackTask:
    """An attack on noise, for a model that knows no pictures."""
    generator = keyed_generator("bench", seed)
    side = model.resolution
    return AttackTask(
        ids=tuple(f"noise{k}" for k in range(pairs)),
        images=torch.rand(pairs, 3, side, side, generator=generator),
        latents=torch.randn(pairs, *model.latent_shape, generator=generator),
        initial=torch.randn(pairs, *model.embedding_shape, generator=generator),
        steps=steps,
        noise_batch=noise_batch,
        seed=seed,
    )


def compiler() -> str:
    """Why nothing can be compiled here for the CPU; empty where it can."""
    found = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return "" if found else "no C++ compiler (g++, clang++) on this machine"
