"""Watch whether blocked neurons keep the picture from being drawn: the question itself.

Between the noise differences of the paper, which do not tell on small models, and the denoising
loss, which falls to the empty prompt's level long before guided sampling stops drawing the
picture, this asks what an audit asks. It costs a whole sampling for every question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dori_lightning.mitigations.nemo_measure import Watched
from dori_lightning.mitigations.nemo_passes import Part
from dori_lightning.models.pictures import generation_noise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dori_lightning.metrics.measure import Originals
    from dori_lightning.mitigations.base import Workshop
    from dori_lightning.mitigations.nemo_passes import BlockedPasses
    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.pairs.datamodule import Encoded

__all__ = ["drawing", "watch_pictures"]

FIRST_SEED = 60_000
"""Generation seeds of the search begin here, far from those of an audit's pictures."""


def drawing(model: TextToImage, workshop: Workshop) -> Callable[..., torch.Tensor]:
    """Forward pass from starting noise and embeddings to pictures (N, 3, H, W) in [0, 1]."""

    def draw(
        noise: torch.Tensor, embeddings: torch.Tensor, *, pair_ids: Sequence[str]
    ) -> torch.Tensor:
        return model.decode_latents(model.denoise(embeddings, noise, workshop.sampling, pair_ids))

    return draw


def watch_pictures(
    passes: BlockedPasses,
    pairs: Mapping[str, Encoded],
    model: TextToImage,
    workshop: Workshop,
    *,
    samples: int,
    limit: float,
) -> dict[str, Watched]:
    """Watch each pair's most similar picture by the deciding descriptor.

    Args:
        passes: Of ``drawing``.
        pairs: Pair id to embedding; ids must be pairs of the workshop's originals.
        model: Whose latents have which shape.
        workshop: Gives originals and the sampler.
        samples: Pictures S of each question.
        limit: Similarity above which the unblocked model counts as reproducing the picture.
    """
    noise = torch.stack(
        [generation_noise(FIRST_SEED + k, model.latent_shape) for k in range(samples)]
    ).to(model.device)
    parts = [
        Part(pair, (noise, encoded.embedding.to(model.device).expand(samples, -1, -1)))
        for pair, encoded in pairs.items()
    ]
    guided = 1 if workshop.sampling.guidance == 1.0 else 2
    found = {}
    for part, pictures in zip(parts, passes.run(parts), strict=True):
        similarity = _Closest(workshop.originals, part.pair)
        unblocked = similarity(pictures)
        found[part.pair] = Watched(
            part.inputs,
            similarity,
            unblocked > limit,
            {"similarity_unblocked": unblocked},
            evaluations=guided * workshop.sampling.steps,
        )
    return found


@dataclass(frozen=True, eq=False)
class _Closest:
    """Largest similarity of pictures (S, 3, H, W) with a pair's original."""

    originals: Originals
    pair: str

    def __call__(self, pictures: torch.Tensor) -> float:
        pair = self.originals.pairs[self.originals.places[self.pair]]
        return float(self.originals.similarities(pictures.cpu(), [pair]).max())
