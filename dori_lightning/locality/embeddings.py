"""Where triggers lie among their starts and among prompts.

Reference: Finding DoRI (2507.16880), section on locality: final embeddings are as scattered as the
initial ones. Random starts alone would make them so, as long as the attack does not go far: so
what the attack adds, the displacement, is looked at by itself too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from dori_lightning.locality.estimates import (
    Estimate,
    Rate,
    mean_estimate,
    pair_estimates,
    rate_of,
)
from dori_lightning.types import Init, Pair

# -------- distances
# Pairwise distances and cosines of long rows, a stretch of columns at a time.

COLUMNS = 1 << 16
"""Columns that are compared at once: 500 rows of them are 260 MB in double precision."""


def distances(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (N, N), float64, of rows (N, ...) taken as flat vectors."""
    flat = rows.flatten(1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for part in torch.split(flat, COLUMNS, dim=1):
        own = part.double()
        # not by way of products: near rows would lose their digits
        total += torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist").square()
    return total.sqrt().cpu()


def cosines(rows: torch.Tensor) -> torch.Tensor:
    """Cosines (N, N) in [-1, 1], float64, of rows (N, ...) taken as flat vectors.

    A row of zeros has a cosine of 0 with every other.
    """
    products = _products(rows)
    length = products.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return (products / length[:, None] / length[None]).clamp(-1, 1)


def relative_distances(distance: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Distances (N, N) divided by the root mean square of the two rows' lengths, in [0, 2].

    The square root of 2 where two rows are orthogonal, whatever their scale.

    Args:
        distance: Euclidean distances (N, N).
        lengths: Euclidean lengths of the rows (N,).
    """
    square = lengths.double().square()
    scale = ((square[:, None] + square[None]) / 2).sqrt()
    return distance / scale.clamp_min(torch.finfo(torch.float64).tiny)


def _products(rows: torch.Tensor) -> torch.Tensor:
    flat = rows.flatten(1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for part in torch.split(flat, COLUMNS, dim=1):
        own = part.double()
        total += own @ own.T
    return total.cpu()


# -------- groups
# Sets of text embeddings that are compared with each other.

GroupName = Literal["triggers", "starts", "memorized_prompts", "control_prompts"]
GROUPS: tuple[GroupName, ...] = ("triggers", "starts", "memorized_prompts", "control_prompts")


@dataclass(frozen=True)
class TriggerSet:
    """What N attacks on one image began with and ended with.

    Attributes:
        pair: The image under attack, with its prompt.
        start: Where they began.
        prompt: Embedding (T, D) of the image's own prompt.
        restarts: Number of each attack, length N.
        starts: Initial embeddings (N, T, D).
        ends: Final embeddings (N, T, D).
        working: Whether each end draws the image on the model it was searched on, length N.
    """

    pair: Pair
    start: Init
    prompt: torch.Tensor
    restarts: tuple[int, ...]
    starts: torch.Tensor
    ends: torch.Tensor
    working: tuple[bool, ...]

    def only_working(self) -> TriggerSet:
        """The attacks that succeeded: an embedding that draws something else is no trigger."""
        kept = [k for k, works in enumerate(self.working) if works]
        return TriggerSet(
            self.pair,
            self.start,
            self.prompt,
            tuple(self.restarts[k] for k in kept),
            self.starts[kept],
            self.ends[kept],
            tuple(True for _ in kept),
        )


@dataclass(frozen=True)
class PromptSet:
    """Prompts of different pairs.

    Attributes:
        pairs: N pairs.
        embeddings: Their prompts' embeddings (N, T, D).
    """

    pairs: tuple[Pair, ...]
    embeddings: torch.Tensor


@dataclass(frozen=True)
class Group:
    """Embeddings that are compared with each other, layer by layer.

    Attributes:
        name: ``triggers`` of the images under study, the ``starts`` that those began with,
            ``memorized_prompts`` of other memorized images, ``control_prompts``.
        labels: Which image's each is, length N; one label for all prompts.
        pairs: The pair that each is asked about, length N.
        embeddings: Embeddings (N, T, D).
    """

    name: GroupName
    labels: tuple[str, ...]
    pairs: tuple[Pair, ...]
    embeddings: torch.Tensor


# -------- maps
# A picture of many embeddings in two dimensions.

PERPLEXITY = 30.0
"""Of t-SNE; at most a third of the points. The paper does not give its own."""


@dataclass(frozen=True)
class Place:
    """One embedding in the picture.

    Attributes:
        what: ``start``, ``end``, ``own_prompt``, ``memorized_prompt`` or ``control_prompt``.
        pair: Whose.
        start: Where the attack began; None for prompts.
        restart: Which attack; an end and its start share it.
        pca: First two principal components.
        tsne: The two coordinates of t-SNE; distances between clusters mean little there.
    """

    what: Literal["start", "end", "own_prompt", "memorized_prompt", "control_prompt"]
    pair: str
    start: Init | None
    restart: int
    pca: tuple[float, float]
    tsne: tuple[float, float]


def places_of(
    triggers: Sequence[TriggerSet],
    *,
    memorized_prompts: PromptSet,
    control_prompts: PromptSet,
    seed: int = 0,
) -> tuple[Place, ...]:
    """Project starts, ends and prompts together.

    Args:
        triggers: Triggers of memorized images.
        memorized_prompts: Of other memorized images.
        control_prompts: Of control images.
        seed: Of t-SNE.

    Returns:
        One place per embedding; none where there are fewer than four.
    """
    names: list[tuple[Literal["start", "end", "own_prompt", "memorized_prompt", "control_prompt"],
                      str, Init | None, int]] = []  # fmt: skip
    rows: list[torch.Tensor] = []
    for own in triggers:
        for restart, start, end in zip(own.restarts, own.starts, own.ends, strict=True):
            names += [("start", own.pair.id, own.start, restart),
                      ("end", own.pair.id, own.start, restart)]  # fmt: skip
            rows += [start, end]
    for own in {own.pair.id: own for own in triggers}.values():
        names.append(("own_prompt", own.pair.id, None, 0))
        rows.append(own.prompt)
    names += [("memorized_prompt", pair.id, None, 0) for pair in memorized_prompts.pairs]
    names += [("control_prompt", pair.id, None, 0) for pair in control_prompts.pairs]
    rows += [*memorized_prompts.embeddings, *control_prompts.embeddings]
    if len(rows) < 4:
        return ()
    stacked = torch.stack(rows).flatten(1)
    pca = PCA(2, svd_solver="full").fit_transform(stacked.double().numpy())
    tsne = TSNE(
        2,
        perplexity=min(PERPLEXITY, (len(rows) - 1) / 3),
        metric="precomputed",
        init="random",
        random_state=seed,
    ).fit_transform(distances(stacked).numpy().astype(np.float32))
    return tuple(
        Place(what, pair, start, restart, (float(a), float(b)), (float(c), float(d)))
        for (what, pair, start, restart), (a, b), (c, d) in zip(names, pca, tsne, strict=True)
    )


# -------- embeddings

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
