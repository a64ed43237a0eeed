"""After how many steps an attack first brings a picture back, and the rate that counts it.

Two rates answer two questions. The rate *at* a budget counts the pairs that come back after
exactly its steps; one that comes back after 10 and is lost again after 50 does not count at 50.
The *cumulative* rate *up to* a budget counts the pairs that came back at any step looked at on the
way, snapshots and the budget itself: whoever looks after 10, 25 and 50 steps has seen them.

An attack that stops at its first success leaves the cumulative rate as it is, since the steps up
to that success are the same ones. The rate at the budget is lost: nobody knows what the stopped
rows would have given there, and those that went on are the ones that had failed. So a cell with
stopped rows counts cumulatively, and says so (``Cell.counted``). Its similarities are those of the
pictures at which rows were stopped, which later steps might have surpassed.

A pair counts where it came back, also if its attack diverged later, or where some restart gave a
result at the budget. This denominator too is the same for stopped attacks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dori_lightning.metrics.aggregation import per_pair
from dori_lightning.types import FirstSuccess

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dori_lightning.metrics.aggregation import Aggregation
    from dori_lightning.types import Calibration, Condition, Init, Norm, Outcome

__all__ = ["Search", "first_success", "first_successes", "is_copy", "search_of", "steps_by_pair"]

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
