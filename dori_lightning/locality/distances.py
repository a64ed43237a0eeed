"""Pairwise distances and cosines of long rows, a stretch of columns at a time."""

from __future__ import annotations

import torch

__all__ = ["cosines", "distances", "relative_distances"]

COLUMNS = 1 << 16
"""Columns that are compared at once: 500 rows of them are 260 MB in double precision."""


def distances(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (N, N), float64, of rows (N, ...) taken as flat vectors."""
    flat = rows.flatten(1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for part in torch.split(flat, COLUMNS, dim=1):
        own = part.double()
        # not by way of products: near rows would lose their digits
        total += torch.cdist(own, own, compute_mode="donot_use_mm_for_euclid_dist").square()
    return total.sqrt().cpu()


def cosines(rows: torch.Tensor) -> torch.Tensor:
    """Cosines (N, N) in [-1, 1], float64, of rows (N, ...) taken as flat vectors.

    A row of zeros has a cosine of 0 with every other.
    """
    products = _products(rows)
    length = products.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return (products / length[:, None] / length[None]).clamp(-1, 1)


def relative_distances(distance: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Distances (N, N) divided by the root mean square of the two rows' lengths, in [0, 2].

    The square root of 2 where two rows are orthogonal, whatever their scale.

    Args:
        distance: Euclidean distances (N, N).
        lengths: Euclidean lengths of the rows (N,).
    """
    square = lengths.double().square()
    scale = ((square[:, None] + square[None]) / 2).sqrt()
    return distance / scale.clamp_min(torch.finfo(torch.float64).tiny)


def _products(rows: torch.Tensor) -> torch.Tensor:
    flat = rows.flatten(1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for part in torch.split(flat, COLUMNS, dim=1):
        own = part.double()
        total += own @ own.T
    return total.cpu()
