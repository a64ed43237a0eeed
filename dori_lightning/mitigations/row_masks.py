"""A linear layer in which every row of the batch has its own pruned weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["masked_linear", "owner_of"]


def owner_of(pair_id: str, pairs: tuple[str, ...]) -> str:
    """Whose mask a pair's rows see: its own, or one that its name alone decides.

    Controls have no mask of their own; under the masks of the edited pairs in turn they tell what
    those cost.
    """
    if pair_id in pairs:
        return pair_id
    number = int.from_bytes(hashlib.blake2b(pair_id.encode(), digest_size=8).digest(), "big")
    return sorted(pairs)[number % len(pairs)]


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    owners: Sequence[str],
    pruned: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Apply a linear layer to a batch whose rows differ in which weights are zero.

    What a row gives depends on its own mask and, on the CPU, not by a bit on the rows beside it.
    Whole output rows are masked after one product for everybody, which is what zero weights give:
    the bias, or zero. Single weights cannot be; there, rows of one owner share a product, or on
    the CPU each row has its own, since kernels are chosen by shape.

    Args:
        x: Inputs (N, ..., D).
        weight: (C, D).
        bias: (C,), or None.
        owners: Whose mask each row sees, length N.
        pruned: Owner to what is zero: output rows (C,) or single weights (C, D). Rows of others
            see the layer as it is.
    """
    masks = [pruned.get(owner) for owner in owners]
    if all(mask is None or mask.dim() == 1 for mask in masks):
        y = F.linear(x, weight, bias)
        nothing = torch.zeros(len(weight), dtype=torch.bool, device=y.device)
        zero = torch.stack([nothing if mask is None else mask for mask in masks])
        zero = zero.view(len(x), *[1] * (x.dim() - 2), len(weight))
        left = torch.zeros_like(weight[:, 0]) if bias is None else bias
        return torch.where(zero, left.to(y.dtype), y)
    weights = {
        owner: weight.masked_fill(mask if mask.dim() == 2 else mask[:, None], 0)
        for owner in dict.fromkeys(owners)
        if (mask := pruned.get(owner)) is not None
    }
    parts = [
        F.linear(x[start:stop], weights.get(owners[start], weight), bias)
        for start, stop in _runs(owners, single=x.device.type == "cpu")
    ]
    return torch.cat(parts)


def _runs(owners: Sequence[str], *, single: bool) -> Iterator[tuple[int, int]]:
    """Places of neighbouring rows with one owner, or of every row by itself."""
    start = 0
    for stop in range(1, len(owners) + 1):
        if single or stop == len(owners) or owners[stop] != owners[start]:
            yield start, stop
            start = stop
