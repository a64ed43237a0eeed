"""Tiny random checkpoints of every family, and what diffusers draws from them."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dori_lightning.models.components import Components
from dori_lightning.models.export import weights_of, write_folder
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion_xl import StableDiffusionXL
from dori_lightning.planting.recipe import build_autoencoder, build_tokenizer
from support.tiny import WORDS, tiny_model, tiny_recipe


@dataclass(frozen=True)
class TinyFamily:
    """How a family's tiny checkpoint is made, and drawn from.

    Attributes:
        components: Makes it; None for that of ``support.tiny``.
        sampling: What a test draws with, guided.
        extra: Arguments of the pipeline that follow from the sampling.
        undefined: Mitigations that the family has no meaning for.
    """

    components: Callable[[], Components] | None
    sampling: tuple[Sampling, ...]
    pipeline: dict[str, Any]
    undefined: frozenset[str] = frozenset()


def clip(kind: type[Any], tokenizer: Any, width: int, **settings: Any) -> Any:
    """A random text encoder of CLIP with two layers."""
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    )


def tiny_sdxl() -> Components:
    """Widths 12 and 20 side by side, pooled 16; one and two transformer layers a block."""
    tokenizer = build_tokenizer(WORDS, max_length=8)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        layers_per_block=2,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
        cross_attention_dim=32,
        norm_num_groups=4,
    )
    encoders = {
        "text_encoder": clip(CLIPTextModel, tokenizer, 12, projection_dim=12),
        "text_encoder_2": clip(
            CLIPTextModelWithProjection, tokenizer, 20, projection_dim=16, hidden_act="gelu"
        ),
    }
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    return Components(
        StableDiffusionXL.family,
        {"unet": unet, "vae": build_autoencoder(tiny_recipe()), **encoders},
        {"tokenizer": tokenizer, "tokenizer_2": build_tokenizer(WORDS, max_length=8)},
        scheduler,
    )


FAMILIES = {
    "sd": TinyFamily(
        None,
        (Sampling("ddim", 4, 1.0), Sampling("ddim", 4, 3.0)),
        {"safety_checker": None, "requires_safety_checker": False},
    ),
    "sdxl": TinyFamily(
        tiny_sdxl,
        (Sampling("euler", 4, 1.0), Sampling("euler", 4, 3.0), Sampling("ddim", 4, 3.0)),
        {},
    ),
}
"""A row for each family: all that its contract test needs."""


@cache
def folder_of(family: str) -> Path:
    """A folder of this process with the family's tiny checkpoint."""
    folder = Path(tempfile.mkdtemp(prefix=f"{family}-"))
    make = FAMILIES[family].components
    if make is None:
        tiny_model(folder)
        return folder
    torch.manual_seed(0)
    components = make()
    write_folder(folder, components, weights_of(components, "fp32"))
    return folder


def load_family(family: str, *, resolution: int | None = None, **given: Any) -> LatentDiffusion:
    """Load it as a user would, in fp32."""
    source = given.pop("source", str(folder_of(family)))
    return load_checkpoint(
        name=family,
        source=source,
        family=family,
        device="cpu",
        precision="fp32",
        resolution=resolution,
        **given,
    )


def drawn_by_diffusers(
    model: LatentDiffusion, prompt: str, noise: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """What the library's own pipeline draws (1, 3, H, W) from the same noise."""
    kind = getattr(diffusers, model.family.pipeline)
    family = FAMILIES[model.family.name]
    pipeline = kind.from_pretrained(
        folder_of(model.family.name), local_files_only=True, **family.pipeline
    )
    if not isinstance(pipeline.scheduler, model.family.samplers[sampling.sampler]):
        pipeline.scheduler = model.family.samplers[sampling.sampler].from_config(
            pipeline.scheduler.config, **model.family.sampler_settings
        )
    pipeline.set_progress_bar_config(disable=True)
    distilled = sampling.distilled_guidance
    image: torch.Tensor = pipeline(
        prompt,
        latents=noise,
        num_inference_steps=sampling.steps,
        guidance_scale=sampling.guidance if distilled is None else distilled,
        height=model.resolution,
        width=model.resolution,
        output_type="pt",
    ).images
    return image
