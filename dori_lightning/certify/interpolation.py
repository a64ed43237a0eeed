"""Interpolation: weights are moved part of the way back to the unmitigated checkpoint.

Who holds both files, or merges the mitigated model with another descendant of the same base, walks
this line. How far one has to go says how deep the images were buried.
Reference: *Editing Models with Task Arithmetic* (2212.04089): an edit is a direction in the space
of weights, and can be taken back by shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dori_lightning.certify.base import Afterwards, AttackBase, Attempt, Holds, Plan, Subject
from dori_lightning.certify.embeddings import search_from_prompt
from dori_lightning.certify.prompts import Prompts
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import Edit, LayeredEdit, Origin, WeightEdit
from dori_lightning.mitigations.prompt_adjustment import PromptAdjustment
from dori_lightning.models.protocol import TextToImage
from dori_lightning.types import InputError, Pair


@dataclass(frozen=True)
class Interpolation(AttackBase):
    """Move the weights back towards the unmitigated checkpoint, and draw from the prompts.

    Attributes:
        shares: Shares of the way, rising, in (0, 1); 1 would be the unmitigated checkpoint.
        search: Steps of a search from the prompt at the last share; 0 for none.
    """

    name: str = "interpolation"
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    search: int = 0
    holds: Holds = field(default="weights", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        rising = sorted(set(self.shares))
        if not rising or list(self.shares) != rising or not 0 < rising[0] <= rising[-1] < 1:
            raise InputError(
                f"shares of {self.name} must rise and lie between 0 and 1, got "
                f"{list(self.shares)}",
                where=f"certify.attacks.{self.name}.shares",
                fix="such as [0.25,0.5,0.75]",
            )
        if self.search < 0:
            raise InputError(
                f"search of {self.name} must be >= 0, got {self.search}",
                where=f"certify.attacks.{self.name}.search",
            )

    def check(self, plan: Plan) -> None:
        """Refuse where no weights were moved.

        Raises:
            InputError: There is no mitigation, or it is a filter.
        """
        if isinstance(plan.mitigation, NoMitigation):
            raise self._refused("there is no mitigation to move back from")
        if isinstance(plan.mitigation, PromptAdjustment):
            raise self._refused(f"{plan.mitigation.name} changes no weights")

    def _refused(self, why: str) -> InputError:
        return InputError(
            f"attack={self.name}: {why}",
            where="certify.paths",
            fix=f"leave {self.name} out of certify.paths, or choose a mitigation that changes "
            f"weights",
        )

    def applies(self, subject: Subject) -> bool:
        """Not on a reference, which carries no mitigation."""
        return subject.role != "reference"

    def rows(self, plan: Plan) -> int:
        """K images at each share, and the search."""
        searched = search_from_prompt(self.search).rows(plan) if self.search else 0
        return len(self.shares) * plan.drawing + searched

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Move, and draw.

        Raises:
            InputError: The edit changes no weights.
        """
        if subject.edit.changed(subject.model) is None:
            raise self._refused("the edit changes no weights")
        for share in self.shares:
            done = f"{share:.0%} of the way back"
            left = Afterwards(attempt, done).left(Prompts.LEVEL)
            for one, ids in subject.by_weights(left):
                moved = one.with_edit(moved_back(one.model, one.edit, share))
                after = Afterwards(attempt, done, only=ids)
                Prompts().run(moved, pairs, after)
                if self.search and share == self.shares[-1]:
                    search_from_prompt(self.search).run(moved, pairs, after)


def moved_back(model: TextToImage, edit: Edit, share: float) -> LayeredEdit:
    """An edit with a share of what it did to the weights undone.

    Of weights that were trained on top of a mitigation, what the mitigation did is undone, and
    what was trained stays.

    Args:
        model: The model, without any edit.
        edit: The edit, with the same weights for all pairs.
        share: Share of the way back, in [0, 1].
    """
    mitigation = edit.base if isinstance(edit, LayeredEdit) else edit
    known = dict(model.denoiser().named_parameters())
    names = [name for name, count in (mitigation.changed(model) or {}).items() if count]
    before = {name: known[name].detach().clone() for name in names}
    with mitigation.applied(model):
        way = {name: before[name] - known[name].detach() for name in names}
    with edit.applied(model):
        moved = {name: (known[name].detach() + share * way[name]).cpu() for name in names}
    return LayeredEdit.over(edit, WeightEdit(Origin(model.fingerprint), moved))
