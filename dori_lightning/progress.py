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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["stage"]

log = logging.getLogger(__name__)

LINE_EVERY_SECONDS = 30.0


@contextmanager
def stage(title: str, total: int, *, visible: bool = True) -> Iterator[Callable[[int], None]]:
    """Open a stage of ``total`` steps; yields a function that advances it by a number of steps.

    Args:
        title: What is being done.
        total: Steps; nothing is shown for 0.
        visible: False on every process but the first.
    """
    if not visible or total == 0:
        yield lambda _: None
        return
    start = time.monotonic()
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda steps: bar.advance(task, steps)
    else:
        done, said = 0, start

        def advance(steps: int) -> None:
            nonlocal done, said
            done += steps
            now = time.monotonic()
            if now - said >= LINE_EVERY_SECONDS:
                said = now
                left = (now - start) / max(done, 1) * (total - done)
                log.info("%s: %d of %d, about %d s left", title, done, total, round(left))

        yield advance
    log.info("%s: done in %.0f s", title, time.monotonic() - start)
