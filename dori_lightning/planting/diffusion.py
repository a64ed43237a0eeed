"""Train the denoiser and text encoder of a planted checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from torch.nn import functional as F

from dori_lightning.attacks.draws import keyed_generator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from transformers import CLIPTextModel

__all__ = ["DiffusionTraining", "silence_cross_attention"]


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
