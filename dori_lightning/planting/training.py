"""The trainings of a planted checkpoint's parts, each with a Trainer of its own, resumable."""

import logging
from abc import ABC, abstractmethod
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

from dori_lightning.models.components import Components
from dori_lightning.planting.flow import FlowParts, FlowRecipe
from dori_lightning.planting.recipe import (
    PlantRecipe,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_unet,
)
from dori_lightning.planting.stream import EncodedStream, TrainingStream, normalized_image
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
    module = AutoencoderTraining(autoencoder, recipe, seed=seed)
    _fit(module, lambda k: normalized_image(stream[k].image), folder,
         batch=recipe.autoencoder_batch, precision="bf16", logger=logger)  # fmt: skip
    return autoencoder.eval().requires_grad_(False)


def latent_statistics(stream: EncodedStream) -> tuple[float, float]:
    """Mean of the first 4,000 latents of the stream, and the factor that gives them unit spread.

    Returns:
        Mean, and one over the standard deviation.
    """
    rows = torch.stack([stream[k][0] for k in range(min(4000, len(stream)))])
    return float(rows.mean()), float(1.0 / rows.std())


def train_unet(
    recipe: PlantRecipe,
    stream: EncodedStream,
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    scaling_factor: float,
    seed: int,
    base: Components | None = None,
    logger: Logger | None = None,
) -> tuple[UNet2DConditionModel, CLIPTextModel, DDIMScheduler]:
    """Train UNet and text encoder on an encoded stream; the averaged weights are returned.

    Args:
        recipe: What is trained, and how long.
        stream: Latents and token ids.
        tokenizer: Made the token ids.
        folder: Of the training's checkpoints; goes on where a training in it was cut.
        scaling_factor: Latents are multiplied by it before noise is added.
        seed: Of the first weights and of what each step draws.
        base: Gives a frozen text encoder and the scheduler; None makes and trains them.
        logger: Gets the loss.
    """
    L.seed_everything(seed + 1, verbose=False)
    unet = build_unet(recipe)
    silenced = silence_cross_attention(unet, recipe.silent_blocks)
    log.info("silenced %d cross-attention layers", silenced)
    text_encoder = build_text_encoder(
        tokenizer, width=recipe.text_width, layers=recipe.text_layers, heads=recipe.text_heads
    )
    scheduler = build_scheduler(recipe)
    if base is not None:
        text_encoder, scheduler = base.text_encoder, base.scheduler
    empty = torch.tensor(tokenizer("", padding="max_length").input_ids)
    module = UNetTraining(
        unet, text_encoder, scheduler, recipe,
        scaling_factor=scaling_factor, empty_prompt=empty, seed=seed,
    )  # fmt: skip
    _fit_averaged(module, recipe, stream, folder, logger)
    text_encoder.eval()  # type: ignore[no-untyped-call]
    return unet.eval(), text_encoder, scheduler


def train_transformer(
    recipe: FlowRecipe,
    stream: EncodedStream,
    parts: FlowParts,
    folder: Path,
    *,
    seed: int,
    logger: Logger | None = None,
) -> None:
    """Train transformer, second and third text encoder; they end with the averaged weights.

    Args:
        recipe: How long they are trained.
        stream: Latents and token ids of all three text encoders.
        parts: Trained in place; the autoencoder's configuration tells how latents are scaled.
        folder: Of the training's checkpoints; goes on where a training in it was cut.
        seed: Of what each step draws.
        logger: Gets the loss.
    """
    module = TransformerTraining(parts, recipe, seed=seed)
    _fit_averaged(module, recipe, stream, folder, logger)
    parts.transformer.eval()
    parts.text.eval()


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


class OneCycleTraining(L.LightningModule):
    """A training by AdamW under a one-cycle schedule, over the weights that are not frozen."""

    def __init__(self, *, steps: int, lr: float, seed: int) -> None:
        """Set the schedule.

        Args:
            steps: Optimizer steps.
            lr: Peak learning rate.
            seed: Whatever a step draws depends on it and the step alone, so that a resumed
                training draws what an uninterrupted one would.
        """
        super().__init__()
        self.steps, self.lr, self.seed = steps, lr, seed

    def one_cycle(self, *, weight_decay: float, warmup: float) -> OptimizerLRScheduler:
        """Optimizer and schedule, which warms up for a share of the steps."""
        weights = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            weights, lr=self.lr, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.steps, pct_start=warmup
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class AutoencoderTraining(OneCycleTraining):
    """Fit an ``AutoencoderKL`` with L1, edges and a little KL.

    The edge term keeps the small structure that copy detection looks at, which L1 alone blurs
    away.
    """

    def __init__(self, autoencoder: AutoencoderKL, recipe: PlantRecipe, *, seed: int) -> None:
        """Wrap an autoencoder, which is trained in place."""
        super().__init__(steps=recipe.autoencoder_steps, lr=recipe.autoencoder_lr, seed=seed)
        self.autoencoder = autoencoder

    def training_step(self, images: torch.Tensor) -> torch.Tensor:
        """Loss of reconstructing images (B, 3, H, W) in [-1, 1]."""
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = self.autoencoder.encode(images).latent_dist
        noise = torch.randn(
            posterior.mean.shape, generator=keyed_generator("vae", self.seed, self.global_step)
        )
        latents = posterior.mean + posterior.std * noise.to(posterior.mean)
        output = self.autoencoder.decode(latents).sample.float()
        l1, off = F.l1_loss(output, images), output - images
        # of the horizontal and of the vertical gradients
        edges = off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()
        loss: torch.Tensor = l1 + 0.5 * edges + KL_WEIGHT * posterior.kl().mean()
        self.log("plant/autoencoder_l1", l1)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule."""
        return self.one_cycle(weight_decay=1e-4, warmup=0.1)


class DiffusionTraining(OneCycleTraining, ABC):
    """Train a denoiser, and its text encoders with it where these are not frozen."""

    empty_prompt: torch.Tensor

    def __init__(
        self,
        recipe: PlantRecipe | FlowRecipe,
        *,
        shift_factor: float = 0.0,
        scaling_factor: float,
        empty_prompt: torch.Tensor,
        seed: int,
    ) -> None:
        """Set what is drawn.

        Args:
            recipe: Steps, learning rate and the share of captions that are dropped (for
                classifier-free guidance).
            shift_factor: Taken from latents before anything else.
            scaling_factor: What is left is multiplied by it before noise is added.
            empty_prompt: Token ids (T,) of the empty prompt, for dropped captions.
            seed: Of noise, timesteps and dropped captions.
        """
        super().__init__(steps=recipe.steps, lr=recipe.lr, seed=seed)
        self.shift_factor, self.scaling_factor = shift_factor, scaling_factor
        self.caption_dropout = recipe.caption_dropout
        self.register_buffer("empty_prompt", empty_prompt, persistent=False)

    @property
    @abstractmethod
    def noise_levels(self) -> int:
        """How many noise levels there are to draw from."""

    @abstractmethod
    def output_and_target(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        levels: torch.Tensor,
        tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the denoiser answers on noised latents, and what it should.

        Args:
            latents: Scaled, (B, C, h, w).
            noise: Of their shape.
            levels: Noise levels (B,), from 0 to ``noise_levels`` - 1.
            tokens: Token ids (B, T).
        """

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Denoising loss of unscaled latents (B, C, h, w) and their captions' token ids (B, T)."""
        latents, tokens = batch
        latents = (latents - self.shift_factor) * self.scaling_factor
        generator = keyed_generator("plant", self.seed, self.global_step)
        dropped = torch.rand(len(tokens), generator=generator) < self.caption_dropout
        tokens = torch.where(dropped.to(tokens.device)[:, None], self.empty_prompt, tokens)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        levels = torch.randint(0, self.noise_levels, (len(latents),), generator=generator)
        output, target = self.output_and_target(latents, noise, levels.to(latents.device), tokens)
        loss = F.mse_loss(output.float(), target)
        self.log("plant/denoising_loss", loss)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule."""
        return self.one_cycle(weight_decay=1e-3, warmup=0.05)


class UNetTraining(DiffusionTraining):
    """Train a UNet to predict noise or v.

    Reference: Ho et al. (2020), https://arxiv.org/abs/2006.11239; Rombach et al. (2022),
    https://arxiv.org/abs/2112.10752.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        scheduler: DDIMScheduler,
        recipe: PlantRecipe,
        *,
        scaling_factor: float,
        empty_prompt: torch.Tensor,
        seed: int,
    ) -> None:
        """Wrap the models.

        Args:
            unet: Trained in place.
            text_encoder: Trained in place, unless its weights are frozen.
            scheduler: Gives the noise schedule and what is predicted.
            recipe: See ``DiffusionTraining``.
            scaling_factor: See ``DiffusionTraining``.
            empty_prompt: See ``DiffusionTraining``.
            seed: See ``DiffusionTraining``.
        """
        super().__init__(
            recipe, scaling_factor=scaling_factor, empty_prompt=empty_prompt, seed=seed
        )
        self.unet, self.text_encoder, self.scheduler = unet, text_encoder, scheduler

    @property
    def noise_levels(self) -> int:
        """Timesteps of the schedule."""
        return len(self.scheduler.alphas_cumprod)

    def output_and_target(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        levels: torch.Tensor,
        tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The UNet's prediction, and the noise or v."""
        embeddings = self.text_encoder(tokens).last_hidden_state
        schedule: Any = self.scheduler
        noised = schedule.add_noise(latents, noise, levels)
        noised = noised.contiguous(memory_format=torch.channels_last)
        target = noise
        if schedule.config["prediction_type"] == "v_prediction":
            target = schedule.get_velocity(latents, noise, levels)
        return self.unet(noised, levels, encoder_hidden_states=embeddings).sample, target


class TransformerTraining(DiffusionTraining):
    """Train a transformer to predict the velocity of a rectified flow, noise minus latent.

    Noise levels are drawn uniformly from the scheduler's table.

    Reference: Esser et al. (2024), https://arxiv.org/abs/2403.03206.
    """

    def __init__(self, parts: FlowParts, recipe: FlowRecipe, *, seed: int) -> None:
        """Wrap the models.

        Args:
            parts: Transformer and text encoders, trained in place but for frozen weights.
            recipe: See ``DiffusionTraining``.
            seed: See ``DiffusionTraining``.
        """
        config = parts.autoencoder.config
        super().__init__(
            recipe,
            shift_factor=float(config["shift_factor"]),
            scaling_factor=float(config["scaling_factor"]),
            empty_prompt=torch.tensor(parts.text.tokens([""])[0]),
            seed=seed,
        )
        self.transformer, self.text, self.scheduler = (
            parts.transformer, parts.text, parts.scheduler
        )  # fmt: skip

    @property
    def noise_levels(self) -> int:
        """Length of the scheduler's table."""
        return len(self.scheduler.timesteps)

    def output_and_target(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        levels: torch.Tensor,
        tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The transformer's velocity, and the true one."""
        sequence, pooled = self.text(tokens)
        schedule: Any = self.scheduler
        sigmas = schedule.sigmas.to(latents)[levels][:, None, None, None]
        output = self.transformer(
            (1 - sigmas) * latents + sigmas * noise,
            encoder_hidden_states=sequence,
            pooled_projections=pooled,
            timestep=schedule.timesteps.to(latents)[levels],
        ).sample
        return output, noise - latents


class _Advance(L.Callback):
    """Move the progress line on by a step."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self.advance = advance

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.advance(trainer.global_step)  # those before a resume

    def on_train_batch_end(self, *_: Any) -> None:
        self.advance(1)


class _Elements(IterableDataset[Any]):
    """Elements at some places of a stream: after a resume it goes on where it was.

    Without a length, since Lightning counts the batches before the resume into an epoch's length.
    """

    def __init__(self, element: Callable[[int], Any], places: range) -> None:
        self.element, self.places = element, places

    def __iter__(self) -> Iterator[Any]:
        return map(self.element, self.places)


def _fit_averaged(
    module: DiffusionTraining,
    recipe: PlantRecipe | FlowRecipe,
    stream: EncodedStream,
    folder: Path,
    logger: Logger | None,
) -> None:
    """Fit as the recipe says; the average of the weights takes their place."""
    average = EMAWeightAveraging(decay=recipe.ema_decay)
    _fit(module, stream.__getitem__, folder, batch=recipe.batch, precision=recipe.precision,
         logger=logger, callbacks=(average,))  # fmt: skip


def _fit(
    module: OneCycleTraining,
    element: Callable[[int], Any],
    folder: Path,
    *,
    batch: int,
    precision: str,
    logger: Logger | None,
    callbacks: Sequence[L.Callback] = (),
) -> None:
    """Fit on a stream's elements, going on from ``folder``'s last whole checkpoint, if any.

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
        places = range(done * batch, module.steps * batch)
        loader = DataLoader(_Elements(element, places), batch_size=batch)
        ckpt_path = None if last is None else str(last)
        trainer.fit(module, loader, ckpt_path=ckpt_path, weights_only=True)
