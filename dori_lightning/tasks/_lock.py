"""One writer to a folder: the lock names its owner, and ends with the process that holds it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["is_held", "one_writer"]

log = logging.getLogger(__name__)

RUN_LOCK = "run.lock"


@contextmanager
def one_writer(folder: Path, name: str = RUN_LOCK) -> Iterator[None]:
    """Be the only process that writes to a folder while open.

    The kernel gives a lock back when its process is gone, also on the common network file
    systems, so what is left by a run that was killed is taken over, with a notice.

    Args:
        folder: Made if needed.
        name: The lock's file.

    Raises:
        InputError: Another process has it; says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    # not truncated on opening: it says who has it
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another run writes to {folder}: {_owner(file.read())}\n"
                f"  where: {path}\n"
                f"  mend:  wait for it or end it, or give this run a folder of its own with "
                f"{'name' if name == RUN_LOCK else 'sweep'}=NAME"
            ) from None
        except OSError as error:
            raise InputError(
                f"cannot lock {folder}: {error.strerror}\n"
                f"  where: {path}\n"
                f"  mend:  choose a place with locks, such as a local disk: paths.output=FOLDER"
            ) from error
        left = file.read()
        if left:
            log.warning("%s: taken over from a run that was cut: %s", folder, _owner(left))
        _write(file, json.dumps(_me()))
        try:
            yield
        finally:
            _write(file, "")


def is_held(folder: Path, name: str = RUN_LOCK) -> bool:
    """Whether a living process writes to a folder."""
    try:
        with (folder / name).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _write(file: Any, text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _me() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"slurm_job": job} if job else {}),
    }


def _owner(text: str) -> str:
    try:
        said = json.loads(text)
        named = f"process {said['pid']} on {said['host']} since {said['since']}"
    except (KeyError, TypeError, ValueError):
        return "a process that has not said its name yet"
    return f"{named}, SLURM job {said['slurm_job']}" if "slurm_job" in said else named
