"""Numbers with their intervals: means over triggers, over pairs of them, and success rates.

Triggers of one image are independent draws for that image, images are what one would like to
generalise over. So means resample images first and triggers within them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dori_lightning.metrics.statistics import cluster_bootstrap, wilson_interval

DRAWS = 1000


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
    """How many triggers draw their image.

    Attributes:
        hits: Triggers that do.
        n: Triggers that were asked.
        rate: ``hits / n``, NaN where n is 0.
        ci95: Wilson interval over triggers: what another trigger of these images would do.
        images: Image to its own (hits, n).
        ci95_images: Bootstrap interval over images: what another image would do; NaN below two
            images, and of no width where all images agree.
    """

    hits: int
    n: int
    rate: float
    ci95: tuple[float, float]
    images: dict[str, tuple[int, int]]
    ci95_images: tuple[float, float]


def rate_of(outcomes: Mapping[str, Sequence[bool]]) -> Rate:
    """Count successes.

    Args:
        outcomes: Image to whether each of its triggers draws it; images without any are left out.
    """
    images = {name: (sum(own), len(own)) for name, own in outcomes.items() if own}
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


def mean_estimate(values: Mapping[str, ArrayLike], *, seed: int = 0) -> Estimate:
    """Mean over all values; the interval resamples images, or values where there is one image.

    Args:
        values: Image to its values; images without any are left out.
        seed: Of the resampling.
    """
    arrays = [np.asarray(own, np.float64).ravel() for own in values.values()]
    arrays = [own for own in arrays if own.size]
    if not arrays:
        return Estimate(math.nan, math.nan, math.nan, 0)
    pooled = np.concatenate(arrays)
    clusters = arrays if len(arrays) > 1 else list(pooled[:, None])
    low, high = cluster_bootstrap(clusters, draws=DRAWS, seed=seed)
    return Estimate(float(pooled.mean()), low, high, int(pooled.size))


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
    whole = [np.ones((1, len(own))) for own in rows]
    rng = np.random.default_rng(seed)
    resampled = [
        rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=DRAWS).astype(float)
        for own in rows
    ]
    # one image is always drawn
    picked = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS).astype(
        float
    )
    once = np.ones((1, len(names)))
    answers = []
    for means, pairs in (
        (_within, sum(len(own) * (len(own) - 1) // 2 for own in rows)),
        (_between, (len(labels) ** 2 - sum(len(own) ** 2 for own in rows)) // 2),
    ):
        value = float(means(full, rows, whole, once)[0]) if pairs else math.nan
        draws = means(full, rows, resampled, picked) if pairs else np.array([])
        draws = draws[np.isfinite(draws)]
        low, high = np.quantile(draws, [0.025, 0.975]) if draws.size else (math.nan, math.nan)
        answers.append(Estimate(value, float(low), float(high), pairs))
    return answers[0], answers[1]


def _within(
    matrix: np.ndarray, rows: list[np.ndarray], items: list[np.ndarray], images: np.ndarray
) -> np.ndarray:
    """Mean within images (draws,) under ``items`` counts (draws, n_g) and ``images`` counts."""
    total = np.zeros(len(images))
    weight = np.zeros(len(images))
    for place, (own, counts) in enumerate(zip(rows, items, strict=True)):
        summed = ((counts @ matrix[np.ix_(own, own)]) * counts).sum(1)
        pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
        known = pairs > 0
        total += np.where(known, summed / np.where(known, pairs, 1), 0) * images[:, place]
        weight += known * images[:, place]
    return _quotient(total, weight)


def _between(
    matrix: np.ndarray, rows: list[np.ndarray], items: list[np.ndarray], images: np.ndarray
) -> np.ndarray:
    """Mean between images (draws,), as ``_within``."""
    total = np.zeros(len(images))
    weight = np.zeros(len(images))
    for a, (own, counts) in enumerate(zip(rows, items, strict=True)):
        for b in range(a + 1, len(rows)):
            summed = ((counts @ matrix[np.ix_(own, rows[b])]) * items[b]).sum(1)
            times = images[:, a] * images[:, b]
            total += summed / (counts.sum(1) * items[b].sum(1)) * times
            weight += times
    return _quotient(total, weight)


def _quotient(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1), np.nan)
