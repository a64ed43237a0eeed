"""From similarities to memorization rates: one verdict per pair from K pictures and R restarts.

Rules, in order:

1. The K pictures of one outcome become one number by their maximum (one replica among K pictures
   is a leak) or their median (the paper reports both kinds of table).
2. A pair counts as reproduced if *any* of its restarts reproduces it: the number of a pair is the
   highest among its restarts. More restarts can only find more.
3. A restart that diverged says nothing. A pair whose every restart diverged is *failed*: it is
   left out of the denominator and shown, because counting it as safe would reward a mitigation
   for breaking the attack's numerics.
4. Similarity strictly above the threshold is a replica.
5. A cell counts what comes back at its budget. Beside it stands what came back at any step looked
   at up to there (``first_success``); where attacks were stopped at a success, only that is known.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dori_lightning.metrics.aggregation import Aggregation, per_pair
from dori_lightning.metrics.first_success import first_success, first_successes
from dori_lightning.metrics.statistics import median_mad, wilson_interval
from dori_lightning.types import Cell

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike

    from dori_lightning.types import Calibration, Condition, Kind, Outcome

__all__ = [
    "Aggregation",
    "MemorizationRate",
    "ReplicationSimilarity",
    "cells",
    "diversity",
    "pair_scores",
    "per_pair",
    "repeated_pictures",
]


def pair_scores(
    outcomes: Iterable[Outcome], descriptor: str, *, aggregation: Aggregation = "max"
) -> dict[str, float]:
    """Reduce the outcomes of one condition to one number per pair, the highest among its restarts.

    Args:
        outcomes: Outcomes of one condition; restarts of a pair are told apart by ``restart``.
        descriptor: Whose similarities.
        aggregation: ``max`` or ``median`` over a restart's pictures.

    Returns:
        Pair id to number in [-1, 1], in order of appearance; NaN where every restart diverged.

    Raises:
        ValueError: The descriptor is missing from an outcome, or a restart comes twice.
    """
    scores: dict[str, float] = {}
    seen: set[tuple[str, int]] = set()
    for outcome in outcomes:
        key = (outcome.pair.id, outcome.restart)
        if key in seen:
            raise ValueError(
                f"pair {key[0]} has two outcomes for restart {key[1]} of one condition"
            )
        seen.add(key)
        if descriptor not in outcome.similarity:
            offered = ", ".join(outcome.similarity) or "none"
            raise ValueError(
                f"pair {key[0]} has no similarities by {descriptor}, only by {offered}"
            )
        score = math.nan
        if outcome.status == "ok":
            score = float(per_pair(outcome.similarity[descriptor], aggregation))
        previous = scores.get(outcome.pair.id, math.nan)
        scores[outcome.pair.id] = float(
            np.fmax(previous, score)
        )  # fmax prefers the number over NaN
    return scores


def cells(
    outcomes: Iterable[Outcome],
    calibration: Calibration,
    *,
    checkpoint: str,
    mitigation: str,
    aggregation: Aggregation = "max",
) -> tuple[Cell, ...]:
    """Count reproduced pairs per condition and kind, by the rules at the top of this module.

    Pairs that repeat another pair's picture (``duplicate_of``) count like any other; how many
    there are is ``repeated_pictures(outcomes)``.

    Args:
        outcomes: Outcomes of one checkpoint under one mitigation, any order, all restarts.
        calibration: Deciding descriptor and threshold.
        checkpoint: Name for the rows.
        mitigation: Name for the rows.
        aggregation: ``max`` or ``median`` over the K pictures.

    Returns:
        One row per (condition, kind), in order of appearance.

    Raises:
        ValueError: As ``pair_scores``.
    """
    outcomes = list(outcomes)
    firsts = first_successes(outcomes, calibration, aggregation)
    groups: dict[tuple[Condition, Kind], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.condition, outcome.pair.kind), []).append(outcome)
    rows = []
    for (condition, kind), group in groups.items():
        by_pair = pair_scores(group, calibration.descriptor, aggregation=aggregation)
        scores = np.array(list(by_pair.values()))
        known = scores[~np.isnan(scores)]
        n, hits = int(known.size), int((known > calibration.threshold).sum())
        spread = median_mad(known)
        rows.append(
            Cell(
                checkpoint=checkpoint,
                mitigation=mitigation,
                condition=condition,
                kind=kind,
                n=n,
                failed=int(scores.size) - n,
                hits=hits,
                mr=hits / n if n else math.nan,
                mr_ci95=wilson_interval(hits, n),
                similarity_median=spread.median,
                similarity_mad=spread.mad,
                descriptor=calibration.descriptor,
                threshold=calibration.threshold,
                aggregation=aggregation,
                counted="at_budget"
                if all(outcome.stopped_at is None for outcome in group)
                else "up_to_budget",
                first_success=first_success(condition, by_pair, firsts),
            )
        )
    return tuple(rows)


def repeated_pictures(outcomes: Iterable[Outcome]) -> int:
    """Count the pairs that repeat an earlier pair's picture: no independent evidence."""
    return len({o.pair.id for o in outcomes if o.pair.duplicate_of is not None})


def diversity(similarity: ArrayLike) -> float:
    """Mean similarity among the K pictures of one prompt; lower is more diverse.

    Args:
        similarity: (K, K) similarities of the pictures with each other.

    Returns:
        Mean of the strict lower triangle, in [-1, 1]; NaN where K is 1.

    Raises:
        ValueError: Not a square matrix.

    Reference: D_SSCD of Finding NeMo (Hintersdorf et al., 2024), https://arxiv.org/abs/2406.02366,
        whose code takes the median over the triangle.
    """
    matrix = np.asarray(similarity, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"similarity must be (K, K), got {matrix.shape}")
    below = matrix[np.tril_indices(len(matrix), -1)]
    return float(below.mean()) if below.size else math.nan


class _PairMetric(Metric):
    """Keeps one number per pair; ranks may hold different counts of pairs, also none.

    The K pictures are reduced on arrival: torchmetrics stands in for a rank without data with an
    empty fp32 vector, which only joins vectors.
    """

    full_state_update = False
    is_differentiable = False
    scores: list[Tensor]

    def __init__(self, aggregation: Aggregation = "max", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if aggregation not in ("max", "median"):
            raise ValueError(f"aggregation must be max or median, got {aggregation!r}")
        self.aggregation: Aggregation = aggregation
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    def update(self, similarity: Tensor) -> None:
        """Add pairs.

        Args:
            similarity: (B, K) similarities in [-1, 1], one row per pair.

        Raises:
            ValueError: Not (B, K), or NaN: leave failed pairs out and count them.
        """
        if similarity.ndim != 2 or bool(similarity.isnan().any()):
            raise ValueError(
                "similarity must be (B, K) without NaN (leave failed pairs out and count them), "
                f"got {tuple(similarity.shape)} with {int(similarity.isnan().sum())} NaN"
            )
        scores = per_pair(similarity.detach().float().cpu().numpy(), self.aggregation)
        self.scores.append(torch.as_tensor(scores, dtype=torch.float32, device=self.device))

    def _pooled(self) -> np.ndarray:
        """All pairs' numbers, (N,) float64."""
        if isinstance(self.scores, list) and not self.scores:
            return np.empty(0)
        return dim_zero_cat(self.scores).double().cpu().numpy()


class MemorizationRate(_PairMetric):
    """Share of pairs reproduced, with its Wilson interval, across batches and ranks."""

    higher_is_better = False

    def __init__(self, threshold: float, aggregation: Aggregation = "max", **kwargs: Any) -> None:
        """Choose the verdict.

        Args:
            threshold: Similarity in [-1, 1] above which a pair counts as reproduced.
            aggregation: ``max`` or ``median`` over the K pictures.
            **kwargs: Of ``torchmetrics.Metric``.
        """
        super().__init__(aggregation, **kwargs)
        self.threshold = threshold

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rate in [0, 1] (NaN without pairs), lower and upper bound at 95 %: three scalars."""
        scores = self._pooled()
        hits, n = int((scores > self.threshold).sum()), len(scores)
        low, high = wilson_interval(hits, n)
        rate, low_bound, high_bound = (
            torch.tensor(x, device=self.device) for x in (hits / n if n else math.nan, low, high)
        )
        return rate, low_bound, high_bound


class ReplicationSimilarity(_PairMetric):
    """Median over pairs of the per-pair similarity, with its median absolute deviation."""

    higher_is_better = False

    def compute(self) -> tuple[Tensor, Tensor]:
        """Median and median absolute deviation: two scalars, NaN without pairs."""
        spread = median_mad(self._pooled())
        return torch.tensor(spread.median, device=self.device), torch.tensor(
            spread.mad, device=self.device
        )
