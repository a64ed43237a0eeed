"""Files and folders of a run: whole files or none, one method and one writer to a folder.

Needs no torch: the command line begins here.
"""

from __future__ import annotations

import hashlib
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

from filelock import FileLock, Timeout

from dori_lightning.runtime.redaction import redact
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path


log = logging.getLogger(__name__)

METHOD = "method.json"
RUN_LOCK = "run.lock"
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def write_atomically(path: Path, data: bytes) -> Path:
    """Replace a file in one step: a reader, or a crash, sees old or new bytes, never a part.

    Args:
        path: Where to; parent folders are made.
        data: Whole content.

    Returns:
        ``path``.
    """
    with partial_file(path) as partial:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return partial.replace(path)


@contextmanager
def partial_file(path: Path) -> Iterator[Path]:
    """Where to write what is renamed to ``path`` once it is whole, or removed where it is not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        yield partial
    except OSError as error:
        # errors of an open file do not say which
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, record: Mapping[str, Any], *, sort_keys: bool = True) -> None:
    """Replace a file by a record, readably indented, in one step."""
    text = json.dumps(record, indent=2, sort_keys=sort_keys) + "\n"
    write_atomically(path, text.encode())


def remove_partials(folder: Path) -> None:
    """Remove what killed processes were writing, below a folder to which no other one writes."""
    for path in folder.rglob(".*.tmp"):
        if _PARTIAL.fullmatch(path.name):
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have a folder's new names on the disk, not only in memory."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    log.info("%s: writes up to %s, %s are free", folder, _size(more), _size(free))
    if more > free:
        raise InputError(
            f"the disk has {_size(free)} free, but up to {_size(more)} are to be written\n"
            f"  where: {folder}\n"
            f"  fix:   free space, {fix}"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def content_hash(value: Any) -> str:
    """SHA-256 of plain containers, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
        write_json(folder / METHOD, redact(method))


def check_folder(
    folder: Path, method: Mapping[str, Any], *, unknown: Collection[str] = ()
) -> bool:
    """Check that ``folder`` holds results of ``method`` or none; writes nothing.

    Args:
        folder: Run folder, there or not.
        method: Whatever decides the results, as plain containers.
        unknown: Dotted names of values that are not known yet and not compared.

    Returns:
        Whether somebody claimed it already.

    Raises:
        InputError: The folder holds results of another method; names every setting that differs.
    """
    path = folder / METHOD
    if not path.is_file():
        return False
    now = dict(leaves(json.loads(json.dumps(redact(method)))))
    there = dict(leaves(json.loads(path.read_text(encoding="utf-8"))))
    compared = (now.keys() | there.keys()) - set(unknown)
    differing = sorted(k for k in compared if now.get(k) != there.get(k))
    if differing:
        changes = "\n".join(
            f"  {k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in differing
        )
        raise InputError(
            f"{folder} holds results of other settings:\n{changes}\n"
            f"  fix:   give this run a folder of its own with name=NAME, or remove that one"
        )
    return True


_NO_RESULT = re.compile(r"\..*|csv|wandb|dori.*\.log|.*\.lock|run\.lock\.owner|"
                        r"method\.json|status\.json|tracking\.json")  # fmt: skip
"""Files and folders directly in a run folder that say how a start went, not what it found."""


@contextmanager
def released_on_failure(folder: Path) -> Iterator[None]:
    """Give a folder back to other settings where a start that claimed it leaves without a result.

    Only a folder that nobody had claimed before and that holds no file of a result is given back.
    """
    claimed = (folder / METHOD).is_file()
    try:
        yield
    except Exception:
        if not claimed and not _has_results(folder):
            (folder / METHOD).unlink(missing_ok=True)
        raise


def _has_results(folder: Path) -> bool:
    own = [path for path in folder.iterdir() if not _NO_RESULT.fullmatch(path.name)]
    return any(path.is_file() or any(p.is_file() for p in path.rglob("*")) for path in own)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested containers by dotted name."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


@contextmanager
def one_writer(folder: Path, name: str = RUN_LOCK) -> Iterator[None]:
    """Be the only process that writes to a folder while open.

    The kernel gives a lock back when its process is gone, also on the common network file
    systems, so the folder of a run that was killed is taken over, with a notice.

    Args:
        folder: Made if needed.
        name: Name of the lock's file; beside it ``NAME.owner`` says who holds it.

    Raises:
        InputError: Another process holds the lock; says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # beside the lock: some versions of filelock empty it
    path, owner = folder / name, folder / f"{name}.owner"
    lock = FileLock(path, mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another run writes to {folder}: {_owner(owner)}\n"
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
    try:
        if owner.exists():
            log.warning("%s: taken over from a run that was cut: %s", folder, _owner(owner))
        write_atomically(owner, json.dumps(_this_process()).encode())
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def is_held(folder: Path, name: str = RUN_LOCK) -> bool:
    """Whether a living process writes to a folder."""
    if not (folder / name).exists():
        return False
    try:
        with FileLock(folder / name, timeout=0):
            return False
    except Timeout:
        return True


def _this_process() -> dict[str, Any]:
    job = os.environ.get("SLURM_JOB_ID")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"slurm_job": job} if job else {}),
    }


def _owner(path: Path) -> str:
    """Who holds a lock, in words."""
    try:
        owner = json.loads(path.read_text("utf-8"))
        named = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (KeyError, OSError, TypeError, ValueError):
        return "a process that has not said its name yet"
    return f"{named}, SLURM job {owner['slurm_job']}" if "slurm_job" in owner else named
