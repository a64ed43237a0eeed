"""Refill: weights that pruning zeroed are estimated from those that it left.

A zero says where something was removed, and the rest of the layer says something about what.
Reference: *Roots Beneath the Cut* (2603.06640); completion by a limited rank is the hard-impute of
Mazumder, Hastie and Tibshirani (2010).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from dori_lightning.certify.base import (
    Afterwards,
    AttackBase,
    Attempt,
    Holds,
    Plan,
    Subject,
)
from dori_lightning.certify.embeddings import EmbeddingSearch, search_from_prompt, search_level
from dori_lightning.certify.prompts import Prompts
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import LayeredEdit, MaskEdit, PairMaskEdit, WeightEdit
from dori_lightning.mitigations.finetuning import FinetunedMitigation
from dori_lightning.mitigations.prompt_adjustment import PromptAdjustment
from dori_lightning.models.protocol import TextToImage
from dori_lightning.types import InputError, Pair

Filling = Literal["means", "low rank"]


@dataclass(frozen=True)
class Refill(AttackBase):
    """Fill what is pruned, draw from the prompts, and search from them.

    Filled with means, a weight is that of its output row, or of its column where the whole row is
    gone. At a low rank, what is missing is what the closest matrix of that rank has there.

    Attributes:
        rank: Rank of a layer's weight (C_out, the rest).
        iterations: Projections on that rank.
        search: Steps of a search from the prompt under each filling; 0 for none.
    """

    name: str = "refill"
    rank: int = 8
    iterations: int = 50
    search: int = 25
    holds: Holds = field(default="weights", init=False)

    def __post_init__(self) -> None:
        if self.rank < 1 or self.iterations < 1 or self.search < 0:
            raise InputError(
                f"{self.name} needs rank >= 1, iterations >= 1 and search >= 0, got {self.rank}, "
                f"{self.iterations} and {self.search}",
                where=f"certify.attacks.{self.name}",
            )

    def check(self, plan: Plan) -> None:
        """Refuse what is known not to prune.

        Raises:
            InputError: The mitigation is one of these.
        """
        other = NoMitigation, FinetunedMitigation, PromptAdjustment
        if isinstance(plan.mitigation, other):
            raise self._refused(plan.mitigation.name)

    def _refused(self, mitigation: str) -> InputError:
        return InputError(
            f"attack={self.name} without a mask edit: mitigation={mitigation} zeroes no weights "
            f"that could be filled",
            where="certify.paths",
            fix=f"leave {self.name} out of certify.paths, or choose a mitigation that prunes, "
            f"such as mitigation=wanda_10",
        )

    def applies(self, subject: Subject) -> bool:
        """On what is pruned: not on a reference, nor where zeros were trained away."""
        return subject.role == "audited"

    def rows(self, plan: Plan) -> int:
        """K images under each filling, and the searches."""
        searched = search_from_prompt(self.search).rows(plan) if self.search else 0
        return len(self._fillings) * (plan.drawing + searched)

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Fill and draw, then fill and search.

        Raises:
            InputError: The edit is none of masks.
        """
        if not isinstance(subject.edit, MaskEdit | PairMaskEdit):
            raise self._refused(subject.context.mitigation.name)
        ways: list[tuple[Prompts | EmbeddingSearch, str]] = [(Prompts(), Prompts.LEVEL)]
        if self.search:
            ways.append((search_from_prompt(self.search), search_level(self.search)))
        first = Afterwards(attempt, self._fillings["means"]).left(Prompts.LEVEL)
        for one, ids in subject.by_weights(first):
            known: dict[Filling, LayeredEdit] = {}
            for attack, level in ways:
                for filling, done in self._fillings.items():
                    after = Afterwards(attempt, done, only=ids)
                    if after.left(level):
                        if filling not in known:
                            known[filling] = self._filled(one, filling)
                        attack.run(one.with_edit(known[filling]), pairs, after)

    @property
    def _fillings(self) -> dict[Filling, str]:
        """Fillings, and what a report calls them."""
        return {
            "means": "zeros filled with means",
            "low rank": f"zeros filled at rank {self.rank}",
        }

    def _filled(self, subject: Subject, filling: Filling) -> LayeredEdit:
        """The masks of one set of weights, filled."""
        edit = subject.edit
        assert isinstance(edit, MaskEdit)
        rank = self.rank if filling == "low rank" else None
        return fill(subject.model, edit, rank=rank, iterations=self.iterations)


def fill(model: TextToImage, edit: MaskEdit, *, rank: int | None, iterations: int) -> LayeredEdit:
    """Fill what an edit prunes, from the weights that it leaves alone.

    Args:
        model: The model.
        edit: The edit.
        rank: Rank of a weight; None for means alone.
        iterations: Projections on that rank.
    """
    weights = {}
    for name, mask, parameter in edit.pruned(model):
        weight = parameter.detach().float()
        # a bias is one row
        flat = weight.flatten(1) if weight.dim() > 1 else weight[None]
        rows = mask.to(weight.device).reshape(*mask.shape, *[1] * (weight.dim() - mask.dim()))
        missing = rows.expand_as(weight).reshape(flat.shape)
        filled = fill_means(flat, missing)
        if rank is not None and weight.dim() > 1:
            filled = complete(filled, missing, rank=rank, iterations=iterations)
        weights[name] = filled.reshape(weight.shape).to(parameter.dtype).cpu()
    return LayeredEdit.over(edit, WeightEdit(edit.origin, weights))


def fill_means(weight: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """Give missing numbers of a matrix the mean of their row, or of their column without any.

    Args:
        weight: Matrix (M, N).
        missing: Which of its numbers are not known (M, N), bool.
    """
    known = weight.masked_fill(missing, 0)
    counts = (~missing).float()
    rows = known.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1)
    columns = known.sum(0, keepdim=True) / counts.sum(0, keepdim=True).clamp_min(1)
    means = torch.where(missing.all(1, keepdim=True), columns, rows)
    return torch.where(missing, means, weight)


def complete(
    filled: torch.Tensor, missing: torch.Tensor, *, rank: int, iterations: int
) -> torch.Tensor:
    """Complete a matrix so that what was missing is what a matrix of low rank has there.

    Each projection goes on from the subspace of the one before (orthogonal iteration), so it costs
    two products instead of a decomposition.

    Args:
        filled: Matrix (M, N) with a first guess where numbers are missing.
        missing: Where (M, N), bool.
        rank: The rank.
        iterations: Projections.
    """
    _, _, right = torch.linalg.svd(filled, full_matrices=False)
    basis = right[:rank].T
    for _ in range(iterations):
        left, _ = torch.linalg.qr(filled @ basis)
        inside = left.T @ filled
        filled = torch.where(missing, left @ inside, filled)
        basis, _ = torch.linalg.qr(inside.T)
    return filled
