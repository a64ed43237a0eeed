"""Adam for rows that share tensors and nothing else."""

from __future__ import annotations

import torch

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
