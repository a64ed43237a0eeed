"""Write a planted checkpoint as a diffusers Stable Diffusion folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from torch import nn
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
    """Write all parts; weights as ``dtype`` safetensors.

    The text encoder's keys get the prefix ``text_model.`` of the original releases: versions 4
    and 5 of transformers both read it, while keys without it would leave version 4 with random
    weights.
    """
    parts: dict[str, nn.Module] = {"unet": unet, "vae": autoencoder, "text_encoder": text_encoder}
    for part in parts:
        (folder / part).mkdir(parents=True, exist_ok=True)
    unet.save_config(folder / "unet")
    autoencoder.save_config(folder / "vae")
    text_encoder.config.save_pretrained(folder / "text_encoder")
    for part, module in parts.items():
        state = {
            k: v.detach().to("cpu", dtype).contiguous() for k, v in module.state_dict().items()
        }
        name = "diffusion_pytorch_model.safetensors"
        if part == "text_encoder":
            name = "model.safetensors"
            state = {
                k if k.startswith("text_model.") else f"text_model.{k}": v
                for k, v in state.items()
            }
            state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
        save_file(state, folder / part / name, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
