"""Where triggers lie among their starts and among prompts.

Reference: Finding DoRI (2507.16880), section on locality: final embeddings are as scattered as the
initial ones. Random starts alone would make them so, as long as the attack does not go far: so
what the attack adds, the displacement, is compared by itself too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch.nn import functional as F

from dori_lightning.locality.estimates import (
    Estimate,
    Rate,
    mean_estimate,
    pair_estimates,
    rate_of,
)
from dori_lightning.types import Init, Pair

COLUMNS = 1 << 16
"""Columns that are compared at once: 500 rows of them are 260 MB in double precision."""

PERPLEXITY = 30.0
"""Of t-SNE; at most a third of the points. The paper does not give its own."""

ImageKind = Literal["memorized", "control"]
PlaceKind = Literal["start", "end", "own_prompt", "memorized_prompt", "control_prompt"]
PromptGroup = Literal["memorized_prompts", "control_prompts"]
SpreadGroup = Literal["starts", "triggers", "control_ends", "memorized_prompts", "control_prompts"]


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
        working: Whether each end replicates the image on the model it was searched on, length N.
    """

    pair: Pair
    start: Init
    prompt: torch.Tensor
    restarts: tuple[int, ...]
    starts: torch.Tensor
    ends: torch.Tensor
    working: tuple[bool, ...]

    def only_working(self) -> TriggerSet:
        """The attacks that succeeded: an embedding that gives another image is no trigger."""
        chosen = [k for k, works in enumerate(self.working) if works]
        return replace(
            self,
            restarts=tuple(self.restarts[k] for k in chosen),
            starts=self.starts[chosen],
            ends=self.ends[chosen],
            working=(True,) * len(chosen),
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
class Spread:
    """How far embeddings of one group are apart.

    Attributes:
        group: ``starts`` or ``triggers`` of memorized images, ``control_ends`` of attacks on
            control images, ``memorized_prompts``, ``control_prompts``.
        start: Where the attacks began; None for prompts.
        images: Images whose embeddings these are; 0 for prompts.
        count: Embeddings.
        length: Mean Euclidean length.
        distance: Mean distance of two embeddings of one image (of two prompts).
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
    """What attacks change.

    Attributes:
        held: Whether the images are ``memorized`` or ``control``.
        start: Where the attacks began.
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

    held: ImageKind
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
class Place:
    """One embedding in two dimensions.

    Attributes:
        what: ``start``, ``end``, ``own_prompt``, ``memorized_prompt`` or ``control_prompt``.
        pair: Id of the pair it belongs to.
        start: Where the attack began; None for prompts.
        restart: Which attack; an end and its start share it.
        pca: First two principal components.
        tsne: The two coordinates of t-SNE; distances between clusters mean little there.
    """

    what: PlaceKind
    pair: str
    start: Init | None
    restart: int
    pca: tuple[float, float]
    tsne: tuple[float, float]


@dataclass(frozen=True)
class EmbeddingFindings:
    """Where triggers lie.

    Attributes:
        shape: (T, D).
        random_distance: Expected distance of two standard normal embeddings, sqrt(2 T D).
        spreads: How far embeddings are apart.
        moves: What attacks change.
        nearest: Which prompt is nearest.
        places: Every embedding in two dimensions.
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
    prompts: Mapping[PromptGroup, PromptSet],
    *,
    seed: int = 0,
) -> EmbeddingFindings:
    """Compare triggers with their starts and with prompts.

    Args:
        triggers: Of memorized images, from every start; those that work.
        controls: Attacks on control images, whatever they gave.
        prompts: Of other memorized images, and of images that the checkpoint does not hold.
        seed: Of resampling and t-SNE.
    """
    length, width = (int(side) for side in prompts["control_prompts"].embeddings.shape[1:])
    spread = partial(_spread, seed=seed)
    spreads: list[Spread] = []
    moves: list[Move] = []
    nearest: list[Nearest] = []
    attacked: dict[ImageKind, Sequence[TriggerSet]] = {"memorized": triggers, "control": controls}
    for kind, sets in attacked.items():
        for start in dict.fromkeys(one.start for one in sets):
            chosen = [one for one in sets if one.start == start and len(one.ends)]
            if not chosen:
                continue
            labels = [one.pair.id for one in chosen for _ in one.ends]
            starts = torch.cat([one.starts for one in chosen])
            ends = torch.cat([one.ends for one in chosen])
            if kind == "memorized":
                spreads.append(spread("starts", starts, labels, start=start))
                spreads.append(spread("triggers", ends, labels, start=start))
                nearest += _nearest(chosen, labels, prompts)
            else:
                spreads.append(spread("control_ends", ends, labels, start=start))
            moves.append(_move(kind, start, starts, ends, labels, seed=seed))
    for group, own in prompts.items():
        spreads.append(spread(group, own.embeddings, ["prompts"] * len(own.pairs)))
    return EmbeddingFindings(
        shape=(length, width),
        random_distance=math.sqrt(2 * length * width),
        spreads=tuple(spreads),
        moves=tuple(moves),
        nearest=tuple(nearest),
        places=_places(triggers, prompts, seed=seed),
    )


def distances(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (N, N), float64, of rows (N, ...) taken as flat vectors."""
    flat = rows.flatten(1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for part in torch.split(flat, COLUMNS, dim=1):
        columns = part.double()
        # not by way of products: near rows would lose their digits
        exact = "donot_use_mm_for_euclid_dist"
        total += torch.cdist(columns, columns, compute_mode=exact).square()
    return total.sqrt().cpu()


def cosines(rows: torch.Tensor) -> torch.Tensor:
    """Cosines (N, N) in [-1, 1], float64, of rows (N, ...) taken as flat vectors.

    A row of zeros has a cosine of 0 with every other.
    """
    flat = rows.flatten(1).double()
    products = (flat @ flat.T).cpu()
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


def lengths(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean lengths (N,), float64, of rows (N, ...) taken as flat vectors."""
    found: torch.Tensor = rows.flatten(1).double().norm(dim=1)
    return found.cpu()


def _spread(
    group: SpreadGroup,
    rows: torch.Tensor,
    labels: Sequence[str],
    *,
    start: Init | None = None,
    seed: int,
) -> Spread:
    """How far embeddings (N, T, D) are apart, within and between their labels."""
    distance, distance_between = pair_estimates(distances(rows), labels, seed=seed)
    cosine, cosine_between = pair_estimates(cosines(rows), labels, seed=seed)
    return Spread(
        group=group,
        start=start,
        images=0 if start is None else len(set(labels)),
        count=len(rows),
        length=mean_estimate(lengths(rows).tolist(), labels, seed=seed),
        distance=distance,
        distance_between=distance_between,
        cosine=cosine,
        cosine_between=cosine_between,
    )


def _move(
    kind: ImageKind,
    start: Init,
    starts: torch.Tensor,
    ends: torch.Tensor,
    labels: Sequence[str],
    *,
    seed: int,
) -> Move:
    moves = ends - starts
    cosine, cosine_between = pair_estimates(cosines(moves), labels, seed=seed)
    displacement = mean_estimate(lengths(moves).tolist(), labels, seed=seed)
    apart, _ = pair_estimates(distances(starts), labels, seed=seed)
    own_start = None
    if 1 < len(starts) == len(torch.unique(starts.flatten(1), dim=0)):
        nearest = torch.cdist(ends.flatten(1).double(), starts.flatten(1).double()).argmin(1)
        own_start = rate_of((nearest == torch.arange(len(ends))).tolist(), labels)
    return Move(
        held=kind,
        start=start,
        displacement=displacement,
        share=displacement.value / apart.value if apart.value > 0 else None,
        cosine=cosine,
        cosine_between=cosine_between,
        own_start=own_start,
    )


def _nearest(
    sets: Sequence[TriggerSet], labels: Sequence[str], prompts: Mapping[PromptGroup, PromptSet]
) -> list[Nearest]:
    start = sets[0].start
    memorized, control = prompts["memorized_prompts"], prompts["control_prompts"]
    others = torch.cat([memorized.embeddings, control.embeddings]).flatten(1).double()
    findings = []
    whats: tuple[Literal["triggers", "starts"], ...] = ("triggers", "starts")
    measures: tuple[Literal["distance", "cosine"], ...] = ("distance", "cosine")
    for what, measure in product(whats, measures):
        if what == "starts" and start == "prompt":
            continue  # they are the image's own prompt
        # number of each embedding's nearest prompt: 0 is the image's own
        numbers: list[int] = []
        for one in sets:
            rows = (one.ends if what == "triggers" else one.starts).flatten(1).double()
            near = torch.cat([one.prompt.flatten()[None].double(), others])
            if measure == "cosine":
                nearest = (F.normalize(rows) @ F.normalize(near).T).argmax(1)
            else:
                nearest = torch.cdist(rows, near).argmin(1)
            numbers += nearest.tolist()
        first_control, end = 1 + len(memorized.pairs), 1 + len(others)
        own, by_memorized, by_control = (
            rate_of([low <= number < high for number in numbers], labels)
            for low, high in ((0, 1), (1, first_control), (first_control, end))
        )
        findings.append(Nearest(what, start, measure, own, by_memorized, by_control, 1 / end))
    return findings


def _places(
    triggers: Sequence[TriggerSet], prompts: Mapping[PromptGroup, PromptSet], *, seed: int
) -> tuple[Place, ...]:
    """Project starts, ends and prompts together; nothing where there are fewer than four."""
    rows: list[tuple[PlaceKind, str, Init | None, int, torch.Tensor]] = []
    for one in triggers:
        for restart, start, end in zip(one.restarts, one.starts, one.ends, strict=True):
            rows.append(("start", one.pair.id, one.start, restart, start))
            rows.append(("end", one.pair.id, one.start, restart, end))
    own_prompts = {one.pair.id: one.prompt for one in triggers}
    rows += [("own_prompt", pair, None, 0, row) for pair, row in own_prompts.items()]
    kinds: tuple[tuple[PlaceKind, PromptGroup], ...] = (
        ("memorized_prompt", "memorized_prompts"), ("control_prompt", "control_prompts")
    )  # fmt: skip
    for kind, group in kinds:
        for pair, row in zip(prompts[group].pairs, prompts[group].embeddings, strict=True):
            rows.append((kind, pair.id, None, 0, row))
    if len(rows) < 4:
        return ()
    flat = torch.stack([row[-1] for row in rows]).flatten(1)
    pca = PCA(2, svd_solver="full").fit_transform(flat.double().numpy())
    tsne = TSNE(
        2, perplexity=min(PERPLEXITY, (len(rows) - 1) / 3), metric="precomputed", init="random",
        random_state=seed,
    ).fit_transform(distances(flat).numpy().astype(np.float32))  # fmt: skip
    return tuple(
        Place(what, pair, start, restart, (float(a), float(b)), (float(c), float(d)))
        for (what, pair, start, restart, _), (a, b), (c, d) in zip(rows, pca, tsne, strict=True)
    )
