"""Checkpoints that a fit resumes from: whole and checked, or not used; the last two are kept.

A file's name holds the step and the SHA-256 of its content, so a file that was cut or has changed
does not count. Lightning's own checkpoints lie in a temporary folder until they are whole and are
copied from there, which leaves half of one, and none of those before, where that folder is on
another device.
"""

import hashlib
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from dori_lightning.runtime import distributed, signals
from dori_lightning.runtime.artifacts import partial_file, sync_folder
from dori_lightning.runtime.signals import Interrupted
from dori_lightning.types import InputError, first_line

log = logging.getLogger(__name__)

KEPT = 2
"""Checkpoints of a fit, besides the one that is being written."""

_NAME = re.compile(r"step-(\d{8,})-([0-9a-f]{64})\.ckpt")


class Saving(Checkpoint):
    """Write a checkpoint every so many steps, and before all processes leave on a signal.

    All processes meet twice in a step: before the gradients are averaged, where those that left
    during a search for adversarial embeddings are missed, and at its end. Whoever leaves, leaves
    with all others.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.saved = -1

    def on_before_backward(self, *_: Any) -> None:
        """Meet those that may have left during a search."""
        distributed.barrier()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write every so many steps, then meet, and leave together where one is to leave."""
        if trainer.global_step % self.every == 0:
            self._save(trainer)
        distributed.barrier(signals.received())

    def on_exception(
        self, trainer: L.Trainer, _module: L.LightningModule, error: BaseException
    ) -> None:
        """Write before leaving on a signal."""
        # a search that is left leaves the pool as it was before
        if isinstance(error, Interrupted) and distributed.leave(error):
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if self.saved != trainer.global_step:
            trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}.ckpt")
            self.saved = trainer.global_step


class FitCheckpoints(CheckpointIO):
    """Write checkpoints beside their place, synced, and rename them to their checksum."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, then remove all but the last two.

        Args:
            checkpoint: Tensors and plain values.
            path: ``FOLDER/step-00000000.ckpt``; the checksum is added to the name.
            storage_options: Not used.

        Raises:
            OSError: It cannot be written; those before are as they were.
        """
        del storage_options
        path = Path(path)
        with partial_file(path) as partial:
            with partial.open("w+b") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            path = partial.replace(path.with_stem(f"{path.stem}-{digest}"))
        sync_folder(path.parent)
        others = [other for other in _checkpoints(path.parent) if other != path]
        # later ones are damaged: the fit went on from before them
        before = [other for other in others if checkpoint_step(other) < checkpoint_step(path)]
        for other in set(others) - set(before[: KEPT - 1]):
            self.remove_checkpoint(other)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in it is executed, whatever ``weights_only`` says."""
        del map_location, weights_only
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        Path(path).unlink(missing_ok=True)


def last_checkpoint(folder: Path, title: str) -> Path | None:
    """The last undamaged checkpoint in a fit's folder; None where there is none.

    Args:
        folder: The fit's folder.
        title: What lines of the log begin with.
    """
    paths = _checkpoints(folder)
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest in path.name:
            log.info("%s: going on from step %d", title, checkpoint_step(path))
            return path
        log.warning("%s: %s IS DAMAGED and is not used", title, path)
    if paths:
        log.warning("%s: no checkpoint in %s is whole, so training begins anew", title, folder)
    return None


def checkpoint_step(path: Path) -> int:
    """Optimizer steps after which a checkpoint was written."""
    return int(path.name.split("-")[1])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    Raises:
        InputError: It holds more than tensors and plain values, so no fit of this program wrote
            it.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, or is damaged, and is not opened\n"
            f"  where: {first_line(error)}\n"
            f"  fix:   remove it; the fit then begins anew"
        ) from error
    return checkpoint


def is_done(module: L.LightningModule, last: Path, steps: int) -> bool:
    """Whether a checkpoint is a fit's end; loads its weights into ``module`` then.

    A Trainer that has nothing left to do would not put the average of the weights in place.
    """
    if checkpoint_step(last) < steps:
        return False
    checkpoint = read_checkpoint(last)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    return True


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the last one first."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(paths, key=checkpoint_step, reverse=True)
