"""What a job says of itself while it runs and when it ends, for ``task=status`` to read."""

from __future__ import annotations

import json
import logging
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.redaction import redact

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


log = logging.getLogger(__name__)

FILE = "status.json"
EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class JobStatus:
    """How far a job is.

    Attributes:
        state: ``running``, ``done``, ``failed`` or ``interrupted``.
        started: When it began, this time.
        changed: When this was written.
        stage: What it was doing last.
        done: Steps of that stage that were done.
        total: Its steps.
        error: First line of what went wrong.
    """

    state: str
    started: str
    changed: str
    stage: str = ""
    done: int = 0
    total: int = 0
    error: str = ""


class StatusFile:
    """The file in which a job says how far it is."""

    def __init__(self, folder: Path) -> None:
        self._path, self._started, self._last = folder / FILE, _now(), 0.0
        self._stage: tuple[str, int, int] = ("", 0, 0)
        self._write("running")

    def progress(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage is; written now and then."""
        self._stage = (stage, done, total)
        if time.monotonic() - self._last >= EVERY_SECONDS:
            self._write("running")

    def end(self, state: str, error: str = "") -> None:
        """Say how the job ended."""
        self._write(state, error)

    def _write(self, state: str, error: str = "") -> None:
        self._last = time.monotonic()
        name, done, total = self._stage
        status = JobStatus(state, self._started, _now(), name, done, total, error)
        text = json.dumps(asdict(status), indent=2) + "\n"
        try:
            write_atomically(self._path, text.encode())
        except OSError as cannot:
            # no result: what ends the run, such as a signal, must not be lost over it
            log.warning("%s cannot be written: %s", self._path, cannot)


@contextmanager
def status_of(folder: Path) -> Iterator[StatusFile]:
    """Keep a job's status file while open, whatever ends it."""
    file = StatusFile(folder)
    try:
        yield file
    except Exception as error:
        file.end("failed", _first_line(error))
        raise
    except BaseException as error:
        file.end("interrupted", type(error).__name__)
        raise
    file.end("done")


def read_status(folder: Path) -> JobStatus | None:
    """What a job said last; None where it said nothing that can be read."""
    try:
        return JobStatus(**json.loads((folder / FILE).read_text("utf-8")))
    except (OSError, TypeError, ValueError):
        return None


def _first_line(error: BaseException) -> str:
    text: str = redact(str(error).strip().partition("\n")[0])
    return text or type(error).__name__


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
