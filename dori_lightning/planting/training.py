"""The two trainings of a planted checkpoint, each with a Trainer of its own, resumable."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPTextModel, CLIPTokenizer

from dori_lightning.planting.recipe import (
    PlantRecipe,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_unet,
)
from dori_lightning.planting.stream import EncodedStream, StreamImages, TrainingStream
from dori_lightning.runtime.checkpoints import (
    FitCheckpoints,
    Saving,
    checkpoint_step,
    is_done,
    last_checkpoint,
)
from dori_lightning.runtime.distributed import Trainer
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.runtime.seeding import keyed_generator

log = logging.getLogger(__name__)

CHECKPOINT_EVERY = 250
KL_WEIGHT = 1e-6
"""Of the autoencoder's KL divergence, summed over a latent and averaged over the batch."""

_CURVE_POINTS = 500


def train_autoencoder(
    recipe: PlantRecipe,
    stream: TrainingStream,
    folder: Path,
    *,
    seed: int,
    logger: Logger | None = None,
) -> AutoencoderKL:
    """Train the autoencoder on ``stream``, going on where a training in ``folder`` was cut."""
    L.seed_everything(seed, verbose=False)
    autoencoder = build_autoencoder(recipe)
    autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
    steps, batch = recipe.autoencoder_steps, recipe.autoencoder_batch
    module = AutoencoderTraining(autoencoder, steps=steps, lr=recipe.autoencoder_lr, seed=seed)
    data = StreamImages(stream, steps * batch)
    _fit(module, data, folder, batch=batch, precision="bf16", logger=logger)
    return autoencoder.eval().requires_grad_(False)


def latent_scale(stream: EncodedStream) -> float:
    """Scaling factor that gives the first 4,000 latents of the stream unit standard deviation."""
    rows = torch.stack([stream[k][0] for k in range(min(4000, len(stream)))])
    return float(1.0 / rows.std())


def train_diffusion(
    recipe: PlantRecipe,
    stream: EncodedStream,
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    scaling_factor: float,
    seed: int,
    logger: Logger | None = None,
) -> tuple[UNet2DConditionModel, CLIPTextModel, DDIMScheduler]:
    """Train UNet and text encoder on an encoded stream; the averaged weights are returned."""
    L.seed_everything(seed + 1, verbose=False)
    unet = build_unet(recipe)
    silenced = silence_cross_attention(unet, recipe.silent_blocks)
    log.info("silenced %d cross-attention layers", silenced)
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
    _fit(module, stream, folder, batch=recipe.batch, precision=recipe.precision, logger=logger,
         callbacks=(average,))  # fmt: skip
    text_encoder.eval()  # type: ignore[no-untyped-call]
    return unet.eval(), text_encoder, scheduler


def _edge_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the horizontal and vertical gradients of two image batches.

    Args:
        a: Images (B, C, H, W).
        b: Images of the same shape.
    """
    d = a - b
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


class AutoencoderTraining(L.LightningModule):
    """Fit an ``AutoencoderKL`` with L1, edges and a little KL.

    The edge term keeps the small structure that copy detection looks at, which L1 alone blurs
    away.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        *,
        steps: int,
        lr: float,
        seed: int,
    ) -> None:
        """Wrap an autoencoder.

        Args:
            autoencoder: Trained in place.
            steps: Optimizer steps of the one-cycle schedule.
            lr: Peak learning rate.
            seed: The posterior noise of a step depends on it and the step alone.
        """
        super().__init__()
        self.autoencoder = autoencoder
        self.steps, self.lr, self.seed = steps, lr, seed

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
        edges, kl = _edge_difference(output, images), posterior.kl().mean()
        loss: torch.Tensor = l1 + 0.5 * edges + KL_WEIGHT * kl
        self.log("plant/autoencoder_l1", l1)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule."""
        return _one_cycle(self, self.steps, lr=self.lr, weight_decay=1e-4, warmup=0.1)


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
        lr: float,
        caption_dropout: float,
        seed: int,
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
        dropped = torch.rand(len(tokens), generator=generator) < self.caption_dropout
        tokens = torch.where(dropped.to(tokens.device)[:, None], self.empty_prompt, tokens)
        embeddings = self.text_encoder(tokens).last_hidden_state
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        count = len(self.alphas_cumprod)
        timesteps = torch.randint(0, count, (len(latents),), generator=generator).to(
            latents.device
        )
        alpha = self.alphas_cumprod[timesteps][:, None, None, None]
        noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        target = noise
        if self.v_prediction:
            target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        noised = noised.contiguous(memory_format=torch.channels_last)
        output = self.unet(noised, timesteps, encoder_hidden_states=embeddings).sample
        loss = F.mse_loss(output.float(), target)
        self.log("plant/denoising_loss", loss)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule."""
        return _one_cycle(self, self.steps, lr=self.lr, weight_decay=1e-3, warmup=0.05)


def _one_cycle(
    module: L.LightningModule, steps: int, *, lr: float, weight_decay: float, warmup: float
) -> OptimizerLRScheduler:
    """AdamW under a one-cycle schedule, over the weights that are not frozen."""
    weights = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=warmup
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Advance(L.Callback):
    """Move the progress line on by a step."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.advance(trainer.global_step)  # those before a resume

    def on_train_batch_end(self, *_: Any) -> None:
        self.advance(1)


class _Rest(IterableDataset[Any]):
    """Elements of a data set from ``start`` on: after a resume the stream goes on where it was.

    Without a length, since Lightning counts the batches before the resume into an epoch's length.
    """

    def __init__(self, data: StreamImages | EncodedStream, start: int) -> None:
        self.data, self.start = data, start

    def __iter__(self) -> Iterator[Any]:
        return (self.data[k] for k in range(self.start, len(self.data)))


def _fit(
    module: "AutoencoderTraining | DiffusionTraining",
    data: StreamImages | EncodedStream,
    folder: Path,
    *,
    batch: int,
    precision: str,
    logger: Logger | None,
    callbacks: Sequence[L.Callback] = (),
) -> None:
    """Fit, going on from ``folder``'s last whole checkpoint where there is one.

    Raises:
        Interrupted: The run was told to leave; the next one goes on from here.
    """
    last, done = last_checkpoint(folder, folder.name), 0
    if last is not None:
        if is_done(module, last, module.steps):
            return
        done = checkpoint_step(last)
    with progress_bar(f"train {folder.name}", module.steps) as advance:
        trainer = Trainer(
            max_steps=module.steps,
            accelerator="auto",
            devices=1,
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            gradient_clip_val=1.0,
            logger=logger or False,
            log_every_n_steps=max(1, module.steps // _CURVE_POINTS),
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Saving(folder, CHECKPOINT_EVERY), _Advance(advance), *callbacks],
            plugins=[FitCheckpoints()],
            default_root_dir=folder,
        )
        loader = DataLoader(_Rest(data, done * batch), batch_size=batch)
        ckpt_path = None if last is None else str(last)
        trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True)
