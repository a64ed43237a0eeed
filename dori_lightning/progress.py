"""Show how far a long stage is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dori_lightning.processes import is_first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["heard_by", "hushed", "stage"]

log = logging.getLogger(__name__)

LINE_EVERY_SECONDS = 30.0

_listeners: list[Callable[[str, int, int], None]] = []
_hushed: list[None] = []


@contextmanager
def heard_by(listener: Callable[[str, int, int], None]) -> Iterator[None]:
    """Tell ``listener`` of every step of every stage while open: title, steps done, all steps."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def hushed() -> Iterator[None]:
    """Show and tell nothing of stages while open: they are part of a larger one."""
    _hushed.append(None)
    try:
        yield
    finally:
        _hushed.pop()


@contextmanager
def stage(title: str, total: int, *, visible: bool = True) -> Iterator[Callable[[int], None]]:
    """Open a stage of ``total`` steps; yields a function that advances it by a number of steps.

    Args:
        title: What is being done.
        total: Steps; nothing is shown for 0.
        visible: Whether to show it; the first process alone does.
    """
    if not visible or total == 0 or _hushed or not is_first():
        yield lambda _: None
        return
    start = time.monotonic()
    _tell(title, 0, total)
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)

            def advance(steps: int) -> None:
                bar.advance(task, steps)
                _tell(title, round(bar.tasks[task].completed), total)

            yield advance
    else:
        done, said = 0, start

        def count(steps: int) -> None:
            nonlocal done, said
            done += steps
            _tell(title, done, total)
            now = time.monotonic()
            if now - said >= LINE_EVERY_SECONDS:
                said = now
                left = (now - start) / max(done, 1) * (total - done)
                log.info("%s: %d of %d, about %d s left", title, done, total, round(left))

        yield count
    log.info("%s: done in %.0f s", title, time.monotonic() - start)


def _tell(title: str, done: int, total: int) -> None:
    for listener in _listeners:
        listener(title, done, total)
