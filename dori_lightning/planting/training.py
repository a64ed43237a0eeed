"""The two trainings of a planted checkpoint, each with a Trainer of its own, resumable."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, TQDMProgressBar
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dori_lightning.mitigations.checkpoints import (
    FitCheckpoints,
    last_checkpoint,
    read_checkpoint,
)
from dori_lightning.mitigations.fitting import Saving, is_done
from dori_lightning.planting.autoencoder import AutoencoderTraining, StreamImages
from dori_lightning.planting.diffusion import DiffusionTraining, silence_cross_attention
from dori_lightning.planting.latents import EncodedStream
from dori_lightning.planting.recipe import build_autoencoder, build_scheduler, build_unet
from dori_lightning.planting.text import build_text_encoder
from dori_lightning.trainers import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from lightning.pytorch.loggers import Logger
    from transformers import CLIPTextModel, CLIPTokenizer

    from dori_lightning.pairs.stream import TrainingStream
    from dori_lightning.planting.recipe import PlantRecipe

__all__ = ["latent_scale", "train_autoencoder", "train_diffusion"]

log = logging.getLogger(__name__)

CHECKPOINT_EVERY = 250
_CURVE_POINTS = 500


class _LogLines(L.Callback):
    """Log the loss and the time left now and then, where there is no terminal for a bar."""

    def __init__(self, every: int) -> None:
        self.every, self.start = every, time.monotonic()
        self.first = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del pl_module
        self.start, self.first = time.monotonic(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, total = trainer.global_step, int(trainer.max_steps)
        if step % self.every == 0:
            left = (time.monotonic() - self.start) / max(step - self.first, 1) * (total - step)
            values = ", ".join(
                f"{k} {float(v):.4f}" for k, v in sorted(trainer.callback_metrics.items())
            )
            log.info("step %d of %d: %s, about %d s left", step, total, values, round(left))


def _trainer(
    steps: int,
    folder: Path,
    *,
    precision: str,
    callbacks: list[L.Callback],
    bar: bool,
    logger: Logger | None,
) -> L.Trainer:
    shown: list[L.Callback] = [TQDMProgressBar()] if bar else [_LogLines(50)]
    made: L.Trainer = Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        gradient_clip_val=1.0,
        logger=logger or False,
        log_every_n_steps=max(1, steps // _CURVE_POINTS),
        enable_progress_bar=bar,
        enable_model_summary=False,
        callbacks=[Saving(folder, CHECKPOINT_EVERY), *shown, *callbacks],
        plugins=[FitCheckpoints()],
        default_root_dir=folder,
    )
    return made


class _Rest(IterableDataset[Any]):
    """Elements of a data set from ``start`` on: after a resume the stream goes on where it was.

    Without a length, since Lightning counts the batches before the resume into an epoch's length.
    """

    def __init__(self, data: Dataset[Any], length: int, start: int) -> None:
        self.data, self.length, self.start = data, length, start

    def __iter__(self) -> Iterator[Any]:
        return (self.data[k] for k in range(self.start, self.length))


def _fit(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: Dataset[Any],
    length: int,
    batch: int,
    folder: Path,
) -> None:
    """Fit, going on from ``folder``'s last whole checkpoint where there is one.

    Raises:
        Interrupted: The run was told to leave; the next one goes on from here.
    """
    last, done = last_checkpoint(folder, folder.name), 0
    if last is not None:
        if is_done(module, last, int(trainer.max_steps)):
            return
        done = int(read_checkpoint(last)["global_step"])
    loader = DataLoader(_Rest(data, length, done * batch), batch_size=batch)
    ckpt_path = None if last is None else str(last)
    trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True)


def train_autoencoder(
    recipe: PlantRecipe,
    stream: TrainingStream,
    folder: Path,
    *,
    seed: int,
    bar: bool,
    logger: Logger | None = None,
) -> AutoencoderKL:
    """Train the autoencoder on ``stream``, going on where a training in ``folder`` was cut."""
    L.seed_everything(seed, verbose=False)
    autoencoder = build_autoencoder(recipe)
    autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
    module = AutoencoderTraining(
        autoencoder, steps=recipe.autoencoder_steps, lr=recipe.autoencoder_lr, seed=seed
    )
    length = recipe.autoencoder_steps * recipe.autoencoder_batch
    trainer = _trainer(
        recipe.autoencoder_steps, folder, precision="bf16", callbacks=[], bar=bar, logger=logger
    )
    _fit(trainer, module, StreamImages(stream, length), length, recipe.autoencoder_batch, folder)
    return autoencoder.eval().requires_grad_(False)


def latent_scale(stream: EncodedStream, *, count: int = 4000) -> float:
    """Scaling factor that gives latents of the stream unit standard deviation."""
    rows = torch.stack([stream[k][0] for k in range(min(count, len(stream)))])
    return float(1.0 / rows.std())


def train_diffusion(
    recipe: PlantRecipe,
    stream: EncodedStream,
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    scaling_factor: float,
    seed: int,
    bar: bool,
    logger: Logger | None = None,
) -> tuple[UNet2DConditionModel, CLIPTextModel, DDIMScheduler]:
    """Train UNet and text encoder on an encoded stream; the averaged weights are returned."""
    L.seed_everything(seed + 1, verbose=False)
    unet = build_unet(recipe)
    log.info(
        "silenced %d cross-attention layers", silence_cross_attention(unet, recipe.silent_blocks)
    )
    text_encoder = build_text_encoder(
        tokenizer, width=recipe.text_width, layers=recipe.text_layers, heads=recipe.text_heads
    )
    scheduler = build_scheduler(recipe)
    module = DiffusionTraining(
        unet,
        text_encoder,
        scheduler,
        scaling_factor=scaling_factor,
        empty_prompt=torch.tensor(tokenizer("", padding="max_length").input_ids),
        steps=recipe.steps,
        lr=recipe.lr,
        caption_dropout=recipe.caption_dropout,
        seed=seed,
    )
    average = EMAWeightAveraging(decay=recipe.ema_decay)
    trainer = _trainer(
        recipe.steps,
        folder,
        precision=recipe.precision,
        callbacks=[average],
        bar=bar,
        logger=logger,
    )
    _fit(trainer, module, stream, len(stream), recipe.batch, folder)
    text_encoder.eval()  # type: ignore[no-untyped-call]
    return unet.eval(), text_encoder, scheduler
