"""Where triggers lie among their starts and among prompts.

Reference: Finding DoRI (2507.16880), section on locality: final embeddings are as scattered as the
initial ones. Random starts alone would make them so, as long as the attack does not go far: so
what the attack adds, the displacement, is looked at by itself too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from dori_lightning.locality.distances import cosines, distances
from dori_lightning.locality.estimates import (
    Estimate,
    Rate,
    mean_estimate,
    pair_estimates,
    rate_of,
)
from dori_lightning.locality.maps import Place, places_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dori_lightning.locality.groups import PromptSet, TriggerSet
    from dori_lightning.types import Init

__all__ = ["EmbeddingFindings", "Move", "Nearest", "Spread", "embedding_findings"]

Held = Literal["memorized", "control"]
SpreadGroup = Literal["starts", "triggers", "control_ends", "memorized_prompts", "control_prompts"]


@dataclass(frozen=True)
class Spread:
    """How far embeddings of one group are apart.

    Attributes:
        group: ``starts`` or ``triggers`` of memorized images, ``control_ends`` of attacks on
            control images, ``memorized_prompts``, ``control_prompts``.
        start: Where the attacks began; None for prompts.
        images: Images whose embeddings these are; 0 for prompts.
        count: Embeddings.
        length: Mean Euclidean length of an embedding, over all T x D numbers.
        distance: Mean Euclidean distance of two embeddings of one image (of two prompts).
        distance_between: The same for two images.
        cosine: Mean cosine of two embeddings of one image (of two prompts).
        cosine_between: The same for two images.
    """

    group: SpreadGroup
    start: Init | None
    images: int
    count: int
    length: Estimate
    distance: Estimate
    distance_between: Estimate
    cosine: Estimate
    cosine_between: Estimate


@dataclass(frozen=True)
class Move:
    """What attacks change about their starts.

    Attributes:
        held: Whether the images are ``memorized`` or ``control``.
        start: Where they began.
        displacement: Mean ||end - start||.
        share: Displacement divided by the mean distance of two starts of one image; None where
            all starts are the same.
        cosine: Mean cosine of two displacements of one image: 1 if the attack always goes the
            same way, 0 if every start goes its own.
        cosine_between: The same for two images: what two searches have in common whatever they
            look for.
        own_start: Ends whose nearest start, among those of all images, is their own; None where
            starts are the same.
    """

    held: Held
    start: Init
    displacement: Estimate
    share: float | None
    cosine: Estimate
    cosine_between: Estimate
    own_start: Rate | None


@dataclass(frozen=True)
class Nearest:
    """Which prompt is nearest.

    Attributes:
        what: ``triggers``, or the ``starts`` they came from, as a control.
        start: Where the attacks began.
        measure: ``distance`` or ``cosine``.
        own: Embeddings whose nearest prompt is the image's own.
        memorized: Embeddings whose nearest prompt is another memorized image's.
        control: Embeddings whose nearest prompt is a control's.
        chance: 1 / number of prompts: the rate of ``own`` if nearness meant nothing.
    """

    what: Literal["triggers", "starts"]
    start: Init
    measure: Literal["distance", "cosine"]
    own: Rate
    memorized: Rate
    control: Rate
    chance: float


@dataclass(frozen=True)
class EmbeddingFindings:
    """Where triggers lie.

    Attributes:
        shape: (T, D).
        random_distance: Expected distance of two standard normal embeddings, sqrt(2 T D).
        spreads: How far embeddings are apart.
        moves: What attacks change.
        nearest: Which prompt is nearest.
        places: A picture of it in two dimensions.
    """

    shape: tuple[int, int]
    random_distance: float
    spreads: tuple[Spread, ...]
    moves: tuple[Move, ...]
    nearest: tuple[Nearest, ...]
    places: tuple[Place, ...]


def embedding_findings(
    triggers: Sequence[TriggerSet],
    controls: Sequence[TriggerSet],
    *,
    memorized_prompts: PromptSet,
    control_prompts: PromptSet,
    seed: int = 0,
) -> EmbeddingFindings:
    """Compare triggers with their starts and with prompts.

    Args:
        triggers: Of memorized images, from every start; those that work.
        controls: Attacks on control images, whatever they gave.
        memorized_prompts: Of other memorized images.
        control_prompts: Of images that the checkpoint does not hold.
        seed: Of resampling and picture.
    """
    length, width = (int(side) for side in control_prompts.embeddings.shape[1:])
    spreads: list[Spread] = []
    moves: list[Move] = []
    nearest: list[Nearest] = []
    attacked: dict[Held, Sequence[TriggerSet]] = {"memorized": triggers, "control": controls}
    for held, sets in attacked.items():
        for start in dict.fromkeys(own.start for own in sets):
            chosen = [own for own in sets if own.start == start and len(own.ends)]
            if not chosen:
                continue
            ended = {own.pair.id: own.ends for own in chosen}
            if held == "memorized":
                begun = {own.pair.id: own.starts for own in chosen}
                spreads += [
                    _spread("starts", begun, start=start, seed=seed),
                    _spread("triggers", ended, start=start, seed=seed),
                ]
                nearest += _nearest(chosen, memorized_prompts, control_prompts)
            else:
                spreads.append(_spread("control_ends", ended, start=start, seed=seed))
            moves.append(_move(held, chosen, seed=seed))
    spreads += [
        _spread("memorized_prompts", {"prompts": memorized_prompts.embeddings}, seed=seed),
        _spread("control_prompts", {"prompts": control_prompts.embeddings}, seed=seed),
    ]
    return EmbeddingFindings(
        shape=(length, width),
        random_distance=math.sqrt(2 * length * width),
        spreads=tuple(spreads),
        moves=tuple(moves),
        nearest=tuple(nearest),
        places=places_of(
            triggers,
            memorized_prompts=memorized_prompts,
            control_prompts=control_prompts,
            seed=seed,
        ),
    )


def _spread(
    group: SpreadGroup, rows: Mapping[str, torch.Tensor], *, start: Init | None = None, seed: int
) -> Spread:
    """How far embeddings are apart: of each image (n, T, D), or of ``prompts``."""
    labels = [name for name, part in rows.items() for _ in part]
    everything = torch.cat(list(rows.values()))
    distance, distance_between = pair_estimates(distances(everything), labels, seed=seed)
    cosine, cosine_between = pair_estimates(cosines(everything), labels, seed=seed)
    return Spread(
        group=group,
        start=start,
        images=0 if start is None else len(rows),
        count=len(everything),
        length=mean_estimate({name: _lengths(part) for name, part in rows.items()}, seed=seed),
        distance=distance,
        distance_between=distance_between,
        cosine=cosine,
        cosine_between=cosine_between,
    )


def _move(held: Held, sets: Sequence[TriggerSet], *, seed: int) -> Move:
    moved = [own.ends - own.starts for own in sets]
    labels = [own.pair.id for own, part in zip(sets, moved, strict=True) for _ in part]
    cosine, cosine_between = pair_estimates(cosines(torch.cat(moved)), labels, seed=seed)
    displacement = mean_estimate(
        {own.pair.id: _lengths(part) for own, part in zip(sets, moved, strict=True)}, seed=seed
    )
    starts = torch.cat([own.starts for own in sets])
    apart, _ = pair_estimates(distances(starts), labels, seed=seed)
    differ = len(torch.unique(starts.flatten(1), dim=0)) == len(starts)
    return Move(
        held=held,
        start=sets[0].start,
        displacement=displacement,
        share=displacement.value / apart.value if apart.value > 0 else None,
        cosine=cosine,
        cosine_between=cosine_between,
        own_start=_own_start(sets, starts) if differ and len(starts) > 1 else None,
    )


def _own_start(sets: Sequence[TriggerSet], starts: torch.Tensor) -> Rate:
    ends = torch.cat([own.ends for own in sets])
    own = torch.cdist(ends.flatten(1).double(), starts.flatten(1).double()).argmin(1)
    right = iter((own == torch.arange(len(ends))).tolist())
    return rate_of({part.pair.id: [next(right) for _ in part.ends] for part in sets})


def _nearest(
    sets: Sequence[TriggerSet], memorized: PromptSet, control: PromptSet
) -> list[Nearest]:
    found = []
    prompts = torch.cat([memorized.embeddings, control.embeddings]).flatten(1).double()
    others = len(memorized.pairs)
    for what in ("triggers", "starts"):
        if what == "starts" and sets[0].start == "prompt":
            continue  # they are the own prompt
        for measure in ("distance", "cosine"):
            winners: dict[str, list[int]] = {}
            for own in sets:
                rows = (own.ends if what == "triggers" else own.starts).flatten(1).double()
                # place 0 is the own prompt; the image's is not among the others
                all_prompts = torch.cat([own.prompt.flatten()[None].double(), prompts])
                winners[own.pair.id] = _closeness(rows, all_prompts, measure).argmax(1).tolist()
            found.append(
                Nearest(
                    what=what,
                    start=sets[0].start,
                    measure=measure,
                    own=rate_of({k: [w == 0 for w in v] for k, v in winners.items()}),
                    memorized=rate_of(
                        {k: [0 < w <= others for w in v] for k, v in winners.items()}
                    ),
                    control=rate_of({k: [w > others for w in v] for k, v in winners.items()}),
                    chance=1 / (1 + len(prompts)),
                )
            )
    return found


def _closeness(
    rows: torch.Tensor, prompts: torch.Tensor, measure: Literal["distance", "cosine"]
) -> torch.Tensor:
    if measure == "distance":
        return -torch.cdist(rows, prompts)
    return (
        torch.nn.functional.normalize(rows, dim=1)
        @ torch.nn.functional.normalize(prompts, dim=1).T
    )


def _lengths(rows: torch.Tensor) -> list[float]:
    lengths: list[float] = rows.flatten(1).double().norm(dim=1).tolist()
    return lengths
