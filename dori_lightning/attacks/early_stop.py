"""Attack from snapshot to snapshot, and stop where a pair came back.

The rows that are left share passes anew after each snapshot. Each has its own draws and its own
Adam state, so it takes the steps that it would have taken beside those that were stopped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from dori_lightning.attacks.triggers import Trigger
    from dori_lightning.types import Pair

__all__ = ["stop_at_success"]


def stop_at_success(
    attack: Callable[[Sequence[Pair], range], None],
    read: Callable[[Pair], Sequence[Trigger]],
    pairs: Sequence[Pair],
    *,
    ends: Sequence[int],
    reproduced: Callable[[Sequence[Trigger]], Collection[str]],
) -> list[Trigger]:
    """Attack pairs from one initial point and restart until each comes back or the end.

    Args:
        attack: Takes pairs through steps.
        read: Triggers of a pair's attack so far, one for each step looked at.
        pairs: Whom to attack.
        ends: Steps to look at, rising; the last one is the budget.
        reproduced: Ids of the pairs that triggers bring back.

    Returns:
        One trigger per pair and end; after a pair came back, the one that brought it back.
    """
    found: dict[str, list[Trigger]] = {pair.id: [] for pair in pairs}
    left, begin = list(pairs), 0
    for end in ends:
        attack(left, range(begin, end))
        fresh = {
            pair.id: next(t for t in read(pair) if t.condition.budget.steps == end)
            for pair in left
        }
        for name, held in found.items():
            held.append(fresh[name] if name in fresh else _stopped(held[-1], end))
        back = reproduced([*fresh.values()]) if fresh else ()
        left, begin = [pair for pair in left if pair.id not in back], end
    return [trigger for held in found.values() for trigger in held]


def _stopped(trigger: Trigger, steps: int) -> Trigger:
    """What stands for a later budget where the attack was stopped."""
    condition = trigger.condition
    return replace(
        trigger,
        condition=replace(condition, budget=replace(condition.budget, steps=steps)),
        stopped_at=trigger.spent,
    )
