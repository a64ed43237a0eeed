"""Small-sample statistics of an audit: intervals, robust spread, ROC and paired comparison.

The unit is the pair, never the single generated image: the K images of a pair are not
independent.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, median_abs_deviation
from sklearn.metrics import auc as area_under
from sklearn.metrics import roc_curve as sklearn_roc


@dataclass(frozen=True)
class Roc:
    """How well a score tells positives from negatives.

    Attributes:
        points: (false positive rate, true positive rate, threshold), one per distinct score and
            one in front, sorted by rate; a score is positive *above* the threshold, so the first
            point is (0, 0, highest score) and the last one (1, 1, just under the lowest score).
            Empty where either side is empty.
        auc: Probability that a positive scores higher than a negative, ties counting half; NaN
            where either side is empty.
    """

    points: tuple[tuple[float, float, float], ...]
    auc: float


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Bound a rate with 95 % confidence; honest near 0 and 1 and for few pairs, too.

    Args:
        hits: Successes, 0 to ``n``.
        n: Trials; 0 gives (0, 1), nothing being known.

    Returns:
        Lower and upper bound in [0, 1].

    Raises:
        ValueError: Counts out of range.

    Reference: Wilson, "Probable inference, the law of succession, and statistical inference",
        1927; recommended for small n by Brown, Cai and DasGupta, "Interval estimation for a
        binomial proportion", 2001.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"need 0 <= hits <= n, got {hits} and {n}")
    if n == 0:
        return 0.0, 1.0
    interval = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    # at the ends the formula is exact up to rounding; say so
    return (
        0.0 if hits == 0 else float(interval.low),
        1.0 if hits == n else float(interval.high),
    )


def median_mad(values: ArrayLike) -> tuple[float, float]:
    """Median and unscaled median absolute deviation of finite values; NaN where there are none."""
    array = np.asarray(values, np.float64).ravel()
    finite = array[np.isfinite(array)]
    if finite.size == 0:
        return math.nan, math.nan
    return float(np.median(finite)), float(median_abs_deviation(finite))


def roc_curve(positives: ArrayLike, negatives: ArrayLike) -> Roc:
    """Trace the ROC of two sets of scores, tied scores stepping together.

    Args:
        positives: Scores that should be high, any shape, finite.
        negatives: Scores that should be low, any shape, finite.

    Raises:
        ValueError: A score is not finite.
    """
    high = np.asarray(positives, np.float64).ravel()
    low = np.asarray(negatives, np.float64).ravel()
    if not (np.isfinite(high).all() and np.isfinite(low).all()):
        raise ValueError("scores of an ROC must be finite: leave failed pairs out and count them")
    if high.size == 0 or low.size == 0:
        return Roc((), math.nan)
    labels = np.concatenate([np.ones(high.size), np.zeros(low.size)])
    # scikit-learn calls a score positive *from* its threshold on, and puts infinity in front
    fpr, tpr, from_ = sklearn_roc(labels, np.concatenate([high, low]), drop_intermediate=False)
    above = [*from_[1:], np.nextafter(from_[-1], -np.inf)]
    points = tuple((float(f), float(t), float(s)) for f, t, s in zip(fpr, tpr, above, strict=True))
    return Roc(points, float(area_under(fpr, tpr)))


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value that two conditions reproduce the same pairs equally often.

    Args:
        b: Pairs reproduced under the first condition only.
        c: Pairs reproduced under the second condition only.

    Returns:
        p-value in (0, 1]; 1 where no pair differs.

    Raises:
        ValueError: A negative count.

    Reference: McNemar, 1947, with the exact binomial distribution of the discordant pairs.
    """
    if min(b, c) < 0:
        raise ValueError(f"counts must be >= 0, got {b} and {c}")
    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


@dataclass(frozen=True)
class Paired:
    """The same pairs under two conditions.

    Attributes:
        n: Pairs with a result under both.
        lost: Reproduced under the first only.
        gained: Reproduced under the second only.
        p: Two-sided exact McNemar p-value.
        p_holm: The same, corrected for the rows of the checkpoint; NaN where it is not.
    """

    n: int
    lost: int
    gained: int
    p: float
    p_holm: float = math.nan


def paired(first: Mapping[str, bool | None], second: Mapping[str, bool | None]) -> Paired | None:
    """Compare two conditions pair by pair; a pair that diverged under either is left out.

    Args:
        first: Pair id to whether it was reproduced, None where that is unknown.
        second: The same under the other condition.

    Returns:
        The comparison, None where no pair has a result under both.
    """
    both = [
        (a, b)
        for name, a in first.items()
        if a is not None and (b := second.get(name)) is not None
    ]
    if not both:
        return None
    lost, gained = sum(a and not b for a, b in both), sum(b and not a for a, b in both)
    return Paired(len(both), lost, gained, mcnemar_exact(lost, gained))


def holm(values: Sequence[float]) -> list[float]:
    """Correct p-values of one family of comparisons by Holm's step-down rule.

    Args:
        values: p-values in [0, 1].

    Returns:
        Corrected p-values in the order given, in [0, 1].

    Reference: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted(range(len(values)), key=lambda k: values[k])
    corrected, floor = [0.0] * len(values), 0.0
    for rank, k in enumerate(order):
        floor = max(floor, min(1.0, (len(values) - rank) * values[k]))
        corrected[k] = floor
    return corrected


def cluster_bootstrap(
    clusters: Sequence[ArrayLike],
    *,
    statistic: Callable[[np.ndarray], float] = np.mean,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile interval of a statistic, resampling whole pairs with all their images.

    For a paired comparison of two conditions pass each pair's differences.

    Args:
        clusters: One array of finite values per pair, of any length >= 1.
        statistic: Maps the pooled values, (V,), to a number.
        draws: Resamples.
        seed: Of the resampling.

    Returns:
        Lower and upper bound; both NaN where there are no pairs.

    Raises:
        ValueError: An empty cluster, or a value that is not finite.
    """
    arrays = [np.asarray(cluster, np.float64).ravel() for cluster in clusters]
    if not arrays:
        return math.nan, math.nan
    if any(array.size == 0 or not np.isfinite(array).all() for array in arrays):
        raise ValueError(
            "every pair needs at least one value and only finite ones: leave failed pairs out"
        )
    rng = np.random.default_rng(seed)
    values = [
        statistic(np.concatenate([arrays[k] for k in rng.integers(len(arrays), size=len(arrays))]))
        for _ in range(draws)
    ]
    low, high = np.quantile(values, [0.5 - 0.95 / 2, 0.5 + 0.95 / 2])
    return float(low), float(high)
