"""Whether the disk holds what is to be written, asked before hours are spent on it."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["check_space"]

log = logging.getLogger(__name__)


def check_space(folder: Path, needed: int, *, mend: str) -> None:
    """Refuse to begin what the disk does not hold.

    Args:
        folder: Where it goes, there or not yet; what an earlier run left in it is not needed
            again.
        needed: Bytes, at most.
        mend: What else helps than to free space.

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
            f"  mend:  free space, {mend}"
        )


def _words(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
