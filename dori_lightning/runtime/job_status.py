"""The status file of a job: how far it is and how it ended, for ``task=status`` to read."""

from __future__ import annotations

import json
import logging
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dori_lightning.runtime.artifacts import write_json
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import first_line

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
        started: When this start of the job began.
        changed: When this was written.
        stage: Its last stage.
        done: Steps of that stage that are done.
        total: Steps of that stage.
        error: First line of the error that ended it.
    """

    state: str
    started: str
    changed: str
    stage: str = ""
    done: int = 0
    total: int = 0
    error: str = ""


class StatusFile:
    """Writes the status of a job into its run folder."""

    def __init__(self, folder: Path) -> None:
        self._path, self._written = folder / FILE, 0.0
        self._status = JobStatus("running", started=_now(), changed="")
        self._write()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Note how far a stage is; written every few seconds."""
        self._status = replace(self._status, stage=stage, done=done, total=total)
        if time.monotonic() - self._written >= EVERY_SECONDS:
            self._write()

    def end(self, state: str, error: str = "") -> None:
        """Write how the job ended."""
        self._status = replace(self._status, state=state, error=error)
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        status = asdict(replace(self._status, changed=_now()))
        try:
            write_json(self._path, status, sort_keys=False)
        except OSError as error:
            # no result: what ends the run, such as a signal, must not be lost over it
            log.warning("%s cannot be written: %s", self._path, error)


@contextmanager
def status_of(folder: Path) -> Iterator[StatusFile]:
    """Keep a job's status file while open, whatever ends it."""
    file = StatusFile(folder)
    try:
        yield file
    except Exception as error:
        file.end("failed", str(redact(first_line(error))))
        raise
    except BaseException as error:
        file.end("interrupted", type(error).__name__)
        raise
    file.end("done")


def read_status(folder: Path) -> JobStatus | None:
    """The last status of a job; None where there is none that can be read."""
    try:
        return JobStatus(**json.loads((folder / FILE).read_text("utf-8")))
    except (OSError, TypeError, ValueError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
