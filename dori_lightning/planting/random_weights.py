"""Stable Diffusion 1.4's shape with random weights: its cost without its download."""

from typing import Literal

import torch

from dori_lightning.models.loading import Precision, choose_autocast, choose_device
from dori_lightning.models.stable_diffusion import StableDiffusion, stable_diffusion
from dori_lightning.planting.recipe import (
    PlantRecipe,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
)


def random_checkpoint(
    *,
    name: str,
    resolution: int = 512,
    width: int = 320,
    weights: Literal["fp32", "bf16"] = "fp32",
    precision: Precision = "auto",
    device: str = "auto",
    seed: int = 0,
) -> StableDiffusion:
    """Model with the UNet of Stable Diffusion 1.4, untrained, to time things on.

    Autoencoder and text encoder have the right shapes of latents and embeddings, and hardly any
    layers.

    Args:
        name: How reports call it.
        resolution: Image side in pixels; 512 is the checkpoint's own.
        width: Channels of the UNet's first level; 320 is the checkpoint's own.
        weights: Dtype of the weights; loaded checkpoints have fp32.
        precision: What the denoiser computes in, as for a loaded checkpoint; weights of bf16
            compute in that.
        device: As for a loaded checkpoint, or ``meta``: shapes without numbers. On a GPU the
            UNet's weights are in channels-last format.
        seed: Of the weights.
    """
    target = torch.device(device) if device == "meta" else choose_device(device)
    tokenizer = build_tokenizer(("a",), max_length=77)
    recipe = PlantRecipe(
        resolution=resolution,
        autoencoder_channels=(32,) * 4,
        latent_channels=4,
        unet_channels=(width, 2 * width, 4 * width, 4 * width),
        heads=8,
        text_width=768,
        text_layers=1,
        text_heads=12,
    )
    with torch.random.fork_rng(devices=[target] if target.type == "cuda" else []), target:
        torch.manual_seed(seed)
        unet = build_unet(recipe, groups=32)
        autoencoder = build_autoencoder(recipe)
        text_encoder = build_text_encoder(
            tokenizer, width=recipe.text_width, layers=recipe.text_layers, heads=recipe.text_heads
        )
    whole = stable_diffusion(
        unet=unet, autoencoder=autoencoder, text_encoder=text_encoder, tokenizer=tokenizer,
        scheduler=build_scheduler(recipe),
    )  # fmt: skip
    half = weights == "bf16"
    for module in whole.modules.values():
        module.to(torch.bfloat16 if half else torch.float32).requires_grad_(module is unet)
    if target.type == "cuda":
        whole.denoiser.to(memory_format=torch.channels_last)
    return StableDiffusion(
        whole,
        name=name,
        fingerprint=f"random{seed}-{width}",
        autocast=None if half else choose_autocast(precision, target),
    )
