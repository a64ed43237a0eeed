"""What a search of embeddings is asked, what it found, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AttackProblem", "AttackResult", "SearchState", "joined"]


@dataclass(frozen=True)
class AttackProblem:
    """N independent searches that share forward passes and nothing else.

    Attributes:
        ids: Pair ids, length N.
        restart: Which restart the rows are.
        latents: Latents of the pictures to reproduce (N, C, h, w).
        initial: Initial embeddings (N, T, D).
        restarts: Each row's own restart, length N; None where all rows are ``restart``.
    """

    ids: tuple[str, ...]
    restart: int
    latents: torch.Tensor
    initial: torch.Tensor
    restarts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SearchState:
    """Where N searches stand between two steps, fp32 on the CPU unless said otherwise.

    Attributes:
        delta: Offsets from the initial embeddings (N, T, D); a sum would lose last bits.
        mean: Adam's running means (N, T, D).
        square: Adam's running means of squares (N, T, D).
        count: Steps that Adam took of each row (N,), float64.
    """

    delta: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True)
class AttackResult:
    """What the searches found.

    Attributes:
        ids: Pair ids, length N.
        restart: Which restart.
        embeddings: Embeddings after each snapshot, (N, S, T, D), fp32 on the CPU.
        snapshots: Steps after which embeddings were kept, length S; 0 is the initial point.
        losses: Attack loss at each step taken (N, steps), before the step's update; NaN after
            divergence.
        diverged: Whether the loss or gradient stopped being finite (N,); such a row keeps its
            last finite point.
        no_gradient: Whether the first gradient was exactly zero (N,): the text does not reach the
            loss. Such a row stays where it began, and its losses are NaN.
        state: What the searches need to go on; None where they took all their steps.
    """

    ids: tuple[str, ...]
    restart: int
    embeddings: torch.Tensor
    snapshots: tuple[int, ...]
    losses: torch.Tensor
    diverged: torch.Tensor
    no_gradient: torch.Tensor
    state: SearchState | None = None

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return int(self.losses.shape[1])


def joined(results: Sequence[AttackResult]) -> AttackResult:
    """Put the rows of searches side by side that took the same steps and can all go on."""
    states = [result.state for result in results if result.state is not None]
    state = SearchState(
        **{
            field.name: torch.cat([getattr(held, field.name) for held in states])
            for field in fields(SearchState)
        }
    )
    return replace(
        results[0],
        ids=tuple(name for result in results for name in result.ids),
        embeddings=torch.cat([result.embeddings for result in results]),
        losses=torch.cat([result.losses for result in results]),
        diverged=torch.cat([result.diverged for result in results]),
        no_gradient=torch.cat([result.no_gradient for result in results]),
        state=state,
    )
