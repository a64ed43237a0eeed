"""Write a planted checkpoint as a diffusers Stable Diffusion folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dori_lightning.models.writing import DTYPES, Parts, weights_of, write_folder

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

__all__ = ["write_checkpoint"]


def write_checkpoint(
    folder: Path,
    *,
    unet: UNet2DConditionModel,
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write all parts; weights as ``dtype`` safetensors."""
    parts = Parts(unet, autoencoder, text_encoder, tokenizer, scheduler)
    name = next(name for name, known in DTYPES.items() if known is dtype)
    write_folder(folder, parts, weights_of(parts, name))
