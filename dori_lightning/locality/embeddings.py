"""Where triggers lie among their starts and among prompts.

Reference: Finding DoRI (2507.16880), section on locality: final embeddings are as scattered as the
initial ones. Random starts alone would make them so, as long as the attack does not go far: so
what the attack adds, the displacement, is compared by itself too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

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
GroupName = Literal["starts", "triggers", "control_ends", "memorized_prompts", "control_prompts"]


def held_as(pair: Pair) -> ImageKind:
    """Whether the checkpoint is expected to hold an image."""
    return "control" if pair.kind == "control" else "memorized"


@dataclass(frozen=True)
class Attempt:
    """What one attack began with and ended with.

    Attributes:
        pair: The image under attack, with its prompt.
        init: What kind of embedding it began with.
        restart: Number of the attack among those on this image from this kind.
        start: Initial embedding (T, D).
        end: Final embedding (T, D).
        works: Whether the end replicates the image on the model it was searched on: an embedding
            that gives another image is no trigger.
    """

    pair: Pair
    init: Init
    restart: int
    start: torch.Tensor
    end: torch.Tensor
    works: bool

    @property
    def held(self) -> ImageKind:
        """Whether the checkpoint is expected to hold the image."""
        return held_as(self.pair)


@dataclass(frozen=True)
class Group:
    """Embeddings that are compared with each other.

    Attributes:
        name: ``triggers`` of memorized images, the ``starts`` that those began with,
            ``control_ends`` of attacks on control images, ``memorized_prompts`` of images that are
            not under study, ``control_prompts``.
        pairs: The pair that each should replicate, length N.
        embeddings: Embeddings (N, T, D).
    """

    name: GroupName
    pairs: tuple[Pair, ...]
    embeddings: torch.Tensor

    @property
    def labels(self) -> tuple[str, ...]:
        """Image of each, length N; one label for all prompts."""
        if self.name in get_args(PromptGroup):
            return ("prompts",) * len(self.pairs)
        return tuple(pair.id for pair in self.pairs)

    @classmethod
    def of(cls, name: GroupName, attempts: Sequence[Attempt]) -> Group:
        """The starts or the ends of attacks, at least one."""
        rows = [own.start if name == "starts" else own.end for own in attempts]
        return cls(name, tuple(own.pair for own in attempts), torch.stack(rows))


@dataclass(frozen=True)
class Spread:
    """How far embeddings of one group are apart.

    Attributes:
        group: Which embeddings.
        start: Where the attacks began; None for prompts.
        images: Images whose embeddings these are; 0 for prompts.
        count: Embeddings.
        length: Mean Euclidean length.
        distance: Mean distance of two embeddings of one image (of two prompts).
        distance_between: The same for two images.
        cosine: Mean cosine of two embeddings of one image (of two prompts).
        cosine_between: The same for two images.
    """

    group: GroupName
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
    """Which prompt is nearest, by cosine.

    Attributes:
        what: ``triggers``, or the ``starts`` they came from, as a control.
        start: Where the attacks began.
        own: Embeddings whose nearest prompt is the image's own.
        memorized: Embeddings whose nearest prompt is another memorized image's.
        control: Embeddings whose nearest prompt is a control's.
        chance: 1 / number of prompts: the rate of ``own`` if nearness meant nothing.
    """

    what: Literal["triggers", "starts"]
    start: Init
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
    attempts: Sequence[Attempt],
    own_prompts: Mapping[str, torch.Tensor],
    prompts: Mapping[PromptGroup, Group],
    *,
    seed: int = 0,
) -> EmbeddingFindings:
    """Compare triggers with their starts and with prompts.

    Args:
        attempts: Attacks from every start; of memorized images those that work are looked at, of
            control images all.
        own_prompts: Pair id to the embedding (T, D) of its prompt, of the memorized images.
        prompts: Of other memorized images, and of images that the checkpoint does not hold.
        seed: Of resampling and t-SNE.
    """
    length, width = (int(side) for side in prompts["control_prompts"].embeddings.shape[1:])
    spreads: list[Spread] = []
    moves: list[Move] = []
    nearest: list[Nearest] = []
    working = [own for own in attempts if own.works and own.held == "memorized"]
    controls = [own for own in attempts if own.held == "control"]
    for init in dict.fromkeys(own.init for own in working):
        chosen = [own for own in working if own.init == init]
        starts, ends = Group.of("starts", chosen), Group.of("triggers", chosen)
        spreads += [_spread(starts, init, seed=seed), _spread(ends, init, seed=seed)]
        nearest += [
            _nearest(group, init, own_prompts, prompts)
            for group in (ends, starts)
            if group is ends or init != "prompt"  # else they are the image's own prompt
        ]
        moves.append(_move(starts, ends, init, seed=seed))
    for init in dict.fromkeys(own.init for own in controls):
        chosen = [own for own in controls if own.init == init]
        starts, ends = Group.of("starts", chosen), Group.of("control_ends", chosen)
        spreads.append(_spread(ends, init, seed=seed))
        moves.append(_move(starts, ends, init, seed=seed))
    spreads += [_spread(group, None, seed=seed) for group in prompts.values()]
    return EmbeddingFindings(
        shape=(length, width),
        random_distance=math.sqrt(2 * length * width),
        spreads=tuple(spreads),
        moves=tuple(moves),
        nearest=tuple(nearest),
        places=_places(working, own_prompts, prompts, seed=seed),
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


def _spread(group: Group, start: Init | None, *, seed: int) -> Spread:
    """How far embeddings are apart, within and between their labels."""
    rows, labels = group.embeddings, group.labels
    distance, distance_between = pair_estimates(distances(rows), labels, seed=seed)
    cosine, cosine_between = pair_estimates(cosines(rows), labels, seed=seed)
    return Spread(
        group=group.name,
        start=start,
        images=0 if start is None else len(set(labels)),
        count=len(rows),
        length=mean_estimate(lengths(rows).tolist(), labels, seed=seed),
        distance=distance,
        distance_between=distance_between,
        cosine=cosine,
        cosine_between=cosine_between,
    )


def _move(started: Group, ended: Group, start: Init, *, seed: int) -> Move:
    """What attacks change; both groups have a row for each of them."""
    starts, ends, labels = started.embeddings, ended.embeddings, ended.labels
    cosine, cosine_between = pair_estimates(cosines(ends - starts), labels, seed=seed)
    displacement = mean_estimate(lengths(ends - starts).tolist(), labels, seed=seed)
    apart, _ = pair_estimates(distances(starts), labels, seed=seed)
    own_start = None
    if 1 < len(starts) == len(torch.unique(starts.flatten(1), dim=0)):
        nearest = torch.cdist(ends.flatten(1).double(), starts.flatten(1).double()).argmin(1)
        own_start = rate_of((nearest == torch.arange(len(ends))).tolist(), labels)
    return Move(
        held="memorized" if ended.name == "triggers" else "control",
        start=start,
        displacement=displacement,
        share=displacement.value / apart.value if apart.value > 0 else None,
        cosine=cosine,
        cosine_between=cosine_between,
        own_start=own_start,
    )


def _nearest(
    group: Group,
    start: Init,
    own_prompts: Mapping[str, torch.Tensor],
    prompts: Mapping[PromptGroup, Group],
) -> Nearest:
    """Find the prompt nearest to each embedding, among the image's own and all others."""

    def unit(rows: torch.Tensor) -> torch.Tensor:
        return F.normalize(rows.flatten(1).double())

    memorized, control = prompts["memorized_prompts"], prompts["control_prompts"]
    rows = unit(group.embeddings)
    own = unit(torch.stack([own_prompts[pair.id] for pair in group.pairs]))
    others = unit(torch.cat([memorized.embeddings, control.embeddings]))
    # the first column is the image's own prompt
    nearest = torch.cat([(rows * own).sum(1, keepdim=True), rows @ others.T], 1).argmax(1)
    first_control, end = 1 + len(memorized.pairs), 1 + len(others)
    by_own, by_memorized, by_control = (
        rate_of(((low <= nearest) & (nearest < high)).tolist(), group.labels)
        for low, high in ((0, 1), (1, first_control), (first_control, end))
    )
    what: Literal["starts", "triggers"] = "starts" if group.name == "starts" else "triggers"
    return Nearest(what, start, by_own, by_memorized, by_control, 1 / end)


def _places(
    triggers: Sequence[Attempt],
    own_prompts: Mapping[str, torch.Tensor],
    prompts: Mapping[PromptGroup, Group],
    *,
    seed: int,
) -> tuple[Place, ...]:
    """Project starts, ends and prompts together; nothing where there are fewer than four."""
    rows: list[tuple[PlaceKind, str, Init | None, int, torch.Tensor]] = []
    for one in triggers:
        rows.append(("start", one.pair.id, one.init, one.restart, one.start))
        rows.append(("end", one.pair.id, one.init, one.restart, one.end))
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
