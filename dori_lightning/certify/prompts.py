"""The prompts themselves: what anybody finds who has the training captions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from dori_lightning.certify.base import AttackBase, Attempt, Holds, Plan, Subject
from dori_lightning.types import Pair


@dataclass(frozen=True)
class Prompts(AttackBase):
    """Draw from each image's own prompt, as an audit does.

    Attributes:
        name: How reports call it.
    """

    LEVEL: ClassVar[str] = "its prompt"
    name: str = "prompts"
    gradient_free: bool = field(default=True, init=False)
    holds: Holds = field(default="prompt", init=False)

    def rows(self, plan: Plan) -> int:
        """K images."""
        return plan.drawing

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Draw K images of each pair."""
        del pairs
        left = attempt.left(self.LEVEL)
        if not left:
            return
        with subject.carried():
            images = subject.draw(subject.prompts(left))
        attempt.add(self.LEVEL, images, rows=subject.drawing)
