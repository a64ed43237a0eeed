"""Adam for rows that share tensors and nothing else."""

from __future__ import annotations

import torch

from dori_lightning.attacks.results import SearchState

__all__ = ["RowAdam"]


class RowAdam:
    """Adam (Kingma & Ba, 2015) in which every row has its own step count and can stand still.

    Elementwise the same arithmetic as ``torch.optim.Adam``; rows that are masked out keep value
    and state.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.lr, self.betas, self.eps = lr, betas, eps
        self.mean, self.square = torch.zeros_like(rows), torch.zeros_like(rows)
        # float64: 1 - 0.999 loses four digits in float32
        self.count = torch.zeros(
            len(rows), *([1] * (rows.dim() - 1)), device=rows.device, dtype=torch.float64
        )

    def state(self, delta: torch.Tensor) -> SearchState:
        """Where the rows stand, so that they can go on later; on the CPU.

        Args:
            delta: Their current values (N, T, D).
        """
        return SearchState(
            delta.cpu(), self.mean.cpu(), self.square.cpu(), self.count.flatten().cpu()
        )

    def restore(self, state: SearchState) -> None:
        """Go on from a state of as many rows."""
        device, shape = self.count.device, self.count.shape
        self.mean, self.square = state.mean.to(device), state.square.to(device)
        self.count = state.count.view(shape).to(device)

    def step(
        self, rows: torch.Tensor, gradient: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        """Return updated rows; ``active`` (N,) says which rows move.

        Args:
            rows: Current values (N, ...).
            gradient: Their gradient (N, ...), finite where active.
            active: Boolean mask (N,).
        """
        mask = active.view(-1, *([1] * (rows.dim() - 1)))
        gradient = torch.where(mask, gradient, 0.0)
        first, second = self.betas
        self.count = self.count + mask
        self.mean = torch.where(mask, self.mean * first + gradient * (1 - first), self.mean)
        self.square = torch.where(
            mask, self.square * second + gradient * gradient * (1 - second), self.square
        )
        count = self.count.clamp_min(1)
        scale = self.square.sqrt() / (1 - second**count).sqrt().to(rows.dtype) + self.eps
        update = (self.lr / (1 - first**count)).to(rows.dtype) * self.mean / scale
        return torch.where(mask, rows - update, rows)
