"""Stable Diffusion 1.4's UNet with random weights: its cost without its download."""

import torch
from transformers import CLIPTokenizer

from dori_lightning.models.stable_diffusion import Parts, StableDiffusion
from dori_lightning.planting.recipe import (
    PlantRecipe,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_unet,
)


def random_sd14(
    tokenizer: CLIPTokenizer,
    *,
    latent: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    device: torch.device,
    seed: int,
) -> StableDiffusion:
    """Model with the UNet of Stable Diffusion 1.4, untrained, to time attacks on.

    Autoencoder and text encoder have the right shapes of latents and embeddings, and hardly any
    layers: an attack uses neither.

    Args:
        tokenizer: Any tokenizer of 77 tokens; the text encoder gets its vocabulary.
        latent: Side of a latent; 64 is the checkpoint's own.
        dtype: Of the weights.
        autocast: Compute the denoiser in this dtype; None for the weights' own.
        device: Where; on a GPU the UNet's weights are in channels-last format.
        seed: Of the weights.
    """
    recipe = PlantRecipe(
        resolution=8 * latent,
        autoencoder_channels=(32,) * 4,
        latent_channels=4,
        unet_channels=(320, 640, 1280, 1280),
        heads=8,
        text_width=768,
        text_layers=1,
        text_heads=12,
    )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        unet = build_unet(recipe, groups=32)
        autoencoder = build_autoencoder(recipe)
        text_encoder = build_text_encoder(
            tokenizer, width=recipe.text_width, layers=recipe.text_layers, heads=recipe.text_heads
        )
    whole = Parts(unet, autoencoder, text_encoder, tokenizer, build_scheduler(recipe))
    for module in whole.modules.values():
        module.to(dtype).requires_grad_(module is unet)
        if device.type == "cuda" and module is unet:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return StableDiffusion(
        whole,
        name="sd14_shape",
        fingerprint=f"random{seed}",
        autocast=autocast,
    )
