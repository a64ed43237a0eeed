"""Surrogates: what a model shall show instead of a memorized picture, each vetted against all.

A pruned model that still memorizes gives "surrogates" that are the picture itself or another
memorized one; trained on those, a defence looks good by the numbers and is none.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dori_lightning.models.pictures import generation_noise
from dori_lightning.pairs.captions import neighbour_prompts
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.mitigations.base import Mitigation, Workshop
    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.types import Pair

__all__ = ["SurrogateSettings", "Surrogates", "find_surrogates"]

log = logging.getLogger(__name__)

FIRST_SEED = 50_000
"""Generation seeds of candidates begin here, far from those of an audit's pictures."""

NEIGHBOURS = 3
"""Neighbours of a prompt that are tried before ordinary pictures are taken."""


@dataclass(frozen=True)
class SurrogateSettings:
    """Where surrogates come from.

    Attributes:
        source: Mitigation whose model draws them from the memorized prompts. Which one the paper
            used is unknown; any that hides most pictures from their prompts will do, since what
            it lets through is refused. None begins with neighbours of the prompts: cheaper, and
            better pictures where the pruned model draws nothing worth showing.
        per_pair: Surrogates of each pair.
        candidates: Pictures drawn for a pair before the next source of surrogates is tried.
        max_similarity: Largest similarity, by the deciding descriptor, that a surrogate may have
            with *any* picture to forget.
    """

    source: Mitigation | None
    per_pair: int = 4
    candidates: int = 8
    max_similarity: float = 0.5

    def __post_init__(self) -> None:
        if not 1 <= self.per_pair <= self.candidates:
            raise InputError(
                f"mitigation.surrogates needs 1 <= per_pair <= candidates, got "
                f"{self.per_pair} and {self.candidates}"
            )
        if not 0 < self.max_similarity < 1:
            raise InputError(
                f"mitigation.surrogates.max_similarity must be in (0, 1), "
                f"got {self.max_similarity}"
            )


@dataclass(frozen=True)
class Surrogates:
    """Surrogates of pairs.

    Attributes:
        latents: Pair id to scaled latents (S, C, h, w), S at least 1.
        notes: How many came from where and how many were refused; plain values.
    """

    latents: dict[str, torch.Tensor]
    notes: dict[str, Any]


def find_surrogates(
    model: TextToImage,
    pairs: Sequence[Pair],
    workshop: Workshop,
    settings: SurrogateSettings,
) -> Surrogates:
    """Draw surrogates and refuse those that resemble any picture to forget.

    Tried in turn, until a pair has enough: the source's model with the memorized prompt, the
    model as it is with neighbours of the prompt, one after the other, ordinary pictures of the
    corpus.

    Raises:
        RuntimeError: Not even an ordinary picture passes, so the measure or its limit is wrong.
    """
    kept: dict[str, list[torch.Tensor]] = {pair.id: [] for pair in pairs}
    refused: Counter[str] = Counter()
    origin: Counter[str] = Counter()

    def keep(pair: Pair, images: torch.Tensor, source: str) -> None:
        good = workshop.originals.similarities(images, pairs).amax(1) < settings.max_similarity
        room = settings.per_pair - len(kept[pair.id])
        chosen = list(images[good][:room])
        kept[pair.id] += chosen
        origin[source] += len(chosen)
        refused[source] += int((~good).sum())

    def short() -> list[Pair]:
        return [pair for pair in pairs if len(kept[pair.id]) < settings.per_pair]

    if settings.source is not None:
        edit = workshop.find(settings.source, model, pairs).edit
        with edit.applied(model):
            prompts = [workshop.data.encoded(pair).embedding for pair in pairs]
            drawn = _draw(model, workshop, pairs, prompts, settings.candidates)
        for pair in pairs:
            keep(pair, drawn[pair.id], "mitigated")
    texts = {
        pair.id: neighbour_prompts(pair, NEIGHBOURS, seed=workshop.seed, split="calibration")
        for pair in short()
    }
    for k in range(NEIGHBOURS):
        needy = short()
        if needy:
            rows = list(model.encode_prompts([texts[pair.id][k] for pair in needy]))
            drawn = _draw(model, workshop, needy, rows, settings.candidates)
            for pair in needy:
                keep(pair, drawn[pair.id], "neighbour")
    needy = short()
    if needy:
        count = settings.candidates * len(needy)
        ordinary = workshop.corpus.examples("calibration", count, model.resolution).images
        for k, pair in enumerate(needy):
            keep(pair, ordinary[k :: len(needy)], "ordinary")
    empty = [pair.id for pair in pairs if not kept[pair.id]]
    if empty:
        raise RuntimeError(
            f"no surrogate for {', '.join(empty)}: even ordinary pictures resemble a memorized "
            f"one by more than {settings.max_similarity}; raise "
            f"mitigation.surrogates.max_similarity or choose another metrics.decider"
        )
    log.info("surrogates: kept %s, refused %s", dict(origin), dict(refused))
    latents = {name: model.encode_images(torch.stack(rows)).cpu() for name, rows in kept.items()}
    return Surrogates(latents, {"kept": dict(origin), "refused": dict(refused)})


def _draw(
    model: TextToImage,
    workshop: Workshop,
    pairs: Sequence[Pair],
    embeddings: Sequence[torch.Tensor],
    count: int,
) -> dict[str, torch.Tensor]:
    """Draw ``count`` pictures from each embedding (T, D), the same seeds for each."""
    noise = torch.stack(
        [generation_noise(FIRST_SEED + k, model.latent_shape) for k in range(count)]
    )
    images = model.generate(
        torch.stack(list(embeddings)).repeat_interleave(count, 0),
        noise.repeat(len(pairs), 1, 1, 1),
        replace(workshop.sampling, batch=min(workshop.sampling.batch, 64)),
        pair_ids=[pair.id for pair in pairs for _ in range(count)],
    ).cpu()
    return dict(zip((p.id for p in pairs), torch.split(images, count), strict=True))
