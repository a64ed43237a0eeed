"""What an attack may spend: steps, and a ball around the initial embedding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dori_lightning.types import Budget, InputError, Norm

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["BudgetSettings", "looked_at", "median_distance", "project"]

_NEEDS_CONTROLS = (
    "a relative budget needs at least two control pairs with different prompts; add pairs of "
    "kind control or set attack.budget.relative=false"
)


@dataclass(frozen=True)
class BudgetSettings:
    """A budget before the checkpoint is known.

    Attributes:
        norm: ``none`` limits the steps alone (the paper's budget), ``l2`` and ``linf`` also
            project onto a ball around the initial embedding.
        radius: Radius of the ball; ignored where ``norm`` is ``none``.
        relative: Whether ``radius`` is a multiple of the median distance (in the same norm)
            between the embeddings of control prompts, which makes it comparable across
            checkpoints, or absolute in CLIP units.
        steps: Gradient steps.
    """

    norm: Norm = "none"
    radius: float | None = None
    relative: bool = True
    steps: int = 50

    def __post_init__(self) -> None:
        if self.norm not in ("none", "l2", "linf"):
            raise InputError(f"attack.budget.norm must be none, l2 or linf, got {self.norm!r}")
        if self.steps < 0:
            raise InputError(f"attack.budget.steps must be >= 0, got {self.steps}")
        if self.norm != "none" and (self.radius is None or not 0 <= self.radius < math.inf):
            raise InputError(
                f"attack.budget.radius must be a number >= 0 for norm {self.norm}, "
                f"got {self.radius}"
            )

    def resolve(self, control_embeddings: torch.Tensor | None) -> Budget:
        """Fix the radius for a checkpoint.

        Args:
            control_embeddings: Embeddings (M, T, D) of control prompts, None where there are none.

        Raises:
            InputError: The radius is relative but there are fewer than two different control
                prompts.
        """
        if self.norm == "none" or self.radius is None:
            return Budget("none", None, self.steps)
        if not self.relative:
            return Budget(self.norm, float(self.radius), self.steps)
        if control_embeddings is None:
            raise InputError(_NEEDS_CONTROLS)
        return Budget(
            self.norm,
            float(self.radius) * median_distance(control_embeddings, self.norm),
            self.steps,
        )


def looked_at(snapshots: Iterable[int], steps: int) -> tuple[int, ...]:
    """Steps after which an attack is measured: snapshots on its way, and its end, rising."""
    return tuple(sorted({s for s in snapshots if 0 <= s <= steps} | {steps}))


def median_distance(embeddings: torch.Tensor, norm: Norm) -> float:
    """Median pairwise distance of embeddings, over all numbers of each.

    Args:
        embeddings: Embeddings (M, T, D).
        norm: ``l2`` for the Euclidean norm, otherwise the maximum norm.

    Raises:
        InputError: Fewer than two embeddings differ.
    """
    flat = embeddings.flatten(1).double()
    p = 2.0 if norm == "l2" else math.inf
    distances = torch.pdist(flat, p)
    if len(distances) == 0 or float(distances.max()) == 0:
        raise InputError(_NEEDS_CONTROLS)
    return float(distances[distances > 0].median())


def project(delta: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Nearest point to ``delta`` in the budget's ball, each row for itself.

    Args:
        delta: Offsets (N, T, D) from the initial embeddings.
        budget: Radius and norm; ``none`` returns ``delta`` as it is.
    """
    if budget.norm == "none" or budget.eps is None:
        return delta
    if budget.norm == "linf":
        return delta.clamp(-budget.eps, budget.eps)
    length: torch.Tensor = delta.flatten(1).norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
    return delta * (budget.eps / length).clamp(max=1.0)[:, None, None]
