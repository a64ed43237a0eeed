"""What verdict, tables, figures and page share: per-pair results, headline attack, wording."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dori_lightning.types import INITS, KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from dori_lightning.types import Budget, Cell, Condition, Init, Kind, Outcome, Pair, Status

__all__ = [
    "FALSE_POSITIVE_LIMIT",
    "INIT_NAMES",
    "KIND_WORDS",
    "STATUS_WORDS",
    "PairResult",
    "aggregate",
    "attack_trust",
    "budget_words",
    "condition_words",
    "find_cell",
    "headline_condition",
    "interval_words",
    "kinds_present",
    "number_words",
    "pair_results",
    "percent_words",
    "prompt_condition",
]

FALSE_POSITIVE_LIMIT = 0.05
"""An attack counts as credible while it reproduces fewer than this share of the controls."""

Aggregation = Literal["max", "median"]
Trust = Literal["sound", "paints", "unchecked", "none"]

KIND_WORDS: dict[Kind, str] = {
    "vm": "suspected image",
    "tm": "suspected template copy",
    "control": "control image",
}

STATUS_WORDS: dict[Status, str] = {
    "ok": "measured",
    "diverged": "diverged",
    "no_gradient": "no gradient",
}

INIT_NAMES: dict[Init, str] = {
    "prompt": "the own prompt",
    "random": "a random embedding",
    "control_prompt": "an unrelated prompt",
}
"""What an attack starts from, for one pair."""

_INIT_WORDS = {
    "prompt": "from the image's own prompt",
    "random": "from random embeddings",
    "control_prompt": "from unrelated prompts",
}


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


def number_words(count: int, noun: str) -> str:
    """Write a count with its noun: ``1 image``, ``3 images``, ``3 template copies``."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count} {noun if count == 1 else plural}"


def percent_words(rate: float) -> str:
    """Write a rate as a percentage with one decimal near 0 % and 100 %; ``n/a`` for NaN."""
    if math.isnan(rate):
        return "n/a"
    near_edge = 5e-4 <= rate < 0.01 or 0.99 < rate <= 1 - 5e-4
    return f"{100 * rate:.1f} %" if near_edge else f"{100 * rate:.0f} %"


def interval_words(interval: tuple[float, float]) -> str:
    """Write a 95 % interval as ``72 to 99 %``; ``n/a`` for NaN."""
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return "n/a"
    return f"{percent_words(low)[:-2]} to {percent_words(high)}"


def budget_words(budget: Budget) -> str:
    """Write a budget for a reader: ``50 steps, no radius limit``."""
    steps = f"{number_words(budget.steps, 'step')}"
    if budget.norm == "none":
        return f"{steps}, no radius limit"
    norm = {"l2": "L2", "linf": "L-infinity"}[budget.norm]
    return f"{steps}, {norm} radius {budget.eps:g}"


def condition_words(condition: Condition) -> str:
    """Write a condition for a reader: ``attack from random embeddings, 50 steps, ...``."""
    if condition.attack == "prompt":
        return "prompt as it is"
    start = _INIT_WORDS[condition.init] if condition.init else "from an unnamed start"
    return f"attack {start}, {budget_words(condition.budget)}"


def kinds_present(cells: Iterable[Cell]) -> tuple[Kind, ...]:
    """List the kinds of pair that the cells speak of, in the fixed order."""
    present = {cell.kind for cell in cells}
    return tuple(kind for kind in KINDS if kind in present)
