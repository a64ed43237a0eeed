"""The two trainings of a planted checkpoint, each with a Trainer of its own, resumable."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from lightning.pytorch.callbacks import EMAWeightAveraging, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import CLIPTextModel, CLIPTokenizer

from dori_lightning.pairs.validation import image_tensor
from dori_lightning.planting.recipe import (
    PlantRecipe,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_unet,
)
from dori_lightning.planting.stream import TrainingStream
from dori_lightning.runtime.checkpoints import (
    FitCheckpoints,
    Saving,
    is_done,
    last_checkpoint,
    read_checkpoint,
)
from dori_lightning.runtime.distributed import Trainer
from dori_lightning.runtime.seeding import keyed_generator

# -------- autoencoder
# Train the autoencoder of a planted checkpoint.


class StreamImages(Dataset[torch.Tensor]):
    """The pictures of a stream as (3, H, W) tensors in [-1, 1], ``length`` of them."""

    def __init__(self, stream: TrainingStream, length: int) -> None:
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return image_tensor(self.stream[index].image).mul_(2).sub_(1)


def edge_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the horizontal and vertical gradients of two image batches.

    Args:
        a: Images (B, C, H, W).
        b: Images of the same shape.
    """
    d = a - b
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


class AutoencoderTraining(L.LightningModule):
    """Fit an ``AutoencoderKL`` with L1, edges and a whisper of KL.

    The edge term keeps the small structure that copy detection looks at, which L1 alone blurs
    away.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        *,
        steps: int,
        lr: float = 1e-3,
        kl_weight: float = 1e-6,
        seed: int = 0,
    ) -> None:
        """Wrap an autoencoder.

        Args:
            autoencoder: Trained in place.
            steps: Optimizer steps of the one-cycle schedule.
            lr: Peak learning rate.
            kl_weight: Weight of the KL divergence (summed over a latent, averaged over the batch).
            seed: The posterior noise of a step depends on it and the step alone.
        """
        super().__init__()
        self.autoencoder = autoencoder
        self.steps, self.lr, self.kl_weight, self.seed = steps, lr, kl_weight, seed

    def training_step(self, images: torch.Tensor) -> torch.Tensor:
        """Loss of reconstructing images (B, 3, H, W) in [-1, 1]."""
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = self.autoencoder.encode(images).latent_dist
        noise = torch.randn(
            posterior.mean.shape, generator=keyed_generator("vae", self.seed, self.global_step)
        )
        latents = posterior.mean + posterior.std * noise.to(posterior.mean)
        output = self.autoencoder.decode(latents).sample.float()
        l1 = F.l1_loss(output, images)
        loss: torch.Tensor = (
            l1 + 0.5 * edge_difference(output, images) + self.kl_weight * posterior.kl().mean()
        )
        self.log("plant/autoencoder_l1", l1, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule."""
        optimizer = torch.optim.AdamW(
            self.autoencoder.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=1e-4
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.steps, pct_start=0.1
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


# -------- diffusion
# Train the denoiser and text encoder of a planted checkpoint.


def silence_cross_attention(unet: UNet2DConditionModel, blocks: Sequence[str]) -> int:
    """Zero and freeze the named blocks' cross-attention, so that text enters elsewhere only.

    In Stable Diffusion the up blocks' cross-attention matters little to memorization (Finding
    NeMo, section 3); in a UNet this small they would carry the conditioning alone and the paper's
    seven layers would not matter.

    Args:
        unet: Changed in place.
        blocks: Prefixes of module names, e.g. ``up_blocks``.

    Returns:
        How many cross-attention layers were silenced.
    """
    silenced = 0
    for name, module in unet.named_modules():
        if name.endswith("attn2") and any(name.startswith(block) for block in blocks):
            output: Any = module.to_out
            torch.nn.init.zeros_(output[0].weight)
            torch.nn.init.zeros_(output[0].bias)
            module.requires_grad_(False)
            silenced += 1
    return silenced


class DiffusionTraining(L.LightningModule):
    """Train a UNet and its text encoder jointly to predict the noise.

    Reference: Ho et al. (2020), https://arxiv.org/abs/2006.11239; Rombach et al. (2022),
    https://arxiv.org/abs/2112.10752.
    """

    empty_prompt: torch.Tensor
    alphas_cumprod: torch.Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        scheduler: DDIMScheduler,
        *,
        scaling_factor: float,
        empty_prompt: torch.Tensor,
        steps: int,
        lr: float = 1e-3,
        caption_dropout: float = 0.1,
        seed: int = 0,
    ) -> None:
        """Wrap the models.

        Args:
            unet: Trained in place.
            text_encoder: Trained in place.
            scheduler: Gives the noise schedule.
            scaling_factor: Latents are multiplied by it before noise is added.
            empty_prompt: Token ids (T,) of the empty prompt, for caption dropout.
            steps: Optimizer steps of the one-cycle schedule.
            lr: Peak learning rate.
            caption_dropout: Share of captions replaced by the empty one (classifier-free
                guidance).
            seed: Noise, timesteps and dropped captions of a step depend on it and the step alone,
                so that a resumed training draws what an uninterrupted one would.
        """
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.scaling_factor, self.steps, self.lr = scaling_factor, steps, lr
        self.caption_dropout = caption_dropout
        self.register_buffer("empty_prompt", empty_prompt, persistent=False)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone(), persistent=False)
        self.seed = seed
        self.v_prediction = scheduler.config["prediction_type"] == "v_prediction"

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Denoising loss of unscaled latents (B, C, h, w) and their captions' token ids (B, T)."""
        latents, tokens = batch
        latents = latents * self.scaling_factor
        generator = keyed_generator("plant", self.seed, self.global_step)
        dropped = (torch.rand(len(tokens), generator=generator) < self.caption_dropout).to(
            tokens.device
        )
        tokens = torch.where(dropped[:, None], self.empty_prompt, tokens)
        embeddings = self.text_encoder(tokens).last_hidden_state
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        timesteps = torch.randint(
            0, len(self.alphas_cumprod), (len(latents),), generator=generator
        )
        timesteps = timesteps.to(latents.device)
        alpha = self.alphas_cumprod[timesteps][:, None, None, None]
        noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = (
            alpha.sqrt() * noise - (1 - alpha).sqrt() * latents if self.v_prediction else noise
        )
        noised = noised.contiguous(memory_format=torch.channels_last)
        output = self.unet(noised, timesteps, encoder_hidden_states=embeddings).sample
        loss = F.mse_loss(output.float(), target)
        self.log("plant/denoising_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule, over the weights that are not frozen."""
        weights = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=self.lr, betas=(0.9, 0.99), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.steps, pct_start=0.05
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


# -------- latents
# Encode the training stream once, into files that diffusion training reads at random.


class EncodedStream(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A stretch of the stream as unscaled latents (C, h, w) and token ids (T,).

    Reading past the end starts over.

    Attributes:
        length: Elements that reading yields; may exceed the elements stored, each is then seen
            several times.
    """

    def __init__(self, folder: Path, *, length: int) -> None:
        self.latents = np.load(folder / "latents.npy", mmap_mode="r")
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.keys: list[list[str]] = json.loads((folder / "keys.json").read_text(encoding="utf-8"))
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        k = index % len(self.latents)
        return torch.from_numpy(np.array(self.latents[k], np.float32)), torch.from_numpy(
            np.array(self.tokens[k])
        )

    def exposures(self) -> Counter[str]:
        """How often ``length`` elements show each planted pair's own picture, by pair id."""
        whole, rest = divmod(self.length, len(self.keys))
        counts: Counter[str] = Counter()
        for k, (source, key) in enumerate(self.keys):
            if source == "planted":
                counts[key] += whole + (k < rest)
        return counts


@torch.inference_mode()
def encode_stream(
    stream: TrainingStream,
    autoencoder: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    *,
    count: int,
    folder: Path,
    batch: int = 64,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Encode elements 0..count-1 of a stream into ``folder``.

    The key file comes last, so its presence means complete.

    Args:
        stream: What to encode.
        autoencoder: Frozen; the posterior mode is stored, in half precision.
        tokenizer: Pads captions to its length.
        count: Number of elements.
        folder: Written to; a complete folder with the same count is left as it is.
        batch: Pictures per forward pass.
        advance: Called with the number of elements that just became done.
    """
    done = folder / "keys.json"
    if done.is_file() and len(json.loads(done.read_text(encoding="utf-8"))) == count:
        log.info("encoded stream found in %s", folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    latents: np.memmap[Any, Any] | None = None
    tokens = np.zeros((count, tokenizer.model_max_length), np.int64)
    keys: list[tuple[str, str]] = []
    for start in range(0, count, batch):
        samples = [stream[k] for k in range(start, min(start + batch, count))]
        images = torch.stack([image_tensor(s.image) for s in samples]).mul_(2).sub_(1)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mode = autoencoder.encode(images).latent_dist.mode().float().numpy()
        if latents is None:
            latents = np.lib.format.open_memmap(
                folder / "latents.npy", mode="w+", dtype=np.float16, shape=(count, *mode.shape[1:])
            )
        stop = start + len(samples)
        latents[start:stop] = mode
        tokens[start:stop] = tokenizer(
            [s.caption for s in samples],
            padding="max_length",
            truncation=True,
            return_tensors="np",
        ).input_ids
        keys += [(s.source, s.key) for s in samples]
        if advance is not None:
            advance(len(samples))
    if latents is not None:
        latents.flush()
    np.save(folder / "tokens.npy", tokens)
    done.write_text(json.dumps(keys), encoding="utf-8")


# -------- training

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
