"""Stable Diffusion 1.4's UNet with random weights: its cost without its download."""

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dori_lightning.models.stable_diffusion import StableDiffusion


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
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        unet: UNet2DConditionModel = UNet2DConditionModel(
            sample_size=latent,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        )
        autoencoder: AutoencoderKL = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32,) * 4,
            layers_per_block=1,
            latent_channels=4,
            sample_size=8 * latent,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=768,
                intermediate_size=768,
                num_hidden_layers=1,
                num_attention_heads=12,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    # as plain modules: type checkers take the libraries' wrapped methods for others
    parts: tuple[torch.nn.Module, ...] = (unet, autoencoder, text_encoder)
    for module in parts:
        module.to(dtype).requires_grad_(module is unet)
    if device.type == "cuda":
        parts[0].to(memory_format=torch.channels_last)
    return StableDiffusion(
        name="sd14_shape",
        fingerprint=f"random{seed}",
        unet=unet,
        autoencoder=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        autocast=autocast,
    )
