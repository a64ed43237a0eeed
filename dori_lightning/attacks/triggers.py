"""What pictures are drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dori_lightning.types import Condition, Pair, Status

__all__ = ["Trigger"]


@dataclass(frozen=True)
class Trigger:
    """An embedding to generate from, and how it came about.

    Attributes:
        pair: The pair it should reproduce.
        condition: Prompt or attack, with the steps spent so far.
        restart: Which restart.
        embedding: Text embedding (T, D).
        diverged: Whether the attack stopped being finite on the way.
        no_gradient: Whether it had no gradient to follow.
        loss_first: Attack loss at the first step; None for a prompt.
        loss_last: Mean attack loss of the last five steps spent; None for a prompt.
        displacement: Euclidean distance to the initial embedding; None for a prompt.
        losses: Attack loss of every step spent (S,); None for a prompt.
        stopped_at: Steps after which the attack was stopped, fewer than the condition's, because
            its pictures were copies; None where it took all of them.
    """

    pair: Pair
    condition: Condition
    restart: int
    embedding: torch.Tensor
    diverged: bool = False
    no_gradient: bool = False
    loss_first: float | None = None
    loss_last: float | None = None
    displacement: float | None = None
    losses: torch.Tensor | None = None
    stopped_at: int | None = None

    @property
    def spent(self) -> int:
        """Steps that led to the embedding."""
        return self.condition.budget.steps if self.stopped_at is None else self.stopped_at

    @property
    def status(self) -> Status:
        """What came of the attack; ``ok`` for a prompt."""
        return "no_gradient" if self.no_gradient else "diverged" if self.diverged else "ok"
