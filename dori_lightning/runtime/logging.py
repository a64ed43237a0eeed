"""Progress bars, the log file of each process, and quiet libraries."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dori_lightning.runtime.peers import label, speaks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


T = TypeVar("T")

log = logging.getLogger(__name__)

FIRST_LINE_SECONDS, LINE_EVERY_SECONDS = 10.0, 30.0
"""When a log gets a stage's first line of progress, and the next ones."""

_listeners: list[Callable[[str, int, int], None]] = []
_disabled: list[None] = []


def answer_console(columns: int = 120) -> Console:
    """Console for a task's answer: standard error, so wide where no terminal says how wide.

    Brackets are printed as they are: names of folders and of pairs hold them.
    """
    width = None if sys.stderr.isatty() else columns
    return Console(file=sys.stderr, width=width, markup=False)


@contextmanager
def listening(listener: Callable[[str, int, int], None]) -> Iterator[None]:
    """Call ``listener`` at every step of every progress bar while open: title, steps, total."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def progress_disabled() -> Iterator[None]:
    """Show no progress bars and call no listener while open, e.g. for parts of a larger bar."""
    _disabled.append(None)
    try:
        yield
    finally:
        _disabled.pop()


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress: a bar on a terminal, a line now and then in a log; the first process does.

    Args:
        title: What is being done.
        total: Steps; nothing is shown for 0.

    Yields:
        A function that advances the bar by a number of steps.
    """
    if total == 0 or _disabled or not speaks():
        yield lambda _: None
        return
    start = time.monotonic()
    due = start + FIRST_LINE_SECONDS
    _tell(title, 0, total)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    in_log = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=in_log) as bar:
        task = bar.add_task(title, total=total)

        def advance(steps: int) -> None:
            nonlocal due
            bar.advance(task, steps)
            done = round(bar.tasks[task].completed)
            _tell(title, done, total)
            now = time.monotonic()
            if in_log and now >= due:
                due = now + LINE_EVERY_SECONDS
                left = (now - start) / max(done, 1) * (total - done)
                log.info("%s: %d of %d, about %d s left", title, done, total, round(left))

        yield advance
    seconds = time.monotonic() - start
    # a line for each short stage would hide those that took long
    log.log(logging.INFO if seconds >= 1 else logging.DEBUG, "%s: done in %.0f s", title, seconds)


def with_progress(title: str, items: Sequence[T]) -> Iterator[T]:
    """Go through items with a progress bar of that title."""
    with progress_bar(title, len(items)) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Say now and then, while this lasts, that somebody else is waited for."""
    over = Event()

    def tell() -> None:
        seconds, pause = 0.0, FIRST_LINE_SECONDS
        while not over.wait(pause):
            seconds, pause = seconds + pause, LINE_EVERY_SECONDS
            log.info("waiting for %s, %.0f s so far", what, seconds)

    thread = Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _tell(title: str, done: int, total: int) -> None:
    for listener in _listeners:
        listener(title, done, total)


class ProcessFileHandler(logging.FileHandler):
    """Write the log of this process into a file of its own.

    The first process of a run writes to the file that is named, every other one beside it, as in
    ``dori-3.log`` for the process of rank 3: lines of several processes in one file would be
    mixed, and on a network file system lost.

    Where the file cannot be written any more, such as on a full disk, that is said once and the
    log goes on on standard error alone.
    """

    def __init__(self, filename: str) -> None:
        """Open the file.

        Args:
            filename: Of the first process.
        """
        own = label()
        path = Path(filename)
        if own:
            path = path.with_name(f"dori-{own}{path.suffix}")
        super().__init__(path)
        self._works = True

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, unless an earlier one could not be written."""
        if self._works:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name of logging
        """Say once that the file cannot be written; other mistakes are shown as usual."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._works = False
        sys.stderr.write(f"dori: the log goes on here alone: {self.baseFilename}: {error}\n")


_REMARKS = (
    # said under SLURM, where a launcher started the job already
    r"The `srun` command is available on your system but is not used",
    # between Lightning and torch; nothing a user can mend
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def quiet_libraries() -> None:
    """Let Lightning log through the run's own handlers, and only what asks for attention.

    Lightning gives its loggers a console of their own at import, so that every line came twice; of
    each Trainer, and an audit makes several, it tells the devices and an advertisement. Devices
    are in the report's provenance. To be called after Lightning's import.
    """
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in (
        "lightning.fabric.utilities.rank_zero",
        "lightning.pytorch.utilities.rank_zero",
        # at every checkpoint that is written, of a default
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    # said of a list of modules that is empty for every checkpoint read here
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_about_no_module)
    transformers = sys.modules.get("transformers")
    if transformers is not None:  # a bar for two tenths of a second, in every log
        transformers.utils.logging.disable_progress_bar()
    for remark in _REMARKS:
        warnings.filterwarnings("ignore", message=remark)


def _about_no_module(record: logging.LogRecord) -> bool:
    return "should be kept in float32: []" not in record.getMessage()
