"""Adapter for the Stable Diffusion family: SD 1.x and 2.x, epsilon and v prediction, any width.

Everything that depends on the architecture is read from the checkpoint's own configuration:
prediction type, latent channels, resolution, embedding width and length, linear or convolutional
attention projections.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from dori_lightning.models.original_layout import Part
from dori_lightning.models.protocol import EmbeddingFilter, LayerRole, Sampler, Sampling, Stage
from dori_lightning.runtime import distributed
from dori_lightning.runtime.batching import OomBackoff, map_batches, parallel_batches
from dori_lightning.types import CoderRows, InputError, ReplacedPart

_MEMORY = OomBackoff(
    "generate",
    "image",
    "checkpoint.precision=bf16, a smaller checkpoint.resolution, or a device with more memory",
)

SAMPLERS: dict[Sampler, Any] = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
"""Classes of the samplers, by name; a checkpoint's scheduler configures each of them."""

_SUFFIXES: dict[str, str] = {
    "cross_attention.value": ".attn2.to_v",
    "cross_attention.key": ".attn2.to_k",
    "feed_forward.out": ".ff.net.2",
}


def prompt_length(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> int:
    """Tokens that prompts are padded and cut to."""
    # a tokenizer without a length of its own claims an astronomical one
    return int(min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings))


@dataclass(frozen=True)
class Parts:
    """What a Stable Diffusion checkpoint consists of."""

    unet: UNet2DConditionModel
    autoencoder: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler

    @property
    def modules(self) -> dict[Part, nn.Module]:
        """The parts that have weights."""
        return {"unet": self.unet, "vae": self.autoencoder, "text_encoder": self.text_encoder}


class StableDiffusion:
    """A Stable Diffusion checkpoint; ``models.protocol.TextToImage`` documents its methods."""

    def __init__(
        self,
        parts: Parts,
        *,
        name: str,
        fingerprint: str,
        resolution: int | None = None,
        autocast: torch.dtype | None = None,
        replaced: Sequence[ReplacedPart] = (),
    ) -> None:
        """Join the parts.

        Args:
            parts: What fits each other; see ``models.soundness``.
            name: How reports call the checkpoint.
            fingerprint: Hash of everything that decides results; see ``models.fingerprint``.
            resolution: Image side in pixels; None for the UNet's own ``sample_size``.
            autocast: Compute the denoiser and autoencoder in this dtype; None for the weights'
                own.
            replaced: Parts whose weights are from other files than the checkpoint's.

        Raises:
            InputError: The autoencoder has no latents of that resolution.
        """
        self.name, self.fingerprint, self.autocast = name, fingerprint, autocast
        self.replaced = tuple(replaced)
        for module in parts.modules.values():
            module.eval()
        self.unet, self.autoencoder = parts.unet, parts.autoencoder
        self.text_encoder, self.tokenizer = parts.text_encoder, parts.tokenizer
        self.scheduler = parts.scheduler
        unet, scheduler = parts.unet, parts.scheduler
        self.device = next(unet.parameters()).device
        width = int(parts.text_encoder.config.hidden_size)
        self.embedding_shape = (prompt_length(parts.tokenizer, parts.text_encoder), width)
        factor = 2 ** (len(parts.autoencoder.config["block_out_channels"]) - 1)
        self.resolution = resolution or int(unet.config["sample_size"]) * factor
        if self.resolution < 1 or self.resolution % factor:
            raise InputError(
                f"the side of an image must be a multiple of {factor} pixels, got "
                f"{self.resolution}",
                where="checkpoint.resolution, or sample_size in unet/config.json",
            )
        side = self.resolution // factor
        self.latent_shape = (int(unet.config["in_channels"]), side, side)
        self.num_train_timesteps = int(scheduler.config["num_train_timesteps"])
        self.prediction_type = str(scheduler.config["prediction_type"])
        self.alphas_cumprod = scheduler.alphas_cumprod.to(self.device, torch.float32)
        self.unet_evaluations, self.coder_rows = 0, CoderRows()
        self.max_batch_sizes: dict[str, int] = {}
        self.embedding_filter: EmbeddingFilter | None = None
        self._counting = threading.Lock()
        self._of_thread = threading.local()
        self._empty: torch.Tensor | None = None

    @property
    def parts(self) -> Parts:
        """Its parts, with whatever edit it carries now."""
        return Parts(
            self.unet, self.autoencoder, self.text_encoder, self.tokenizer, self.scheduler
        )

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast where the model has it."""
        # without a dtype of its own it leaves a Trainer's mixed precision in force
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def token_count(self, prompt: str) -> int:
        """Tokens of a prompt with its start and end token, before truncation."""
        return len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that does not fit, as the tokenizer spells it."""
        ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
        # the end token takes the last place
        lost = ids[self.embedding_shape[0] - 1 : -1]
        return str(self.tokenizer.decode(lost)) if len(ids) > self.embedding_shape[0] else ""

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts to embeddings (N, T, D), fp32: last hidden state after the final layer norm."""
        rows = []
        with self._counting:
            self.coder_rows.prompts += len(prompts)
        # one by one, so that a prompt's embedding never depends on its neighbours
        for prompt in prompts:
            ids = self.tokenizer(
                prompt,
                padding="max_length",
                truncation=True,
                max_length=self.embedding_shape[0],
                return_tensors="pt",
            ).input_ids
            rows.append(self.text_encoder(ids.to(self.device)).last_hidden_state.float())
        return torch.cat(rows)

    def empty_embedding(self) -> torch.Tensor:
        """Embedding (1, T, D) of the empty prompt, the unconditional branch of guidance."""
        if self._empty is None:
            self._empty = self.encode_prompts([""])
        return self._empty

    @property
    def _latent_scale(self) -> float:
        """What latents are multiplied by to have about unit standard deviation."""
        return float(self.autoencoder.config["scaling_factor"])

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] to scaled latents (N, C, h, w): posterior mode, fp32."""
        dtype = next(self.autoencoder.parameters()).dtype
        images = images.to(self.device, dtype) * 2 - 1
        with self._counting:
            self.coder_rows.encoded += len(images)
        rows = [
            self.autoencoder.encode(image[None]).latent_dist.mode().float() for image in images
        ]
        return torch.cat(rows) * self._latent_scale

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (N, C, h, w) to images (N, 3, H, W) in [0, 1], fp32."""
        dtype = next(self.autoencoder.parameters()).dtype
        latents = (latents / self._latent_scale).to(dtype)
        with self._counting:
            self.coder_rows.decoded += len(latents)
        with self.precision():
            images: torch.Tensor = self.autoencoder.decode(latents).sample
        return (images.float() / 2 + 0.5).clamp_(0, 1)

    @property
    def row_pairs(self) -> tuple[str, ...] | None:
        """Whose rows this thread's current or last pass holds."""
        return getattr(self._of_thread, "row_pairs", None)

    @row_pairs.setter
    def row_pairs(self, ids: tuple[str, ...] | None) -> None:
        self._of_thread.row_pairs = ids

    def _denoise(
        self,
        noised: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        pair_ids: Sequence[str] | None,
    ) -> torch.Tensor:
        if pair_ids is not None and len(pair_ids) != len(noised):
            raise ValueError(f"{len(noised)} rows, but {len(pair_ids)} pair ids")
        # stays until the next pass: gradient checkpointing runs the layers again in the backward
        self.row_pairs = None if pair_ids is None else tuple(pair_ids)
        with self._counting:
            self.unet_evaluations += len(noised)
        dtype = next(self.unet.parameters()).dtype
        with self.precision():
            output: torch.Tensor = self.unet(
                noised.to(dtype),
                timesteps,
                encoder_hidden_states=embeddings.to(dtype),
                return_dict=False,
            )[0]
        return output.float()

    def noised(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Forward process."""
        alpha = self.alphas_cumprod[timesteps][:, None, None, None]
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def denoising_loss(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Mean squared error of the noise, or of v where the model predicts v."""
        output = self._denoise(
            self.noised(latents, noise, timesteps), timesteps, embeddings, pair_ids
        )
        target = noise
        if self.prediction_type == "v_prediction":
            alpha = self.alphas_cumprod[timesteps][:, None, None, None]
            target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)

    def predict_noise(
        self,
        noised: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
        *,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Noise in noised latents, whatever the model predicts."""
        output = self._denoise(noised, timesteps, embeddings, pair_ids)
        if self.prediction_type == "v_prediction":
            alpha = self.alphas_cumprod[timesteps][:, None, None, None]
            output = alpha.sqrt() * output + (1 - alpha).sqrt() * noised
        return output

    def sampling_timesteps(self, sampling: Sampling) -> torch.Tensor:
        """Timesteps (S,) that a sampler visits."""
        timesteps: torch.Tensor = self._sampler(sampling).timesteps
        return timesteps.to(self.device)

    def _sampler(self, sampling: Sampling) -> Any:
        if sampling.steps > self.num_train_timesteps:
            raise InputError(
                f"sampling.steps={sampling.steps} is more than the {self.num_train_timesteps} "
                f"timesteps that {self.name} was trained with"
            )
        scheduler = SAMPLERS[sampling.sampler].from_config(self.scheduler.config)
        # on the host: schedulers look tables up by it, and would wait for a GPU at each step
        scheduler.set_timesteps(sampling.steps, device="cpu")
        return scheduler

    @torch.no_grad()
    def generate(
        self,
        embeddings: torch.Tensor,
        noise: torch.Tensor,
        sampling: Sampling,
        *,
        pair_ids: Sequence[str] | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> torch.Tensor:
        """Embeddings to images, in batches of ``sampling.batch``."""

        # autograd's mode belongs to a thread
        @torch.no_grad()
        def draw(rows: list[int]) -> torch.Tensor:
            own, starts = embeddings[rows].to(self.device), noise[rows]
            if self.embedding_filter is not None:
                own = self.embedding_filter(own, starts.to(self.device), sampling)
            ids = None if pair_ids is None else [pair_ids[row] for row in rows]
            return self.decode_latents(self.denoise(own, starts, sampling, ids))

        images = map_batches(
            draw,
            range(len(embeddings)),
            at_once=sampling.batch * parallel_batches(self),
            model=self,
            backoff=_MEMORY,
            pad=False,
            advance=advance,
        )
        return torch.stack(images)

    @torch.no_grad()
    def denoise(
        self,
        embeddings: torch.Tensor,
        noise: torch.Tensor,
        sampling: Sampling,
        pair_ids: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Run the sampler."""
        scheduler = self._sampler(sampling)
        guided = sampling.guidance != 1.0
        context = embeddings.to(self.device)
        if guided:
            context = torch.cat([self.empty_embedding().expand_as(context), context])
        if pair_ids is not None:
            pair_ids = [*pair_ids, *pair_ids] if guided else list(pair_ids)
        x: torch.Tensor = noise.to(self.device) * scheduler.init_noise_sigma
        places = scheduler.timesteps.to(self.device)
        for place, t in zip(places, scheduler.timesteps, strict=True):
            distributed.check()
            inputs = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            output = self._denoise(inputs, place.expand(len(inputs)), context, pair_ids)
            if guided:
                unconditional, conditional = output.chunk(2)
                output = unconditional + sampling.guidance * (conditional - unconditional)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return x

    def layers(
        self, role: LayerRole, stages: Sequence[Stage] = ("down", "mid", "up")
    ) -> dict[str, nn.Module]:
        """Layers of the UNet by role."""
        return {
            name: module
            for stage in ("down", "mid", "up")  # in execution order
            if stage in stages
            for name, module in self.unet.named_modules()
            if name.endswith(_SUFFIXES[role]) and name.split("_")[0] == stage
        }

    def denoiser(self) -> nn.Module:
        """Return the UNet."""
        return self.unet

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the UNet."""
        return self.unet.parameters()

    def frozen_copy(self) -> StableDiffusion:
        """The same model with a copy of the UNet."""
        twin = copy.copy(self)
        twin.unet = copy.deepcopy(self.unet).eval().requires_grad_(False)
        twin.unet_evaluations, twin._of_thread = 0, threading.local()
        return twin

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode and no weight gradients while open."""
        training = self.unet.training
        flags = [(p, p.requires_grad) for p in self.unet.parameters()]
        self.unet.eval().requires_grad_(False)
        try:
            yield
        finally:
            self.unet.train(training)
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)
