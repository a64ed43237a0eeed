"""Cut work into batches of one shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def fixed_batches(items: Sequence[T], size: int) -> Iterator[tuple[list[T], int]]:
    """Batches of exactly ``size`` items, and how many of each count.

    Kernels are chosen by shape, so an item gets the same bits in every batch of one shape. The
    last batch is filled up with copies of its first item; drop what comes of the copies.

    Args:
        items: What is to be computed.
        size: Items in a batch, >= 1.

    Yields:
        A batch of ``size`` items, and how many of them (from the front) are no copies.
    """
    for start in range(0, len(items), size):
        part = list(items[start : start + size])
        yield part + [part[0]] * (size - len(part)), len(part)
