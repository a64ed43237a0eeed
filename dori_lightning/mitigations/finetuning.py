"""Fine-tune the denoiser with a Trainer of its own, and return what changed as an edit.

A fine-tuning is a ``FinetunedMitigation``, which holds the settings, and a ``Finetuning`` module,
whose ``training_step`` draws a batch and returns its loss.
"""

import itertools
import shutil
import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dori_lightning.mitigations.base import Context, edit_key, require, require_pairs
from dori_lightning.mitigations.edits import Origin, WeightEdit
from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime import distributed
from dori_lightning.runtime.artifacts import check_space
from dori_lightning.runtime.checkpoints import (
    KEPT,
    FitCheckpoints,
    Saving,
    checkpoint_step,
    is_done,
    last_checkpoint,
)
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.runtime.signals import Interrupted
from dori_lightning.types import InputError, Pair


@dataclass(frozen=True)
class FinetuneSettings:
    """How weights are trained.

    Attributes:
        lr: AdamW's learning rate.
        betas: AdamW's decay rates.
        weight_decay: AdamW's weight decay.
        warmup: Steps over which the learning rate rises from zero.
        decay: Lower the learning rate linearly to zero from there to the last step.
        clip: Largest norm of the gradient; None does not clip.
        precision: Lightning's precision of the training steps; weights are trained in fp32. A
            checkpoint loaded with a lower ``checkpoint.precision`` computes in that.
        checkpoint_every: Steps between two checkpoints to resume from.
    """

    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    warmup: int = 0
    decay: bool = False
    clip: float | None = 1.0
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        require(
            self.lr > 0 and (self.clip is None or self.clip > 0) and self.weight_decay >= 0,
            "finetune needs lr > 0, clip > 0 (or null) and weight_decay >= 0",
            self,
        )
        require(
            self.warmup >= 0 and self.checkpoint_every >= 1,
            "finetune needs warmup >= 0 and checkpoint_every >= 1",
            self,
        )


class Finetuning(L.LightningModule):
    """Base of the modules that train a denoiser: subclasses give ``training_step``.

    What a step draws must depend on the seed and ``global_step`` alone (``keyed_generator``), so
    that a resumed fit draws what an uninterrupted one would, and every process the same. Each
    then takes its rows of the batch (``distributed.shard``), or all of them: the gradients are
    averaged over processes, and give the same step either way.
    """

    def __init__(
        self,
        model: TextToImage,
        settings: FinetuneSettings,
        *,
        trained: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """Train the denoiser in place, the parameters whose names are ``trained``."""
        super().__init__()
        # a list hides the model: only the denoiser belongs to this module's state
        self._unregistered = [model]
        self.denoiser, self.settings = model.denoiser(), settings
        self.worked: Callable[[int], None] = lambda _: None
        for name, parameter in self.denoiser.named_parameters():
            parameter.requires_grad_(trained(name))
        if not self.trained_weights():
            raise InputError(f"{model.name} has no weights that this mitigation trains")

    @property
    def model(self) -> TextToImage:
        """The model whose denoiser is trained."""
        return self._unregistered[0]

    @property
    def notes(self) -> dict[str, Any]:
        """What the edit's origin says of the training; plain values."""
        return {}

    @property
    def reused(self) -> int:
        """UNet evaluations of other mitigations that this one would have needed as well."""
        return 0

    def trained_weights(self) -> list[nn.Parameter]:
        """Weights that the optimizer changes."""
        return [p for p in self.parameters() if p.requires_grad]

    def work(self, steps: int) -> int:
        """Progress after some optimizer steps; ``worked`` is told of progress between steps."""
        return steps

    def finish(self) -> None:
        """Called once after the fit, or when it was cut: leave plain weights in the denoiser."""

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up of the learning rate and, optionally, linear decay."""
        s = self.settings
        optimizer = torch.optim.AdamW(
            self.trained_weights(), lr=s.lr, betas=s.betas, weight_decay=s.weight_decay
        )
        total = self.trainer.max_steps

        def share(step: int) -> float:
            if step < s.warmup:
                return (step + 1) / (s.warmup + 1)
            return (total - step) / max(total - s.warmup, 1) if s.decay else 1.0

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def shuffled_indices(name: str, seed: int, step: int, *, batch: int, count: int) -> list[int]:
    """The ``batch`` indices of a step: epochs over ``count`` elements, each in another order.

    ``name`` keeps the draws of several methods apart; steps count from 0.
    """
    orders: dict[int, list[int]] = {}
    indices = []
    for place in range(step * batch, (step + 1) * batch):
        epoch, k = divmod(place, count)
        if epoch not in orders:
            generator = keyed_generator("in turn", name, seed, epoch)
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        indices.append(orders[epoch][k])
    return indices


class FinetunedMitigation(ABC):
    """A mitigation that trains the denoiser; subclasses are frozen dataclasses of settings.

    Attributes:
        name: How reports call it.
        steps: Optimizer steps.
        finetune: Optimizer settings.
    """

    name: str
    steps: int
    finetune: FinetuneSettings

    @abstractmethod
    def training(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> Callable[[], Finetuning]:
        """Find what is trained on with the model as it is.

        Returns:
            What builds the module, once the weights are in fp32.
        """

    def trains(self, model: TextToImage, name: str) -> bool:
        """Whether the denoiser's parameter of a name is trained."""
        del model, name
        return True

    def added_weights(self, model: TextToImage) -> int:
        """Weights that are added to the denoiser's for the training, and trained."""
        del model
        return 0

    def fit_key(
        self, model: TextToImage, pairs: Sequence[Pair], context: Context
    ) -> tuple[str, bool]:
        """Names the fit's checkpoints, and says whether they stay for a longer fit to go on."""
        return edit_key(self, model, pairs, context), False

    def apply(self, model: TextToImage, pairs: Sequence[Pair], context: Context) -> WeightEdit:
        """Train the denoiser, which is put back bit for bit, and return the changed weights.

        Raises:
            InputError: There are no pairs, or the disk does not hold the checkpoints.
            RuntimeError: The loss or the weights stopped being finite, or the fit ended early.
        """
        require_pairs(pairs, self.name)
        key, stays = self.fit_key(model, pairs, context)
        _check_disk(self, model, context.scratch(key))
        make = self.training(model, pairs, context)
        return finetune(
            make, model, context, steps=self.steps, key=key, title=self.name, stays=stays
        )


def finetune(
    make: Callable[[], Finetuning],
    model: TextToImage,
    context: Context,
    *,
    steps: int,
    key: str,
    title: str,
    stays: bool = False,
) -> WeightEdit:
    """Fit and return the changed weights; the model is put back bit for bit.

    A fit that was interrupted goes on from its last checkpoint, in the folder of its ``key``,
    which ``stays`` where a longer fit goes on from this one's end. The module is made once the
    weights are in fp32; ``title`` is what the progress line says.

    Raises:
        RuntimeError: The loss or the weights stopped being finite, or the fit ended early.
    """
    folder = context.scratch(key)
    with _trainable(model) as before:
        module = make()
        try:
            _fit(module, model, context, folder, steps=steps, title=title)
        finally:
            module.finish()
        after = {n: p.detach() for n, p in model.denoiser().named_parameters()}
        broken = [n for n, value in after.items() if not value.isfinite().all()]
        if broken:
            raise RuntimeError(
                f"{title}: weights are not finite after training, the first is {broken[0]}; "
                f"a smaller mitigation.finetune.lr or precision=32-true may help"
            )
        # on the CPU, where Lightning leaves what it trained
        trained = {n: value.cpu().to(before[n].dtype) for n, value in after.items()}
        changed = {n: v.clone() for n, v in trained.items() if not torch.equal(v, before[n].cpu())}
        notes, reused = module.notes, module.reused
    distributed.barrier()  # the others may still read it
    if distributed.is_first() and not stays:
        shutil.rmtree(folder, ignore_errors=True)
    cost = {"reused_evaluations": float(reused)} if reused else {}
    return WeightEdit(Origin(model.fingerprint, notes=notes, cost=cost), changed)


@contextmanager
def _trainable(model: TextToImage) -> Iterator[dict[str, torch.Tensor]]:
    """Copies of the weights in fp32 while open; the weights themselves (given) afterwards.

    Half precision weights cannot be trained: updates below their rounding are lost.
    """
    denoiser = model.denoiser()
    modes = [(module, module.training) for module in denoiser.modules()]
    flags = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    before = {name: p.data for name, p in denoiser.named_parameters()}
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)
    try:
        yield before
    finally:
        # Lightning leaves a module on the CPU
        denoiser.to(model.device)
        for name, parameter in denoiser.named_parameters():
            parameter.data = before[name]
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


def _check_disk(method: FinetunedMitigation, model: TextToImage, folder: Path) -> None:
    """Refuse a fit whose checkpoints the disk does not hold, before anything is generated for it.

    A checkpoint holds all weights in fp32 and the optimizer's two moments of those that are
    trained. While one is written, the last two are there. The edit comes when they are gone, and
    is smaller than one.

    Raises:
        InputError: The disk has less.
    """
    sizes = {name: p.numel() for name, p in model.denoiser().named_parameters()}
    added = method.added_weights(model)
    weights = sum(sizes.values()) + added
    moments = 2 * (sum(size for name, size in sizes.items() if method.trains(model, name)) + added)
    check_space(
        folder,
        (KEPT + 1) * 4 * (weights + moments),
        fix="or choose another disk for edits with paths.cache=FOLDER",
    )


class _Steps(IterableDataset[int]):
    """Endless numbers: what a step trains on follows from its number alone."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class _Progress(L.Callback):
    """Show progress; stop at a loss that is not finite."""

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


def _fit(
    module: Finetuning,
    model: TextToImage,
    context: Context,
    folder: Path,
    *,
    steps: int,
    title: str,
) -> None:
    """Train ``module`` up to ``steps`` optimizer steps, going on from ``folder``'s checkpoint.

    All processes of the run train together. The folder's checkpoints stay afterwards.

    Raises:
        RuntimeError: The loss stopped being finite, or the fit ended early.
        Interrupted: The run was told to leave; the next one goes on from here.
        KeyboardInterrupt: The user stopped it.
    """
    settings = module.settings
    last = None
    if distributed.is_first():
        last = last_checkpoint(folder, title)
        if last is not None and checkpoint_step(last) > steps:
            # of a longer fit that went on from this one, whose end is not known any more
            shutil.rmtree(folder)
            last = None
    last = distributed.broadcast_object(last)
    if last is not None and is_done(module, last, steps):
        return
    with progress_bar(title, module.work(steps)) as advance:
        trainer = context.trainer(
            max_steps=steps,
            callbacks=[
                Saving(folder, settings.checkpoint_every),
                _Progress(title, module, advance),
            ],
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
            distributed.leave(told)
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
    if distributed.world_size() > 1:
        return {"accelerator": device.type}  # the others as configured
    alone = 1 if device.type == "cpu" else [device.index or 0]
    return {"accelerator": device.type, "devices": alone, "num_nodes": 1, "strategy": "auto"}
