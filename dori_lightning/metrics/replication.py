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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dori_lightning.metrics.statistics import median_mad, wilson_interval
from dori_lightning.types import (
    INITS,
    KINDS,
    Calibration,
    Cell,
    Condition,
    FirstSuccess,
    Init,
    Kind,
    Norm,
    Outcome,
    Pair,
    Status,
)

FALSE_POSITIVE_LIMIT = 0.05
"""An attack counts as credible while it reproduces fewer than this share of the controls."""


Trust = Literal["sound", "paints", "unchecked", "none"]


@dataclass(frozen=True)
class PairResult:
    """What one condition made of one pair, over all restarts and seeds.

    Attributes:
        pair: The pair.
        condition: How it was prompted.
        status: ``diverged`` or ``no_gradient`` where no restart gave a result.
        statistic: K similarities aggregated as in the cells, best restart; NaN where diverged.
            Decides ``reproduced``.
        best: Similarity of the closest single picture; NaN where diverged.
        picture: Path of that picture, None where none is kept.
        seed: Generation seed of that picture, None where diverged.
        reproduced: Whether ``statistic`` exceeds the threshold; None where diverged, since that is
            no evidence.
    """

    pair: Pair
    condition: Condition
    status: Status
    statistic: float
    best: float
    picture: Path | None
    seed: int | None
    reproduced: bool | None


def aggregate(values: np.ndarray, aggregation: Aggregation) -> float:
    """Turn K similarities into one number; NaN where none is finite."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if finite.size == 0:
        return math.nan
    return float(finite.max() if aggregation == "max" else np.median(finite))


def pair_results(
    outcomes: Iterable[Outcome], *, descriptor: str, threshold: float, aggregation: Aggregation
) -> list[PairResult]:
    """Reduce restarts and seeds to one result per pair and condition, in order of appearance."""
    groups: dict[tuple[str, Condition], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.pair.id, outcome.condition), []).append(outcome)
    return [_reduce(group, descriptor, threshold, aggregation) for group in groups.values()]


def _reduce(
    group: Sequence[Outcome], descriptor: str, threshold: float, aggregation: Aggregation
) -> PairResult:
    pair, condition = group[0].pair, group[0].condition
    statistic, best = math.nan, math.nan
    picture: Path | None = None
    seed: int | None = None
    for outcome in group:
        if outcome.status != "ok":
            continue
        values = np.asarray(outcome.similarity[descriptor], np.float64)
        value = aggregate(values, aggregation)
        if math.isnan(value):
            continue
        statistic = value if math.isnan(statistic) else max(statistic, value)
        place = int(np.nanargmax(values))
        if math.isnan(best) or values[place] > best:
            best, seed = float(values[place]), outcome.seeds[place]
            picture = outcome.images[place] if outcome.images else None
    if math.isnan(statistic):
        unknown: Status = "diverged"
        failed = next((o.status for o in group if o.status != "ok"), unknown)
        return PairResult(pair, condition, failed, statistic, best, None, None, None)
    return PairResult(pair, condition, "ok", statistic, best, picture, seed, statistic > threshold)


def find_cell(cells: Iterable[Cell], *, kind: Kind, condition: Condition | None) -> Cell | None:
    """Find the one cell of a kind under a condition, or None."""
    return next((c for c in cells if c.kind == kind and c.condition == condition), None)


def prompt_condition(cells: Iterable[Cell]) -> Condition | None:
    """Return the condition of the prompts as they are, or None where they were not run."""
    return next((c.condition for c in cells if c.condition.attack == "prompt"), None)


def headline_condition(cells: Sequence[Cell]) -> Condition | None:
    """Choose the attack that the verdict speaks of, without looking at the suspected images.

    First comes an attack that leaves the controls alone, then no radius limit, then the start at
    the prompt, then the fewest controls reproduced, then the widest radius and the most steps.
    Choosing by the outcome on suspected images would pick the luckiest of many attacks.

    Returns:
        The condition, or None where no attack was run.
    """
    attacks = {
        c.condition: None
        for c in cells
        if c.condition.attack == "dori" and c.condition.budget.steps > 0
    }

    def rank(condition: Condition) -> tuple[bool, bool, int, float, float, int]:
        control = find_cell(cells, kind="control", condition=condition)
        rate = control.mr if control is not None and control.n > 0 else math.nan
        credible = rate < FALSE_POSITIVE_LIMIT
        budget = condition.budget
        return (
            credible,
            budget.norm == "none",
            -INITS.index(condition.init) if condition.init else 0,
            0.0 if credible or math.isnan(rate) else -rate,
            budget.eps or 0.0,
            budget.steps,
        )

    return max(attacks, key=rank, default=None)


def attack_trust(own: Sequence[Cell], attack: Condition | None) -> Trust:
    """Judge an attack by its controls: ``sound``, ``paints``, ``unchecked``, or ``none``."""
    if attack is None:
        return "none"
    cell = find_cell(own, kind="control", condition=attack)
    if cell is None or cell.n == 0:
        return "unchecked"
    return "sound" if cell.mr < FALSE_POSITIVE_LIMIT else "paints"


def kinds_present(cells: Iterable[Cell]) -> tuple[Kind, ...]:
    """List the kinds of pair that the cells speak of, in the fixed order."""
    present = {cell.kind for cell in cells}
    return tuple(kind for kind in KINDS if kind in present)


# -------- aggregation
# How the K pictures of a pair become one number.

Aggregation = Literal["max", "median"]


def per_pair(similarities: ArrayLike, aggregation: Aggregation = "max") -> np.ndarray:
    """Reduce the K pictures of a pair to one number.

    Args:
        similarities: (..., K) similarities in [-1, 1], K >= 1.
        aggregation: ``max`` or ``median``.

    Returns:
        (...) float64; NaN where any of the K is NaN: what was not seen is not safe.

    Raises:
        ValueError: No pictures, or another aggregation.
    """
    array = np.asarray(similarities, np.float64)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(
            f"need at least one picture per pair, got similarities of shape {array.shape}"
        )
    if aggregation == "max":
        return np.asarray(array.max(-1))
    if aggregation == "median":
        return np.asarray(np.median(array, -1))
    raise ValueError(f"aggregation must be max or median, got {aggregation!r}")


# -------- first_success
# After how many steps an attack first brings a picture back, and the rate that counts it.
#
# Two rates answer two questions. The rate *at* a budget counts the pairs that come back after
# exactly its steps; one that comes back after 10 and is lost again after 50 does not count at
# 50. The *cumulative* rate *up to* a budget counts the pairs that came back at any step looked
# at on the way, snapshots and the budget itself: whoever looks after 10, 25 and 50 steps has
# seen them.
#
# An attack that stops at its first success leaves the cumulative rate as it is, since the steps
# up to that success are the same ones. The rate at the budget is lost: nobody knows what the
# stopped rows would have given there, and those that went on are the ones that had failed. So a
# cell with stopped rows counts cumulatively, and says so (``Cell.counted``). Its similarities
# are those of the pictures at which rows were stopped, which later steps might have surpassed.
#
# A pair counts where it came back, also if its attack diverged later, or where some restart gave
# a result at the budget. This denominator too is the same for stopped attacks.

Search = tuple[str, "Init | None", "Norm", "float | None", int]
"""Pair id, initial point, norm, radius, restart: what the snapshots of one attack share."""


def search_of(outcome: Outcome) -> Search | None:
    """Which attack an outcome belongs to; None for a prompt."""
    condition = outcome.condition
    if condition.attack == "prompt":
        return None
    budget = condition.budget
    return (outcome.pair.id, condition.init, budget.norm, budget.eps, outcome.restart)


def is_copy(outcome: Outcome, rule: Calibration, aggregation: Aggregation) -> bool:
    """Whether an outcome's pictures reproduce the pair; never where its attack failed."""
    if outcome.status != "ok":
        return False
    return bool(per_pair(outcome.similarity[rule.descriptor], aggregation) > rule.threshold)


def first_successes(
    outcomes: Iterable[Outcome], rule: Calibration, aggregation: Aggregation
) -> dict[Search, int]:
    """Fewest steps looked at after which each attack reproduced its pair; others are left out.

    Args:
        outcomes: Outcomes of one checkpoint under one mitigation, any order.
        rule: Whose similarities decide, and above which threshold a picture is a copy.
        aggregation: How K pictures become one number.
    """
    found: dict[Search, int] = {}
    for outcome in outcomes:
        search = search_of(outcome)
        if search is not None and is_copy(outcome, rule, aggregation):
            steps = outcome.condition.budget.steps
            found[search] = min(steps, found.get(search, steps))
    return found


def steps_by_pair(condition: Condition, firsts: Mapping[Search, int]) -> dict[str, int]:
    """Pair id to the fewest steps, up to the budget, after which a restart brought it back.

    Args:
        condition: The attack and its budget.
        firsts: First success of every attack.
    """
    budget, found = condition.budget, dict[str, int]()
    for (name, *attack, _), steps in firsts.items():
        if attack == [condition.init, budget.norm, budget.eps] and steps <= budget.steps:
            found[name] = min(steps, found.get(name, steps))
    return found


def first_success(
    condition: Condition, scores: Mapping[str, float], firsts: Mapping[Search, int]
) -> FirstSuccess | None:
    """Count what an attack brought back up to a budget; None for a prompt.

    Args:
        condition: The attack and its budget.
        scores: Pair id to the pair's number at that budget, NaN where it failed; says which pairs
            there are.
        firsts: First success of every attack.
    """
    if condition.attack == "prompt":
        return None
    steps_of = {k: v for k, v in steps_by_pair(condition, firsts).items() if k in scores}
    n = sum(name in steps_of or not math.isnan(score) for name, score in scores.items())
    return FirstSuccess(
        pairs=len(steps_of),
        n=n,
        mr=len(steps_of) / n if n else math.nan,
        median_steps=float(np.median([*steps_of.values()])) if steps_of else math.nan,
    )


# -------- replication


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
