"""Does one condition reproduce other pairs than another? Exact, paired, and corrected for many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori_lightning.metrics.statistics import mcnemar_exact

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Paired", "holm", "paired"]


@dataclass(frozen=True)
class Paired:
    """The same pairs under two conditions.

    Attributes:
        n: Pairs with a result under both.
        lost: Reproduced under the first only.
        gained: Reproduced under the second only.
        p: Two-sided exact McNemar p-value.
    """

    n: int
    lost: int
    gained: int
    p: float


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
