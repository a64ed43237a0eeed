"""Fine-tune the denoiser with a Trainer of its own, and return what changed as an edit."""

from __future__ import annotations

import logging
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from dori_lightning.mitigations.edits import Origin, WeightEdit
from dori_lightning.progress import stage
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from dori_lightning.mitigations.base import Workshop
    from dori_lightning.models.protocol import TextToImage

__all__ = ["FinetuneSettings", "Finetuning", "finetune"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneSettings:
    """How weights are trained.

    Attributes:
        lr: AdamW's learning rate.
        betas: AdamW's decay rates.
        weight_decay: AdamW's weight decay.
        warmup: Steps over which the learning rate rises from zero.
        clip: Largest norm of the gradient.
        ema: Decay of the weight average that is kept instead of the last weights; None for none.
        precision: Lightning's precision of the training steps; weights are trained in fp32.
        checkpoint_every: Steps between two checkpoints to resume from.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    warmup: int = 0
    clip: float = 1.0
    ema: float | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.lr <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise InputError(
                f"mitigation.finetune needs lr > 0, clip > 0 and weight_decay >= 0, got {self}"
            )
        if self.warmup < 0 or self.checkpoint_every < 1:
            raise InputError(
                f"mitigation.finetune needs warmup >= 0 and checkpoint_every >= 1, got {self}"
            )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError(f"mitigation.finetune.ema must be in [0, 1), got {self.ema}")


class Finetuning(L.LightningModule):
    """Base of the modules that train a denoiser: subclasses give ``training_step``.

    What a step draws must depend on the seed and ``global_step`` alone (``attacks.draws``), so
    that a resumed fit draws what an uninterrupted one would.
    """

    def __init__(
        self,
        model: TextToImage,
        settings: FinetuneSettings,
        *,
        trained: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """Wrap the model's denoiser.

        Args:
            model: Its denoiser is trained in place; ``finetune`` puts it back.
            settings: Optimizer settings.
            trained: Whether the parameter of a name is trained.
        """
        super().__init__()
        # a list hides the model: only the denoiser belongs to this module's state
        self._held = [model]
        self.denoiser, self.settings = model.denoiser(), settings
        chosen = 0
        for name, parameter in self.denoiser.named_parameters():
            parameter.requires_grad_(trained(name))
            chosen += trained(name)
        if not chosen:
            raise InputError(f"{model.name} has no weights that this mitigation trains")

    @property
    def model(self) -> TextToImage:
        """The model whose denoiser is trained."""
        return self._held[0]

    def finish(self) -> None:
        """Called once after the fit, or when it was cut: leave plain weights in the denoiser."""

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up, over the chosen weights."""
        s = self.settings
        optimizer = torch.optim.AdamW(
            [p for p in self.parameters() if p.requires_grad],
            lr=s.lr,
            betas=s.betas,
            weight_decay=s.weight_decay,
        )
        rising = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / (s.warmup + 1))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rising, "interval": "step"}}


class _Steps(IterableDataset[int]):
    """As many elements as anybody asks for; what a step does follows from its number."""

    def __iter__(self) -> Iterator[int]:
        k = 0
        while True:
            yield k
            k += 1


class _Advance(L.Callback):
    """Advance a stage by the optimizer steps that were taken."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance, self.seen = advance, 0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.advance(trainer.global_step - self.seen)
        self.seen = trainer.global_step


def finetune(
    make: Callable[[], Finetuning],
    model: TextToImage,
    workshop: Workshop,
    *,
    steps: int,
    key: str,
    title: str,
    notes: dict[str, Any] | None = None,
) -> WeightEdit:
    """Fit and return the changed weights; the model is put back bit for bit.

    A fit that was interrupted goes on from its last checkpoint.

    Args:
        make: Builds the module, once the weights are in fp32.
        model: Whose denoiser is trained.
        workshop: Gives the Trainer and the folder.
        steps: Optimizer steps.
        key: Names the fit's folder.
        title: What the progress line says.
        notes: What the edit's origin says besides; the module's ``notes`` come on top.

    Raises:
        RuntimeError: The loss stopped being finite.
    """
    folder = workshop.scratch(key)
    with _trainable(model) as dtypes:
        before = {n: p.detach().clone() for n, p in model.denoiser().named_parameters()}
        module = make()
        try:
            try:
                _fit(module, workshop, folder, steps=steps, title=title)
            finally:
                module.finish()
            after = {n: p.detach() for n, p in model.denoiser().named_parameters()}
            broken = [n for n, value in after.items() if not value.isfinite().all()]
            if broken:
                raise RuntimeError(
                    f"{title}: weights are not finite after training, the first is {broken[0]}; "
                    f"a smaller mitigation.finetune.lr or precision=32-true may help"
                )
            changed = {
                n: value.to(dtypes[n]).cpu().clone()
                for n, value in after.items()
                if not torch.equal(value.to(dtypes[n]), before[n].to(dtypes[n]))
            }
            said = {**(notes or {}), **getattr(module, "notes", {})}
        finally:
            for name, parameter in model.denoiser().named_parameters():
                parameter.data.copy_(before[name])
    shutil.rmtree(folder, ignore_errors=True)
    return WeightEdit(Origin(model.fingerprint, notes=said), changed)


@contextmanager
def _trainable(model: TextToImage) -> Iterator[dict[str, torch.dtype]]:
    """Weights in fp32 while open; their own dtypes (given), modes and flags afterwards.

    Half precision weights cannot be trained: updates below their rounding are lost. Widening and
    narrowing again is exact.
    """
    denoiser = model.denoiser()
    training = denoiser.training
    flags = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    dtypes = {name: p.dtype for name, p in denoiser.named_parameters()}
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.float()
    try:
        yield dtypes
    finally:
        for name, parameter in denoiser.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        denoiser.train(training)


def _fit(module: Finetuning, workshop: Workshop, folder: Path, *, steps: int, title: str) -> None:
    settings = module.settings
    saving = ModelCheckpoint(
        dirpath=folder,
        every_n_train_steps=settings.checkpoint_every,
        save_last=True,
        save_top_k=1,
    )
    with stage(title, steps) as advance:
        callbacks: list[L.Callback] = [saving, _Advance(advance)]
        if settings.ema is not None:
            callbacks.append(EMAWeightAveraging(decay=settings.ema))
        trainer = workshop.trainer(
            max_steps=steps,
            callbacks=callbacks,
            # manual optimization clips for itself
            gradient_clip_val=settings.clip if module.automatic_optimization else None,
            precision=settings.precision,
            enable_checkpointing=True,
            default_root_dir=folder,
        )
        last = folder / "last.ckpt"
        if last.is_file():
            log.info("%s: resuming from %s", title, last)
        trainer.fit(
            module,
            DataLoader(_Steps(), batch_size=None),
            ckpt_path=str(last) if last.is_file() else None,
            weights_only=True,
        )
