"""Write files that are complete or absent, whatever happens meanwhile."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["remove_partials", "sync_folder", "write_atomically"]


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
