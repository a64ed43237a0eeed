"""Time several ways of doing one thing in turn, so that whatever slows the machine slows all."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dori_lightning import processes
from dori_lightning.bench.operations import synchronize
from dori_lightning.progress import hushed, stage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Timed", "timed_in_turn"]


@dataclass(frozen=True)
class Timed:
    """What one way took.

    Attributes:
        warm_up: Seconds of the first run, which is not among ``seconds``: compilation, caches.
        seconds: Seconds of each repeat.
        peak_bytes: On a GPU, most memory that its allocator held for a repeat beyond what it held
            before; None elsewhere, see ``attacks.memory.PeakTensors``.
        result: What the last repeat returned.
    """

    warm_up: float
    seconds: tuple[float, ...]
    peak_bytes: int | None
    result: Any


def _allocated(device: torch.device) -> int:
    """Bytes that a GPU's allocator holds now, from where its highest mark begins again."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def timed_in_turn(
    ways: Mapping[str, Callable[[], Any]], *, repeats: int, device: torch.device, title: str
) -> dict[str, Timed]:
    """Run every way once to warm up, then all of them in turn, ``repeats`` times.

    Args:
        ways: Name to what is timed.
        repeats: Timed rounds.
        device: Where the work is done; waited for before and after each run.
        title: What the progress line says.
    """
    warm: dict[str, float] = {}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int | None] = dict.fromkeys(ways)
    results: dict[str, Any] = {}
    with stage(f"bench: {title}", (repeats + 1) * len(ways)) as advance:
        for number in range(repeats + 1):
            for name, run in ways.items():
                processes.check()
                synchronize(device)
                before = _allocated(device)
                started = time.perf_counter()
                with hushed():
                    results[name] = run()
                synchronize(device)
                seconds = time.perf_counter() - started
                if number == 0:
                    warm[name] = seconds
                else:
                    taken[name].append(seconds)
                if device.type == "cuda":
                    held = torch.cuda.max_memory_allocated(device) - before
                    peaks[name] = max(held, peaks[name] or 0)
                advance(1)
    return {
        name: Timed(warm[name], tuple(taken[name]), peaks[name], results[name]) for name in ways
    }
