"""How much work it takes: survival curves over denoiser evaluations.

An image "survives" while it does not come back; one that never did is censored at the work that
was spent on it. Reference: *Adversarial Work Criterion* (ICML 2026 workshop); Kaplan and Meier
(1958); the log-rank test of Mantel (1966).
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import CensoredData, ecdf, logrank

from dori_lightning.certify.cascade import Group
from dori_lightning.types import Number

Work = Mapping[str, tuple[int, bool]]
"""Pair id to the work that was spent on it, in rows, and whether it came back."""


@dataclass(frozen=True)
class Survival:
    """Kaplan-Meier estimate of the share of images that have not come back.

    Attributes:
        group: Which images.
        n: Images.
        back: Images that came back.
        work: Work at which images came back, rising, in rows of one image.
        share: Share that is not back after each of these.
        low: Lower end of its 95 % interval (log-log).
        high: Upper end.
        first: Work at which the first one came back; None where none did.
        censored: The most work that was spent on one that did not; 0 where all came back.
    """

    group: Group
    n: int
    back: int
    work: tuple[int, ...]
    share: tuple[Number, ...]
    low: tuple[Number, ...]
    high: tuple[Number, ...]
    first: int | None
    censored: int


def survival(group: Group, work: Work) -> Survival:
    """Estimate how the images of a group survive work.

    Args:
        group: Which images.
        work: Its images.
    """
    spent = np.array([rows for rows, _ in work.values()], np.float64)
    done = np.array([back for _, back in work.values()], bool)
    if not done.any():
        return Survival(group, len(work), 0, (), (), (), (), None, int(spent.max(initial=0)))
    estimate = ecdf(_censored(spent, done)).sf
    with warnings.catch_warnings():
        # no interval where all or none are back: NaN says so
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = estimate.confidence_interval(method="log-log")
    places = np.isin(estimate.quantiles, spent[done])

    def values(numbers: np.ndarray) -> tuple[float, ...]:
        return tuple(map(float, numbers[places]))

    return Survival(
        group=group,
        n=len(work),
        back=int(done.sum()),
        work=tuple(int(rows) for rows in estimate.quantiles[places]),
        share=values(estimate.probabilities),
        low=values(interval.low.probabilities),
        high=values(interval.high.probabilities),
        first=int(spent[done].min()),
        censored=int(spent[~done].max(initial=0)),
    )


def logrank_p(first: Work, second: Work) -> float:
    """Two-sided p-value of the log-rank test that two groups survive alike.

    NaN where a group is empty or nothing came back in either: there is nothing to compare.
    """
    if not first or not second or not any(back for _, back in [*first.values(), *second.values()]):
        return math.nan
    groups = []
    for work in (first, second):
        spent = np.array([rows for rows, _ in work.values()], np.float64)
        groups.append(_censored(spent, np.array([back for _, back in work.values()], bool)))
    with warnings.catch_warnings():
        # everything at one moment: NaN says that nothing can be compared
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(logrank(*groups).pvalue)


def median(work: Sequence[tuple[float, bool]]) -> float:
    """Work at which the Kaplan-Meier estimate falls to one half; infinite where it does not."""
    estimate = _survivors(work)
    below = estimate.probabilities <= 0.5
    return float(estimate.quantiles[below][0]) if below.any() else math.inf


def restricted_mean(work: Sequence[tuple[float, bool]], horizon: float) -> float:
    """Area under the Kaplan-Meier estimate up to a horizon: mean work, at most that each."""
    estimate = _survivors(work)
    within = estimate.quantiles < horizon
    ends = np.concatenate([[0.0], estimate.quantiles[within], [horizon]])
    shares = np.concatenate([[1.0], estimate.probabilities[within]])
    return float(np.sum(np.diff(ends) * shares))


def _survivors(work: Sequence[tuple[float, bool]]) -> Any:
    spent = np.array([amount for amount, _ in work], np.float64)
    return ecdf(_censored(spent, np.array([back for _, back in work], bool))).sf


def _censored(spent: np.ndarray, done: np.ndarray) -> CensoredData:
    return CensoredData.right_censored(spent, ~done)
