"""Checkpoints of a fit to go on from: whole or not there, checked, the last two kept.

Lightning's own lie in a temporary folder until they are whole and are copied from there, which
leaves half of one, and none of those before, where that folder is on another device.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
from pathlib import Path
from typing import IO, Any, BinaryIO, cast
from uuid import uuid4

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from dori_lightning.runtime import distributed, signals
from dori_lightning.runtime.artifacts import sync_folder, write_atomically
from dori_lightning.runtime.signals import Interrupted
from dori_lightning.types import InputError


class Saving(Checkpoint):
    """Write a checkpoint every so many steps, and before all processes leave on a signal.

    All meet twice in a step: where those that left a search of triggers are missed, before the
    gradients are averaged, and at its end. Whoever leaves, leaves with all others.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.saved = -1

    def on_before_backward(self, *_: Any) -> None:
        """Meet those that may have left a search of triggers."""
        distributed.sync_interrupt()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write every so many steps, then meet, and leave together where one is to leave."""
        if trainer.global_step % self.every == 0:
            self._save(trainer)
        distributed.sync_interrupt(signals.received())

    def on_exception(
        self, trainer: L.Trainer, _module: L.LightningModule, error: BaseException
    ) -> None:
        """Write before leaving on a signal."""
        # a search of triggers that is left leaves the pool as it was before
        if isinstance(error, Interrupted) and distributed.leave(error):
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if self.saved != trainer.global_step:
            trainer.save_checkpoint(checkpoint_path(self.folder, trainer.global_step))
            self.saved = trainer.global_step


def is_done(module: L.LightningModule, last: Path, steps: int) -> bool:
    """Whether a checkpoint is a fit's end; takes its weights then.

    A Trainer that has nothing left to do would not put the average of the weights in place.
    """
    # mapped, since only its end is read whole
    kept = read_checkpoint(last, mapped=True)
    if kept["global_step"] < steps:
        return False
    module.on_load_checkpoint(kept)
    module.load_state_dict(kept["state_dict"])
    return True


log = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints of a fit, besides the one that is being written."""

_NAME = re.compile(r"step-(\d+)\.ckpt")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after an optimizer step goes."""
    return folder / f"step-{step:08d}.ckpt"


def last_checkpoint(folder: Path, title: str) -> Path | None:
    """The last checkpoint that is whole; None where there is none.

    Args:
        folder: The fit's folder.
        title: What the lines in the log say.
    """
    for path in _checkpoints(folder):
        if not _checksum_path(path).is_file():
            log.info("%s: %s was cut while it was written", title, path.name)
        elif _checksum(path) != _checksum_path(path).read_text("ascii").strip():
            log.warning("%s: %s IS DAMAGED and is not used", title, path)
        else:
            log.info("%s: going on from %s", title, path)
            return path
    if _checkpoints(folder):
        log.warning("%s: no checkpoint in %s is whole, so training begins anew", title, folder)
    return None


def read_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    Args:
        path: The file.
        mapped: Leave tensors on the disk until they are used.

    Raises:
        InputError: It holds more than tensors and plain values, so no fit of this program wrote
            it.
    """
    try:
        kept: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mapped or None
        )
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, or is damaged, and is not opened\n"
            f"  where: {str(error).strip().partition(chr(10))[0]}\n"
            f"  fix:   remove it; the fit then begins anew"
        ) from error
    return kept


class FitCheckpoints(CheckpointIO):
    """Write checkpoints beside their place, synced, with a checksum, and remove older ones."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, then its checksum, which makes it count; keep the last two.

        Raises:
            OSError: It cannot be written; those before are as they were.
        """
        del storage_options
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        try:
            with partial.open("wb") as file:
                hashing = _Hashing(file)
                torch.save(checkpoint, cast("IO[bytes]", hashing))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        finally:
            partial.unlink(missing_ok=True)
        sync_folder(path.parent)
        write_atomically(_checksum_path(path), f"{hashing.digest()}\n".encode("ascii"))
        others = [p for p in _checkpoints(path.parent) if p != path]
        older = [p for p in others if p < path and _checksum_path(p).is_file()]
        for other in set(others) - set(older[: KEPT - 1]):
            self.remove_checkpoint(other)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in it is executed, whatever ``weights_only`` says."""
        del map_location, weights_only
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint; without its checksum first, so that no part of it counts."""
        _checksum_path(Path(path)).unlink(missing_ok=True)
        Path(path).unlink(missing_ok=True)


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the last one first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
