"""Draw ordinary and neighbour prompts by both models, and describe what came out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dori_lightning.metrics.utility import PictureRow
from dori_lightning.models.pictures import (
    PictureOrder,
    generate_pictures,
    load_pictures,
    picture_seeds,
)
from dori_lightning.pairs.captions import neighbour_prompts
from dori_lightning.tasks._utility_losses import corpus_id
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from dori_lightning.metrics.feature_distance import Features
    from dori_lightning.metrics.measure import Originals
    from dori_lightning.metrics.utility import PromptKind
    from dori_lightning.models.protocol import Sampling, TextToImage
    from dori_lightning.tasks._utility_cache import Unmitigated
    from dori_lightning.types import Pair

__all__ = ["Asked", "PictureSet", "near_prompts", "ordinary_prompts"]

CHUNK = 16
"""Pictures that are described at once."""


@dataclass(frozen=True)
class Asked:
    """A prompt that both models draw.

    Attributes:
        kind: Ordinary, or near a suspected pair's.
        id: Its name.
        owner: Whose mask its rows see under a per-pair edit.
        group: What it depends on together with others: equal prompts, or the pair.
        prompt: The prompt.
        pair: The pair it lies near.
    """

    kind: PromptKind
    id: str
    owner: str
    group: str
    prompt: str
    pair: Pair | None = None


def ordinary_prompts(prompts: Iterable[str]) -> list[Asked]:
    """Prompts of the corpus; equal ones give equal pictures, so they count as one group."""
    return [
        Asked("ordinary", corpus_id(k), corpus_id(k), prompt, prompt)
        for k, prompt in enumerate(prompts)
    ]


def near_prompts(pairs: Sequence[Pair], count: int) -> tuple[list[Asked], dict[str, str]]:
    """Prompts near those of the suspected pairs, under each pair's own mask.

    Returns:
        The prompts, and why pairs without any have none.
    """
    prompts: dict[str, tuple[str, ...]] = {}
    without: dict[str, str] = {}
    for pair in pairs:
        try:
            prompts[pair.id] = neighbour_prompts(pair, count, split="evaluation")
        except InputError as error:
            without[pair.id] = str(error).splitlines()[0]
    groups = _merged(prompts)
    asked = [
        Asked("neighbour", f"{pair.id}_near{k}", pair.id, groups[pair.id], prompt, pair)
        for pair in pairs
        for k, prompt in enumerate(prompts.get(pair.id, ()))
    ]
    return asked, without


def _merged(prompts: dict[str, tuple[str, ...]]) -> dict[str, str]:
    """Pair id to group: pairs that share a prompt share a group."""
    groups: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, own in prompts.items():
        groups[name] = name
        for prompt in own:
            known, new = groups[first.setdefault(prompt, name)], groups[name]
            groups = {key: known if group == new else group for key, group in groups.items()}
    return groups


@dataclass(frozen=True)
class PictureSet:
    """Prompts that both models draw, and where the pictures go.

    Attributes:
        model: Draws them.
        asked: The prompts, at least one.
        embeddings: Their embeddings (N, T, D).
        sampling: How; K pictures of each.
        cache: Where the unmitigated model's pictures lie.
        folder: Where the mitigated model's go.
    """

    model: TextToImage
    asked: Sequence[Asked]
    embeddings: torch.Tensor
    sampling: Sampling
    cache: Unmitigated
    folder: Path

    @classmethod
    def of(
        cls, model: TextToImage, asked: Sequence[Asked], *, sampling: Sampling, pictures: int,
        cache: Unmitigated, folder: Path,
    ) -> PictureSet:  # fmt: skip
        """Encode the prompts; ``pictures`` of each are drawn."""
        return cls(
            model=model,
            asked=asked,
            embeddings=model.encode_prompts([item.prompt for item in asked]),
            sampling=replace(sampling, images_per_pair=pictures),
            cache=cache,
            folder=folder,
        )

    @property
    def pictures(self) -> int:
        """Pictures by each model."""
        return len(self.asked) * self.sampling.images_per_pair

    def _before(self, item: Asked) -> Path:
        return self.cache.pictures(item.prompt)

    def _after(self, item: Asked) -> Path:
        return self.folder / item.kind / item.id

    def draw_unmitigated(self, advance: Callable[[int], None]) -> None:
        """Draw what the cache lacks by the model as it is; it must carry no edit."""
        orders = {
            self._before(item): PictureOrder(self._before(item), row)
            for item, row in zip(self.asked, self.embeddings, strict=True)
        }
        generate_pictures(self.model, list(orders.values()), self.sampling, advance=advance)

    def draw_mitigated(self, edit: str, advance: Callable[[int], None]) -> None:
        """Draw by the model that carries the edit of that identity now."""
        orders = [
            PictureOrder(self._after(item), row, item.owner)
            for item, row in zip(self.asked, self.embeddings, strict=True)
        ]
        generate_pictures(self.model, orders, self.sampling, edit=edit, advance=advance)

    def describe(
        self, originals: Originals, features: Features, *, descriptor: str
    ) -> tuple[list[PictureRow], torch.Tensor, torch.Tensor]:
        """Read both models' pictures and compare them seed by seed.

        Returns:
            Rows, and the features (N K, F) of the unmitigated and of the mitigated model's
            pictures in their order.
        """
        rows: list[PictureRow] = []
        described: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
        seeds = picture_seeds(self.sampling)
        width = max(1, CHUNK // len(seeds))
        for start in range(0, len(self.asked), width):
            part = [item for item in self.asked[start : start + width] for _ in seeds]
            numbers = [seed for _ in self.asked[start : start + width] for seed in seeds]
            both = [
                torch.cat([load_pictures(where(item), seeds) for item in part[:: len(seeds)]])
                for where in (self._before, self._after)
            ]
            for found, pictures in zip(described, both, strict=True):
                found.append(features.describe(pictures.to(self.model.device)))
            rows += self._rows(part, numbers, both, originals, descriptor)
        return rows, torch.cat(described[0]), torch.cat(described[1])

    def _rows(
        self,
        part: Sequence[Asked],
        seeds: Sequence[int],
        both: Sequence[torch.Tensor],
        originals: Originals,
        descriptor: str,
    ) -> Iterable[PictureRow]:
        measures = originals.measures
        judge = measures.descriptors[descriptor]
        before, after = (judge.describe(pictures) for pictures in both)
        scores = [
            measures.alignment.alignment(pictures, [item.prompt for item in part]).tolist()
            if measures.alignment
            else None
            for pictures in both
        ]

        def with_original(row: torch.Tensor, item: Asked) -> float | None:
            if item.pair is None:
                return None
            k = originals.places[item.pair.id]
            original = originals.features[descriptor][k : k + 1]
            return float(judge.compare(row, original)[0, 0])

        for k, (item, seed) in enumerate(zip(part, seeds, strict=True)):
            one, other = before[k : k + 1], after[k : k + 1]
            aligned: list[Any] = [None if own is None else own[k] for own in scores]
            yield PictureRow(
                kind=item.kind,
                id=item.id,
                group=item.group,
                prompt=item.prompt,
                seed=seed,
                similarity=float(judge.compare(other, one)[0, 0]),
                original_unmitigated=with_original(one, item),
                original_mitigated=with_original(other, item),
                alignment_unmitigated=aligned[0],
                alignment_mitigated=aligned[1],
                unmitigated=self._before(item) / f"{seed}.png",
                mitigated=self._after(item) / f"{seed}.png",
            )
