"""Adapter for the Stable Diffusion family: SD 1.x and 2.x, epsilon and v prediction, any width.

Everything that depends on the architecture is read from the checkpoint's own configuration:
prediction type, latent channels, resolution, embedding width and length, linear or convolutional
attention projections.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

# type checkers see placeholders without methods where diffusers is imported at its top level
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextModel, CLIPTokenizer

    from dori_lightning.models.protocol import LayerRole, Sampling

__all__ = ["StableDiffusion"]

_SUFFIXES: dict[str, str] = {
    "cross_attention.value": ".attn2.to_v",
    "cross_attention.key": ".attn2.to_k",
    "feed_forward.out": ".ff.net.2",
}
_STAGES = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


class StableDiffusion:
    """A Stable Diffusion checkpoint behind the protocol of ``models.protocol.TextToImage``."""

    def __init__(
        self,
        *,
        name: str,
        fingerprint: str,
        unet: UNet2DConditionModel,
        autoencoder: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
        resolution: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        """Join the parts.

        Args:
            name: How reports call the checkpoint.
            fingerprint: Hash of the weights.
            unet: Denoiser; its attention must take the text encoder's width.
            autoencoder: Image autoencoder.
            text_encoder: CLIP text encoder.
            tokenizer: Its tokenizer.
            scheduler: Noise schedule and prediction type.
            resolution: Image side in pixels; None for the UNet's own ``sample_size``.
            autocast: Compute the denoiser and autoencoder in this dtype; None for the weights'
                own.

        Raises:
            ValueError: The parts do not fit each other.
        """
        self.name, self.fingerprint = name, fingerprint
        self.unet, self.autoencoder = unet.eval(), autoencoder.eval()
        text_encoder.eval()  # type: ignore[no-untyped-call]
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.scheduler, self.autocast = scheduler, autocast
        width, wanted = text_encoder.config.hidden_size, unet.config["cross_attention_dim"]
        if {width} != ({wanted} if isinstance(wanted, int) else set(wanted)):
            raise ValueError(
                f"text encoder gives width {width}, but the UNet's cross-attention takes {wanted}"
            )
        # a tokenizer without a length of its own claims an astronomical one
        length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
        self.embedding_shape = (int(length), int(width))
        self.factor = 2 ** (len(autoencoder.config["block_out_channels"]) - 1)
        self.resolution = resolution or int(unet.config["sample_size"]) * self.factor
        side = self.resolution // self.factor
        self.latent_shape = (int(unet.config["in_channels"]), side, side)
        self.num_train_timesteps = int(scheduler.config["num_train_timesteps"])
        self.prediction_type = str(scheduler.config["prediction_type"])
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"prediction type must be epsilon or v_prediction, got {self.prediction_type!r}"
            )
        self.device = next(unet.parameters()).device
        self.alphas_cumprod = scheduler.alphas_cumprod.to(self.device, torch.float32)
        self.unet_evaluations = 0
        self._empty: torch.Tensor | None = None

    # -- text ------------------------------------------------------------------------------------

    def token_count(self, prompt: str) -> int:
        """Tokens of a prompt with its start and end token, before truncation."""
        return len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Prompts to embeddings (N, T, D), fp32: last hidden state after the final layer norm."""
        rows = []
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

    # -- images ----------------------------------------------------------------------------------

    @property
    def _latent_scale(self) -> float:
        """What latents are multiplied by to have about unit standard deviation."""
        return float(self.autoencoder.config["scaling_factor"])

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] to scaled latents (N, C, h, w): posterior mode, fp32."""
        dtype = next(self.autoencoder.parameters()).dtype
        images = images.to(self.device, dtype) * 2 - 1
        rows = [
            self.autoencoder.encode(image[None]).latent_dist.mode().float() for image in images
        ]
        return torch.cat(rows) * self._latent_scale

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (N, C, h, w) to images (N, 3, H, W) in [0, 1], fp32."""
        dtype = next(self.autoencoder.parameters()).dtype
        latents = (latents / self._latent_scale).to(dtype)
        with self._precision():
            images: torch.Tensor = self.autoencoder.decode(latents).sample
        return (images.float() / 2 + 0.5).clamp_(0, 1)

    # -- denoiser --------------------------------------------------------------------------------

    def _precision(self) -> torch.autocast:
        dtype = self.autocast or torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.autocast is not None)

    def _denoise(
        self, noised: torch.Tensor, timesteps: torch.Tensor, embeddings: torch.Tensor
    ) -> torch.Tensor:
        self.unet_evaluations += len(noised)
        dtype = next(self.unet.parameters()).dtype
        with self._precision():
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
        """Forward process: latents (N, C, h, w) at ``timesteps`` (N,) under ``noise``."""
        alpha = self.alphas_cumprod[timesteps][:, None, None, None]
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def denoising_loss(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: torch.Tensor,
    ) -> torch.Tensor:
        """Per-example mean squared error (N,) of the noise, or of v where the model predicts v."""
        output = self._denoise(self.noised(latents, noise, timesteps), timesteps, embeddings)
        target = noise
        if self.prediction_type == "v_prediction":
            alpha = self.alphas_cumprod[timesteps][:, None, None, None]
            target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)

    @torch.no_grad()
    def generate(
        self, embeddings: torch.Tensor, noise: torch.Tensor, sampling: Sampling
    ) -> torch.Tensor:
        """Generate images (N, 3, H, W) in [0, 1].

        Args:
            embeddings: Text embeddings (N, T, D).
            noise: Starting noise (N, C, h, w).
            sampling: Sampler settings.
        """
        parts = [
            self._generate(e, n, sampling)
            for e, n in zip(
                torch.split(embeddings, sampling.batch),
                torch.split(noise, sampling.batch),
                strict=True,
            )
        ]
        return torch.cat(parts)

    def _generate(
        self, embeddings: torch.Tensor, noise: torch.Tensor, sampling: Sampling
    ) -> torch.Tensor:
        kinds: dict[str, Any] = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler}
        scheduler = kinds[sampling.sampler].from_config(self.scheduler.config)
        scheduler.set_timesteps(sampling.steps, device=self.device)
        guided = sampling.guidance != 1.0
        context = embeddings.to(self.device)
        if guided:
            context = torch.cat([self.empty_embedding().expand_as(context), context])
        x = noise.to(self.device) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            output = self._denoise(inputs, t.expand(len(inputs)), context)
            if guided:
                unconditional, conditional = output.chunk(2)
                output = unconditional + sampling.guidance * (conditional - unconditional)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        return self.decode_latents(x)

    # -- weights ---------------------------------------------------------------------------------

    def layers(self, role: LayerRole) -> dict[str, nn.Module]:
        """Layers of the UNet by role, keyed by module name, in execution order (down, mid, up)."""
        suffix = _SUFFIXES[role]
        found = [
            (name, module) for name, module in self.unet.named_modules() if name.endswith(suffix)
        ]
        # stable: keeps the order within a stage
        found.sort(key=lambda item: _STAGES[item[0].split(".")[0]])
        return dict(found)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights of the UNet."""
        return self.unet.parameters()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Evaluation mode and no weight gradients while open; both are put back afterwards."""
        training = self.unet.training
        wanted = [(p, p.requires_grad) for p in self.unet.parameters()]
        self.unet.eval().requires_grad_(False)
        try:
            yield
        finally:
            self.unet.train(training)
            for parameter, requires_grad in wanted:
                parameter.requires_grad_(requires_grad)
