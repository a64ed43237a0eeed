"""Give each worker of a sweep on one box a GPU of its own."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["claim", "pin"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_held: list[TextIO] = []
"""Open files keep their locks; the process's end gives them back."""


def pin() -> None:
    """Have this process see one GPU that no other worker has; nothing where there is none.

    To be called before CUDA is used. A worker keeps its GPU for its life, since CUDA cannot move.

    Raises:
        InputError: There are more workers than GPUs.
    """
    if _held:
        return
    names = _gpus()
    if names:
        os.environ[_VISIBLE] = claim(
            names, Path(tempfile.gettempdir()) / f"dori-gpus-{os.getuid()}"
        )


def claim(names: Sequence[str], folder: Path) -> str:
    """Take the first free one of several devices.

    Args:
        names: Devices.
        folder: Where their locks are, the same for all processes of the box.

    Raises:
        InputError: None is free, or the folder is somebody else's.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # in a folder for everybody somebody else may have been first, with links to this user's files
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise InputError(
            f"{folder} is not a folder that this user alone writes to\n"
            f"  where: TMPDIR\n"
            f"  mend:  remove it, or choose another place for temporary files: TMPDIR=FOLDER"
        )
    for name in names:
        file = (folder / name.replace("/", "_")).open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _held.append(file)
        return name
    raise InputError(
        f"all {len(names)} GPUs are taken by other jobs of sweeps\n"
        f"  where: hydra.launcher.n_jobs\n"
        f"  mend:  hydra.launcher.n_jobs={len(names)}, and one sweep at a time"
    )


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` has them."""
    visible = os.environ.get(_VISIBLE)
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(k) for k in range(torch.cuda.device_count())]
