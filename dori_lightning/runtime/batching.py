"""Run a function over items in batches: fixed shapes, out-of-memory backoff, parallel CPU batches.

Every row of a batch is computed from its own inputs alone, so neither the batch size nor the
number of batches that run at the same time changes a result, up to the rounding of kernels that
are chosen by shape. Batches of one fixed shape give the same bits.

What is halved when memory runs out is how many items share a batch, never what belongs to one of
them, such as the noise samples of a pair: those are part of the method.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Protocol, TypeVar

import torch

from dori_lightning.types import InputError, first_line

T = TypeVar("T")
X = TypeVar("X")

log = logging.getLogger(__name__)

MAX_PARALLEL = 4
"""Batches that run at the same time, at most; with more threads than that, each has several."""

SMALL_WEIGHTS = 100_000_000
"""Weights of a denoiser up to which its batches run in parallel. Measured with 9 million, where it
pays, and with 860 million, where it does not; where between them it turns is not known."""


class BatchedModel(Protocol):
    """What batching has to know about a model."""

    max_batch_sizes: dict[str, int]

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Its weights."""
        ...


def fixed_batches(items: Sequence[X], size: int) -> Iterator[tuple[list[X], int]]:
    """Batches of exactly ``size`` items, and how many of each count.

    Kernels are chosen by shape, so an item gets the same bits in every batch of one shape, at
    whatever place: the denoiser and the decoder are held to that by a test on the CPU, networks
    that cannot keep it take one item at a time (``metrics.descriptors.in_fixed_batches``). The
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


def map_batches(
    fn: Callable[[list[X]], Iterable[T]],
    items: Sequence[X],
    *,
    at_once: int,
    model: BatchedModel,
    backoff: OomBackoff,
    pad: bool = True,
    advance: Callable[[int], None] = lambda _: None,
) -> list[T]:
    """Apply a function to batches of items; halve the batches when memory runs out.

    Args:
        fn: Takes a batch and returns one result per item, in its order.
        items: What is to be computed.
        at_once: Items in memory at the same time, >= 1; the batches of a small model on the CPU
            share this number and run in parallel.
        model: What ``fn`` computes with.
        backoff: Kind of batch, for the limit that is remembered and for messages.
        pad: Whether the last batch on a CPU is filled up to the shape of the others; on a GPU,
            which gives no equal bits in return, none is.
        advance: Called with the number of items that were just done.

    Returns:
        One result per item, in order.

    Raises:
        InputError: Not even one item fits into memory.
    """
    results: list[T] = []
    pad = pad and model.device.type == "cpu"

    def next_batches(at_once: int) -> list[T]:
        parallel = min(parallel_batches(model), at_once)
        size = at_once // parallel
        part = items[len(results) : len(results) + parallel * size]
        batches = [
            (batch if pad else batch[:count], count) for batch, count in fixed_batches(part, size)
        ]
        found = run_parallel([partial(fn, batch) for batch, _ in batches], parallel)
        return [
            result
            for rows, (_, count) in zip(found, batches, strict=True)
            for _, result in zip(range(count), rows, strict=False)
        ]

    while len(results) < len(items):
        found = backoff.run(next_batches, at_once, model.max_batch_sizes)
        results += found
        advance(len(found))
    return results


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host; unlike a plain copy, without waiting for what a GPU has to do."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


# Out-of-memory backoff


@dataclass(frozen=True)
class OomBackoff:
    """Retry with half the batch when memory runs out.

    Attributes:
        kind: What the batches are for; the limit of memory is remembered under this name.
        noun: One item of a batch, in the singular.
        fix: What helps where a single item does not fit.
    """

    kind: str
    noun: str
    fix: str

    def run(self, work: Callable[[int], T], size: int, limits: MutableMapping[str, int]) -> T:
        """Call ``work`` with a batch size that is halved until memory is enough.

        Args:
            work: Computes everything anew at each call, and leaves nothing behind where it fails.
            size: Batch size where memory is no concern, >= 1.
            limits: Largest batch size that memory was found to hold, by kind; kept with the model,
                so that memory runs out once and not at every batch.

        Raises:
            InputError: Not even a batch of one item fits.
        """
        size = max(1, min(size, limits.get(self.kind, size)))
        while True:
            try:
                return work(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = first_line(error)
                if size == 1:
                    raise InputError(
                        f"out of memory with a single {self.noun} in a batch: {said}\n"
                        f"  where: {self.kind}{_gpu_memory()}\n"
                        f"  fix:   {self.fix}"
                    ) from error
            # not in the handler: the exception's frames hold the tensors of the batch
            size = limits[self.kind] = size // 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            items = f"{size} {self.noun}{'' if size == 1 else 's'}"
            log.warning(
                "%s: out of memory (%s); going on with batches of %s", self.kind, said, items
            )


_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "not enough memory", "ALLOC_FAILED")
"""Parts of the messages of allocators that raise a plain `RuntimeError`."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU.

    ``accelerate.utils.memory.should_reduce_batch_size`` knows fewer: no `MemoryError`, no
    "CUDA error: out of memory", no ``CUBLAS_STATUS_ALLOC_FAILED``.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY)


def _gpu_memory() -> str:
    """How much of a GPU's memory was used at most, for a message."""
    if not torch.cuda.is_available():
        return ""
    most, whole = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    return f", at most {most / 2**30:.2f} GiB of {whole / 2**30:.2f} GiB"


# Parallel batches on the CPU: the kernels of a small model are too short to be shared by many
# threads, so two batches on a thread each take less time than one after the other on two. A large
# model has its weights read from memory by every batch, and smaller batches read them more often:
# with Stable Diffusion's shape an attack took half as long again. Both are measured in
# ``experiments/003-speed``. A thread works without the interpreter's lock while it is in a kernel,
# so no processes are needed.

_parallel_disabled = False


def is_small(model: BatchedModel) -> bool:
    """Whether parallel batches make a model faster: on the CPU, up to `SMALL_WEIGHTS`."""
    return (
        model.device.type == "cpu" and sum(p.numel() for p in model.parameters()) <= SMALL_WEIGHTS
    )


def parallel_batches(model: BatchedModel) -> int:
    """How many batches of a model run at the same time: a thread each, up to ``MAX_PARALLEL``."""
    if _parallel_disabled or not is_small(model):
        return 1
    return min(MAX_PARALLEL, torch.get_num_threads())


@contextmanager
def disable_parallel() -> Iterator[None]:
    """Run batches one after the other while open, e.g. under a profiler of one thread."""
    global _parallel_disabled
    before, _parallel_disabled = _parallel_disabled, True
    try:
        yield
    finally:
        _parallel_disabled = before


def run_parallel(calls: Sequence[Callable[[], T]], parallel: int) -> list[T]:
    """Call functions in parallel threads.

    The number of threads that kernels use decides about rounding, so it is the same in every call,
    whether another one runs beside it or not.

    Args:
        calls: Autograd's mode and autocast belong to a thread and begin as a new thread's:
            gradients on, no autocast.
        parallel: How many at the same time, up to ``parallel_batches``; 1: all in this thread.

    Returns:
        What each call returns, in order.

    Raises:
        Exception: What the first call that failed has raised, once none runs any more.
    """
    if parallel == 1:
        return [call() for call in calls]
    threads = torch.get_num_threads()

    def on_its_threads(call: Callable[[], T]) -> T:
        torch.set_num_threads(max(1, threads // parallel))
        return call()

    try:
        waiting = [_pool(parallel).submit(on_its_threads, call) for call in calls]
        wait(waiting)
    finally:
        # one setting of the matrix library is the process's and not the thread's
        torch.set_num_threads(threads)
    return [done.result() for done in waiting]


@cache
def _pool(parallel: int) -> ThreadPoolExecutor:
    """Threads, reused: the kernels' own threads belong to them."""
    return ThreadPoolExecutor(parallel, thread_name_prefix="batch")
