"""Numbers with their intervals: means over triggers, over pairs of them, and success rates.

Triggers of one image are independent draws for that image, images are what one would like to
generalise over. So means resample images first and triggers within them.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from dori_lightning.metrics.statistics import cluster_bootstrap, wilson_interval

DRAWS = 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % bootstrap interval.

    Attributes:
        value: The mean; NaN where there is nothing to average.
        low: Lower bound, NaN where ``value`` is.
        high: Upper bound.
        count: How many values the mean is over.
    """

    value: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Rate:
    """How many embeddings replicate their image.

    Attributes:
        hits: Embeddings that do.
        n: Embeddings that were tried.
        rate: ``hits / n``, NaN where n is 0.
        ci95: Wilson interval over embeddings: what another trigger of these images would do.
        images: Image to its share of (hits, n).
        ci95_images: Bootstrap interval over images: what another image would do; NaN below two
            images, and of no width where all images agree.
    """

    hits: int
    n: int
    rate: float
    ci95: tuple[float, float]
    images: dict[str, tuple[int, int]]
    ci95_images: tuple[float, float]


def rate_of(works: Iterable[bool], labels: Iterable[str]) -> Rate:
    """Count successes.

    Args:
        works: Whether each embedding replicates its image.
        labels: Image of each.
    """
    images = {name: (sum(own), len(own)) for name, own in _by_image(works, labels).items()}
    hits = sum(own[0] for own in images.values())
    n = sum(own[1] for own in images.values())
    shares = [[own / count] for own, count in images.values()]
    return Rate(
        hits=hits,
        n=n,
        rate=hits / n if n else math.nan,
        ci95=wilson_interval(hits, n),
        images=images,
        ci95_images=cluster_bootstrap(shares) if len(shares) > 1 else (math.nan, math.nan),
    )


def mean_estimate(values: Iterable[float], labels: Iterable[str], *, seed: int = 0) -> Estimate:
    """Mean over all values; the interval resamples images, or values where there is one image.

    Args:
        values: The values.
        labels: Image of each.
        seed: Of the resampling.
    """
    arrays = [np.asarray(own, np.float64) for own in _by_image(values, labels).values()]
    if not arrays:
        return Estimate(math.nan, math.nan, math.nan, 0)
    pooled = np.concatenate(arrays)
    clusters = arrays if len(arrays) > 1 else list(pooled[:, None])
    low, high = cluster_bootstrap(clusters, draws=DRAWS, seed=seed)
    return Estimate(float(pooled.mean()), low, high, int(pooled.size))


def _by_image(values: Iterable[T], labels: Iterable[str]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for value, label in zip(values, labels, strict=True):
        found.setdefault(label, []).append(value)
    return found


def pair_estimates(
    matrix: ArrayLike, labels: Sequence[str], *, seed: int = 0
) -> tuple[Estimate, Estimate]:
    """Means over pairs i < j within one image and over pairs of two images.

    Each image counts equally within, each two images equally between. The interval resamples
    images (where there are several) and the items of each; pairs of an item with itself, which a
    resample holds, are not counted.

    Args:
        matrix: Symmetric (N, N) distances or similarities; the diagonal is not read.
        labels: Image of each item, length N.
        seed: Of the resampling.

    Returns:
        The estimate within images and that between images.
    """
    if not labels:
        nothing = Estimate(math.nan, math.nan, math.nan, 0)
        return nothing, nothing
    full = np.asarray(matrix, np.float64).copy()
    np.fill_diagonal(full, 0.0)
    names = list(dict.fromkeys(labels))
    rows = [np.flatnonzero([label == name for label in labels]) for name in names]
    sizes = [len(own) for own in rows]
    rng = np.random.default_rng(seed)

    def resample(size: int) -> np.ndarray:
        return rng.multinomial(size, np.full(size, 1 / size), size=DRAWS).astype(float)

    items = [resample(size) for size in sizes]
    draws = _means(full, rows, items, resample(len(names)))
    values = _means(full, rows, [np.ones((1, size)) for size in sizes], np.ones((1, len(names))))
    within = sum(size * (size - 1) // 2 for size in sizes)
    counts = (within, len(labels) * (len(labels) - 1) // 2 - within)
    return _estimate(values[0], draws[0], counts[0]), _estimate(values[1], draws[1], counts[1])


def _estimate(value: np.ndarray, draws: np.ndarray, count: int) -> Estimate:
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [0.025, 0.975]) if draws.size else (math.nan, math.nan)
    return Estimate(float(value[0]), float(low), float(high), count)


def _means(
    matrix: np.ndarray, rows: list[np.ndarray], items: list[np.ndarray], images: np.ndarray
) -> np.ndarray:
    """Means within and between images (2, draws); NaN where a draw has no pair.

    Args:
        matrix: (N, N) with zeros on the diagonal.
        rows: Where the items of each image stand in it.
        items: How often each draw holds them, (draws, n) for each image.
        images: How often each draw holds each image (draws, images).
    """
    total, weight = np.zeros((2, 2, len(images)))
    for a, b in combinations_with_replacement(range(len(rows)), 2):
        summed = ((items[a] @ matrix[np.ix_(rows[a], rows[b])]) * items[b]).sum(1)
        if a == b:
            pairs, times = items[a].sum(1) ** 2 - (items[a] ** 2).sum(1), images[:, a]
        else:
            pairs, times = items[a].sum(1) * items[b].sum(1), images[:, a] * images[:, b]
        times = times * (pairs > 0)
        total[int(a != b)] += summed / np.maximum(pairs, 1) * times
        weight[int(a != b)] += times
    return np.where(weight > 0, total / np.maximum(weight, 1), np.nan)
