"""How much of a pair's memorization is left under blocked neurons: ways to ask the model.

``noise_ssim`` is the published one. It needs the prompt alone: where the prompt is memorized, the
noises predicted from different latents resemble each other, and blocking counts as successful
where the noise no longer resembles the unblocked one's.

``denoising_loss`` is ours, for models whose noises do not tell, such as small ones. It reads the
pair's picture, as an auditor may: how well the prompt still helps to denoise that picture, from 1
(as unblocked) to 0 (as the empty prompt does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dori_lightning.attacks.draws import keyed_generator
from dori_lightning.metrics.multiscale import noise_difference, pairwise_similarity
from dori_lightning.mitigations.nemo_passes import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from dori_lightning.metrics.multiscale import MultiScaleSimilarity
    from dori_lightning.mitigations.nemo_passes import BlockedPasses
    from dori_lightning.mitigations.nemo_search import Probe
    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.pairs.datamodule import Encoded

__all__ = ["Watched", "measurement", "pairwise_maxima", "watch_losses", "watch_noises"]


@dataclass(frozen=True)
class Watched:
    """A pair under watch.

    Attributes:
        inputs: What a pass takes to answer a question, each with S rows.
        similarity: From what the pass returns for these rows (S, ...) to how much memorization is
            left.
        memorized: Whether the unblocked model shows memorization at all.
        notes: What was measured on the unblocked model.
        evaluations: Rows through the denoiser that a row of a pass takes.
    """

    inputs: tuple[torch.Tensor, ...]
    similarity: Callable[[torch.Tensor], float]
    memorized: bool
    notes: Mapping[str, float]
    evaluations: int = 1


def measurement(
    passes: BlockedPasses, watched: Mapping[str, Watched]
) -> Callable[[Sequence[Probe]], list[float]]:
    """What searches ask: pair id and blocked set to how much memorization is left."""

    def measure(probes: Sequence[Probe]) -> list[float]:
        parts = [Part(p.pair, watched[p.pair].inputs, p.blocked) for p in probes]
        return [
            watched[part.pair].similarity(output)
            for part, output in zip(parts, passes.run(parts), strict=True)
        ]

    return measure


def watch_noises(
    passes: BlockedPasses,
    embeddings: Mapping[str, torch.Tensor],
    *,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    similarity: MultiScaleSimilarity,
    threshold: float,
) -> dict[str, Watched]:
    """Watch noise differences: the published measurement.

    Samples are kept that resemble another one more than ``threshold``; a prompt without any is
    not memorized, and then all are kept.

    Args:
        passes: Of ``predict_noise``.
        embeddings: Pair id to text embedding (T, D).
        latents: Starting noise (S, C, h, w), the same for every pair.
        timestep: Scalar.
        similarity: Compares noise differences.
        threshold: Similarity of two samples above which a prompt is memorized.
    """
    found = {}
    for pair, best, noises in _unblocked(passes, embeddings, latents, timestep, similarity):
        kept = best > threshold
        memorized = bool(kept.any())
        if not memorized:
            kept = torch.ones_like(kept)
        inputs = _noise_inputs(embeddings[pair], latents, timestep)
        found[pair] = Watched(
            tuple(value[kept] for value in inputs),
            _Resemblance(noises[kept], latents[kept], similarity),
            memorized,
            {"pairwise": float(best.max()), "kept": int(kept.sum())},
        )
    return found


def pairwise_maxima(
    passes: BlockedPasses,
    embeddings: torch.Tensor,
    *,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    similarity: MultiScaleSimilarity,
) -> torch.Tensor:
    """Largest similarity of two samples of each prompt, (N,): what a threshold is set from.

    Args:
        passes: Of ``predict_noise``.
        embeddings: Text embeddings (N, T, D).
        latents: Starting noise (S, C, h, w).
        timestep: Scalar.
        similarity: Compares noise differences.
    """
    named = {str(k): row for k, row in enumerate(embeddings)}
    rows = _unblocked(passes, named, latents, timestep, similarity)
    return torch.tensor([float(best.max()) for _, best, _ in rows])


def _unblocked(
    passes: BlockedPasses,
    embeddings: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    timestep: torch.Tensor,
    similarity: MultiScaleSimilarity,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Pair id, each sample's best similarity with another (S,) and noise differences."""
    parts = [Part(p, _noise_inputs(e, latents, timestep)) for p, e in embeddings.items()]
    for part, noise in zip(parts, passes.run(parts), strict=True):
        noises = noise_difference(noise, latents)
        yield part.pair, pairwise_similarity(noises, similarity).amax(1), noises


def _noise_inputs(
    embedding: torch.Tensor, latents: torch.Tensor, timestep: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    count = len(latents)
    embedding = embedding.to(latents.device)
    return latents, timestep.expand(count), embedding.expand(count, *embedding.shape)


@dataclass(frozen=True, eq=False)
class _Resemblance:
    """Largest similarity, over samples, of a noise with the unblocked one.

    Attributes:
        unblocked: Noise differences (S, C, h, w).
        latents: Where they began (S, C, h, w).
        similarity: Compares them.
    """

    unblocked: torch.Tensor
    latents: torch.Tensor
    similarity: MultiScaleSimilarity

    def __call__(self, noise: torch.Tensor) -> float:
        blocked = noise_difference(noise, self.latents)
        return float(self.similarity(self.unblocked, blocked).max())


def watch_losses(
    passes: BlockedPasses,
    pairs: Mapping[str, Encoded],
    model: TextToImage,
    *,
    samples: int,
    seed: int,
) -> dict[str, Watched]:
    """Watch each pair's own denoising loss, at draws that its name decides.

    A pair is not memorized where its prompt does not lower the loss.

    Args:
        passes: Of ``denoising_loss``.
        pairs: Pair id to latent and embedding.
        model: Whose empty embedding and schedule.
        samples: Noise samples S; timestep k is uniform on the k-th of S equal parts.
        seed: Of the draws.
    """
    empty = model.empty_embedding()[0]
    known: list[Part] = []
    for pair, encoded in pairs.items():
        latent = encoded.latent.to(model.device)
        generator = keyed_generator("nemo loss", seed, pair)
        noise = torch.randn((samples, *latent.shape), generator=generator)
        place = (torch.arange(samples) + torch.rand(samples, generator=generator)) / samples
        timesteps = (place * model.num_train_timesteps).long()
        drawn = (
            latent.expand_as(noise),
            noise.to(model.device),
            timesteps.clamp(max=model.num_train_timesteps - 1).to(model.device),
        )
        for embedding in (encoded.embedding.to(model.device), empty):
            rows = embedding.expand(samples, *embedding.shape)
            known.append(Part(pair, (*drawn, rows)))
    losses = [float(loss.double().mean()) for loss in passes.run(known)]
    found = {}
    for k in range(0, len(known), 2):
        prompted, unprompted = losses[k], losses[k + 1]
        found[known[k].pair] = Watched(
            known[k].inputs,
            _Help(prompted, unprompted),
            prompted < unprompted,
            {"loss": prompted, "loss_empty_prompt": unprompted},
        )
    return found


@dataclass(frozen=True)
class _Help:
    """Share of the prompt's help that is left: 1 as unblocked, 0 as under the empty prompt.

    Attributes:
        prompted: Unblocked loss under the prompt.
        unprompted: Unblocked loss under the empty prompt.
    """

    prompted: float
    unprompted: float

    def __call__(self, losses: torch.Tensor) -> float:
        loss = float(losses.double().mean())
        return (self.unprompted - loss) / (self.unprompted - self.prompted)
