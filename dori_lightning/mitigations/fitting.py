"""Run one fit of a fine-tuning: checkpoints, progress, resume, and what may go wrong."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

from dori_lightning import interruption, processes
from dori_lightning.interruption import Interrupted
from dori_lightning.mitigations.checkpoints import (
    FitCheckpoints,
    checkpoint_path,
    last_checkpoint,
    read_checkpoint,
)
from dori_lightning.progress import stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dori_lightning.mitigations.base import Workshop
    from dori_lightning.mitigations.finetuning import Finetuning
    from dori_lightning.models.protocol import TextToImage

__all__ = ["Saving", "fit", "is_done"]


class _Steps(IterableDataset[int]):
    """As many elements as anybody asks for; what a step does follows from its number."""

    def __iter__(self) -> Iterator[int]:
        k = 0
        while True:
            yield k
            k += 1


class _Advance(L.Callback):
    """Advance a stage by the work that was done; stop at a loss that is no number."""

    def __init__(self, title: str, module: Finetuning, advance: Callable[[int], None]) -> None:
        self.title, self.module, self.advance, self.seen = title, module, advance, 0
        module.worked = self._add

    def _add(self, work: int) -> None:
        self.seen += work
        self.advance(work)

    # checkpoints come after all other callbacks, so none holds the broken weights
    def on_train_batch_end(
        self, trainer: L.Trainer, _module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None and not bool(torch.isfinite(loss)):
            raise RuntimeError(
                f"{self.title}: the loss stopped being finite at step {trainer.global_step}; "
                f"a smaller mitigation.finetune.lr or precision=32-true may help"
            )
        self._add(self.module.work(trainer.global_step) - self.seen)


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
        processes.vote()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Write every so many steps, then meet, and leave together where one is to leave."""
        if trainer.global_step % self.every == 0:
            self._save(trainer)
        processes.vote(interruption.received())

    def on_exception(
        self, trainer: L.Trainer, _module: L.LightningModule, error: BaseException
    ) -> None:
        """Write before leaving on a signal."""
        # a search of triggers that is left leaves the pool as it was before
        if isinstance(error, Interrupted) and processes.leave(error):
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if self.saved != trainer.global_step:
            trainer.save_checkpoint(checkpoint_path(self.folder, trainer.global_step))
            self.saved = trainer.global_step


def fit(
    module: Finetuning,
    model: TextToImage,
    workshop: Workshop,
    folder: Path,
    *,
    steps: int,
    title: str,
) -> None:
    """Train ``module`` up to ``steps`` optimizer steps, going on from ``folder``'s checkpoint.

    All processes of the run train together.

    Args:
        module: What is trained, in place.
        model: Its model, which says where to train.
        workshop: Makes the Trainer.
        folder: Where checkpoints are kept; stays afterwards.
        steps: Optimizer steps.
        title: What the progress line and errors say.

    Raises:
        RuntimeError: The loss stopped being finite, or the fit ended early.
        Interrupted: The run was told to leave; the next one goes on from here.
        KeyboardInterrupt: The user stopped it.
    """
    settings = module.settings
    last = processes.from_first(last_checkpoint(folder, title) if processes.is_first() else None)
    if last is not None and is_done(module, last, steps):
        return
    with stage(title, module.work(steps)) as advance:
        callbacks: list[L.Callback] = [
            Saving(folder, settings.checkpoint_every),
            _Advance(title, module, advance),
        ]
        if settings.ema is not None:
            # by interpolation, which leaves weights that are not trained as they are to the bit;
            # EMAWeightAveraging adds two products, which rounds
            average = get_ema_multi_avg_fn(settings.ema)  # type: ignore[no-untyped-call]
            callbacks.append(WeightAveraging(use_buffers=False, multi_avg_fn=average))
        trainer = workshop.trainer(
            max_steps=steps,
            callbacks=callbacks,
            plugins=[FitCheckpoints()],
            # manual optimization clips for itself
            gradient_clip_val=settings.clip if module.automatic_optimization else None,
            precision=settings.precision,
            enable_checkpointing=True,
            default_root_dir=folder,
            **_devices(model),
        )
        handler = signal.getsignal(signal.SIGINT)
        try:
            with warnings.catch_warnings():
                # a pretrained denoiser is trained as it is used, and checkpoints hold what a step
                # led to
                for intended in (".*in eval mode at the start", ".*no pre-optimization state"):
                    warnings.filterwarnings("ignore", message=intended)
                trainer.fit(
                    module,
                    DataLoader(_Steps(), batch_size=None),
                    ckpt_path=None if last is None else str(last),
                    weights_only=True,
                )
        except Interrupted as told:
            processes.leave(told)
            raise
        except SystemExit as left:
            # Lightning makes Ctrl+C an exit and ignores it from then on
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, handler)
            raise KeyboardInterrupt from left
    if trainer.global_step < steps:
        raise RuntimeError(
            f"{title}: the fit ended after {trainer.global_step} of {steps} steps; what it "
            f"trained so far is no edit"
        )


def _devices(model: TextToImage) -> dict[str, Any]:
    """Where to train: where the model is, since its tensors that are no weights stay there."""
    device = model.device
    if processes.world() > 1:
        return {"accelerator": device.type}  # the others as configured
    alone = 1 if device.type == "cpu" else [device.index or 0]
    return {"accelerator": device.type, "devices": alone, "num_nodes": 1, "strategy": "auto"}


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
