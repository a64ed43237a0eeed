"""Write files that are complete or absent, whatever happens meanwhile."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import socket
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from dori_lightning.runtime.redaction import redact
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


# -------- disk
# Whether the disk holds what is to be written, asked before hours are spent on it.

log = logging.getLogger(__name__)


def check_space(folder: Path, needed: int, *, fix: str) -> None:
    """Refuse to begin what the disk does not hold.

    Args:
        folder: Where it goes, there or not yet; what an earlier run left in it is not needed
            again.
        needed: Bytes, at most.
        fix: What else helps than to free space.

    Raises:
        InputError: Less is free; says how much of each.
    """
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(place).free
    more = max(0, needed - there)
    log.info("%s: writes up to %s, %s are free", folder, _words(more), _words(free))
    if more > free:
        raise InputError(
            f"the disk has {_words(free)} free, but up to {_words(more)} are to be written\n"
            f"  where: {folder}\n"
            f"  fix:   free space, {fix}"
        )


def _words(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


# -------- files

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def write_atomically(path: Path, data: bytes) -> Path:
    """Replace a file in one step: a reader, or a crash, sees old or new bytes, never a part.

    Args:
        path: Where to; parent folders are made.
        data: Whole content.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        # errors of an open file do not say which
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    return path


def remove_partials(folder: Path) -> int:
    """Remove what killed processes were writing, below a folder to which no other one writes.

    Returns:
        How many files went.
    """
    found = [path for path in folder.rglob(".*.tmp") if _PARTIAL.fullmatch(path.name)]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def sync_folder(folder: Path) -> None:
    """Have a folder's new names on the disk, not only in memory."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -------- folder
# Say what a run folder is for, so that the same command resumes and another one is refused.

_FILE = "method.json"


def drop_keys(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Settings without those that change speed or memory but no result."""
    return {key: value for key, value in settings.items() if key not in names}


def claim_folder(folder: Path, method: Mapping[str, Any]) -> None:
    """Write down what decides the results in ``folder``, or check that it is the same as before.

    Args:
        folder: Run folder; made if needed.
        method: Whatever decides the results, as plain containers.

    Raises:
        InputError: The folder holds results of another method; names every setting that differs.
    """
    if not check_folder(folder, method):
        record = json.dumps(redact(method), indent=2, sort_keys=True) + "\n"
        write_atomically(folder / _FILE, record.encode())


def check_folder(folder: Path, method: Mapping[str, Any]) -> bool:
    """Check that ``folder`` holds results of ``method`` or none; writes nothing.

    Returns:
        Whether somebody claimed it already.

    Raises:
        InputError: The folder holds results of another method; names every setting that differs.
    """
    wanted = dict(_flat(json.loads(json.dumps(redact(method)))))
    place = folder / _FILE
    if place.is_file():
        found = dict(_flat(json.loads(place.read_text(encoding="utf-8"))))
        differing = sorted(
            k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)
        )
        if differing:
            changes = "\n".join(
                f"  {k}: {found.get(k)!r} there, {wanted.get(k)!r} now" for k in differing
            )
            raise InputError(
                f"{folder} holds results of other settings:\n{changes}\n"
                f"  fix:   give this run a folder of its own with name=NAME, or remove that one"
            )
        return True
    return False


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested containers by dotted name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


# -------- lock
# One writer to a folder: the lock names its owner, and ends with the process that holds it.

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
                f"  fix:   wait for it or end it, or give this run a folder of its own with "
                f"{'name' if name == RUN_LOCK else 'sweep'}=NAME"
            ) from None
        except OSError as error:
            raise InputError(
                f"cannot lock {folder}: {error.strerror}\n"
                f"  where: {path}\n"
                f"  fix:   choose a place with locks, such as a local disk: paths.output=FOLDER"
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
