"""What an attack took, and what stopping it early saved, counted and not timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori_lightning.metrics.first_success import search_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dori_lightning.types import Outcome

__all__ = ["AttackEffort", "attack_effort"]


@dataclass(frozen=True)
class AttackEffort:
    """Evaluations of the UNet, in rows, that the results rest on.

    What a resumed run did not do again is counted, and rows that only fill up a pass are not; what
    went through the UNet in one process is ``provenance.unet_evaluations``.

    Attributes:
        attack: Of the search: noise samples of every step taken.
        attack_saved: Of steps that stopped attacks did not take.
        pictures: Of drawing from embeddings found by the attack.
        pictures_saved: Of pictures of later budgets that stopped attacks did not draw.
    """

    attack: int
    attack_saved: int
    pictures: int
    pictures_saved: int


def attack_effort(
    outcomes: Iterable[Outcome], *, noise_batch: int, picture_evaluations: int
) -> AttackEffort:
    """Count what the attack took.

    Args:
        outcomes: Outcomes under the edit, all budgets of an attack.
        noise_batch: Noise samples of a pair and step.
        picture_evaluations: Evaluations that one picture takes.
    """
    taken: dict[object, int] = {}
    asked: dict[object, int] = {}
    drawn = spared = 0
    for outcome in outcomes:
        search, steps = search_of(outcome), outcome.condition.budget.steps
        if search is None:
            continue
        stopped = outcome.stopped_at is not None
        drawn += 0 if stopped else len(outcome.seeds)
        spared += len(outcome.seeds) if stopped else 0
        taken[search] = max(taken.get(search, 0), 0 if stopped else steps)
        asked[search] = max(asked.get(search, 0), steps)
    spent, wanted = sum(taken.values()), sum(asked.values())
    return AttackEffort(
        attack=spent * noise_batch,
        attack_saved=(wanted - spent) * noise_batch,
        pictures=drawn * picture_evaluations,
        pictures_saved=spared * picture_evaluations,
    )
