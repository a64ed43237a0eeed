"""Forward passes side by side on the CPU, each on threads of its own.

The kernels of a small model are too short to be shared by many threads: two passes on a thread
each take less time than one after the other on two. A large model has its weights read from memory
by every pass, and narrower passes read them more often: with Stable Diffusion's shape an attack
took half as long again. Both are measured in ``experiments/003-speed``.

A thread works without the interpreter's lock while it is in a kernel, so no processes are needed.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dori_lightning.models.protocol import TextToImage

__all__ = ["count", "in_one", "side_by_side", "small"]

T = TypeVar("T")

MOST = 4
"""Passes side by side at most; where there are more threads, each pass has several of them."""

SMALL = 100_000_000
"""Weights of a denoiser up to which its passes go side by side. Measured with 9 million, where it
pays, and with 860, where it does not; where between them it turns is not known."""

_one = False


def small(model: TextToImage) -> bool:
    """Whether a model gains by passes side by side: on the CPU, with up to ``SMALL`` weights."""
    return model.device.type == "cpu" and sum(p.numel() for p in model.parameters()) <= SMALL


def count(model: TextToImage) -> int:
    """How many of a model's passes go side by side: a thread each, up to ``MOST``, or one."""
    return min(MOST, torch.get_num_threads()) if small(model) and not _one else 1


@contextmanager
def in_one() -> Iterator[None]:
    """Let one pass follow the other while open, for those who watch the operations of a thread."""
    global _one
    before, _one = _one, True
    try:
        yield
    finally:
        _one = before


def side_by_side(work: Sequence[Callable[[], T]], lanes: int) -> list[T]:
    """Do several things at a time.

    How many threads a pass has decides about its rounding, so that is the same for every one,
    whether another pass is beside it or not.

    Args:
        work: What to do. Autograd's mode and autocast are a thread's own and begin as a new
            thread's: gradients on, no autocast.
        lanes: How many at a time, up to ``count``; 1 does all here and now, on all threads.

    Returns:
        What each of ``work`` returns, in its order.

    Raises:
        Exception: What the first that failed has raised, once none runs any more.
    """
    if lanes == 1:
        return [each() for each in work]
    threads = torch.get_num_threads()

    def on_its_threads(each: Callable[[], T]) -> T:
        torch.set_num_threads(max(1, threads // lanes))
        return each()

    try:
        waiting = [_pool(lanes).submit(on_its_threads, each) for each in work]
        wait(waiting)
    finally:
        # one setting of the matrix library is the process's and not the thread's
        torch.set_num_threads(threads)
    return [done.result() for done in waiting]


@cache
def _pool(lanes: int) -> ThreadPoolExecutor:
    """Threads for ``lanes`` passes, kept: kernels' own threads belong to them."""
    return ThreadPoolExecutor(lanes, thread_name_prefix="lane")
