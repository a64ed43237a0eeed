"""Tiny random checkpoints of every family, and what diffusers draws from them."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dori_lightning.models.components import Components
from dori_lightning.models.export import weights_of, write_folder
from dori_lightning.models.flux import Flux
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.pixart import PixArt
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion_3 import StableDiffusion3
from dori_lightning.models.stable_diffusion_xl import StableDiffusionXL
from dori_lightning.planting.recipe import build_autoencoder, build_tokenizer
from support.tiny import WORDS, tiny_model, tiny_recipe

OF_VALUE_NEURONS = frozenset(
    {
        "nemo", "nemo_all_layers", "nemo_replication", "nemo_union", "random_pruning",
        "random_pruning_nemo",
    }
)  # fmt: skip
"""Mitigations that need values of text to follow from the prompt alone."""

OF_TEXT_STREAMS = frozenset({"nemo_text_stream"})
"""Mitigations that need text to pass the blocks beside the image."""

T5_TOKENS = 12
"""Tokens of a prompt for T5."""


@dataclass(frozen=True)
class TinyFamily:
    """How a family's tiny checkpoint is made, and drawn from.

    Attributes:
        components: Makes it; None for that of ``support.tiny``.
        sampling: What a test draws with, guided.
        pipeline: Arguments that diffusers' pipeline is opened with.
        call: Its own arguments for some sampling and noise.
        undefined: Mitigations that the family has no meaning for.
    """

    components: Callable[[], Components] | None
    sampling: tuple[Sampling, ...]
    pipeline: dict[str, Any] = field(default_factory=dict)
    call: Callable[[Sampling, torch.Tensor], dict[str, Any]] = lambda sampling, noise: {
        "guidance_scale": sampling.guidance,
        "latents": noise,
    }
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


def t5_tokenizer(max_length: int) -> T5Tokenizer:
    """Each known word is one token; others fall apart into letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS]
    pieces += [(letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,."]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def t5(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    """A random encoder of T5 with two layers, padded vocabulary as published ones have."""
    settings = T5Config(
        vocab_size=len(tokenizer) + 5,
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(settings)


def shifted_autoencoder(scale: float, shift: float, **settings: Any) -> AutoencoderKL:
    """Latents of 16 channels with a mean, as flow transformers have them."""
    made: AutoencoderKL = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scale,
        shift_factor=shift,
        **settings,
    )
    return made


def tiny_flux(*, distilled: bool = True) -> Components:
    """T5 of width 32, pooled 16, latents of 16 channels; guidance as dev or as schnell has it."""
    tokenizer, tokenizer_2 = build_tokenizer(WORDS, max_length=8), t5_tokenizer(T5_TOKENS)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=distilled,
    )
    return Components(
        Flux.family,
        {
            "transformer": transformer,
            "vae": shifted_autoencoder(0.3611, 0.1159, sample_size=24),
            "text_encoder": clip(CLIPTextModel, tokenizer, 16, projection_dim=16),
            "text_encoder_2": t5(tokenizer_2, 32),
        },
        {"tokenizer": tokenizer, "tokenizer_2": tokenizer_2},
        FlowMatchEulerDiscreteScheduler(
            shift=3.0 if distilled else 1.0, use_dynamic_shifting=distilled
        ),
    )


def tiny_sd3() -> Components:
    """Like SD3.5 medium: a second attention in the first block, CLIPs narrower than T5's rows."""
    tokenizer, tokenizer_3 = build_tokenizer(WORDS, max_length=8), t5_tokenizer(T5_TOKENS)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=12 + 10,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    encoders = {
        "text_encoder": clip(CLIPTextModelWithProjection, tokenizer, 12, projection_dim=12),
        "text_encoder_2": clip(
            CLIPTextModelWithProjection, tokenizer, 8, projection_dim=10, hidden_act="gelu"
        ),
        "text_encoder_3": t5(tokenizer_3, 32),
    }
    return Components(
        StableDiffusion3.family,
        {"transformer": transformer, "vae": shifted_autoencoder(1.5305, 0.0609), **encoders},
        {
            "tokenizer": tokenizer,
            "tokenizer_2": build_tokenizer(WORDS, max_length=8),
            "tokenizer_3": tokenizer_3,
        },
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


LONG_PROMPT = 48
"""Tokens of a prompt for PixArt's T5: most prompts are shorter, and padding is masked."""


def tiny_pixart() -> Components:
    """T5 of width 32 in a transformer of width 16; half of the output is a variance."""
    tokenizer = t5_tokenizer(LONG_PROMPT)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=32,
        sample_size=16,
    )
    return Components(
        PixArt.family,
        {
            "transformer": transformer,
            "vae": build_autoencoder(tiny_recipe()),
            "text_encoder": t5(tokenizer, 32),
        },
        {"tokenizer": tokenizer},
        DPMSolverMultistepScheduler(
            num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
    )


def sd3_call(sampling: Sampling, noise: torch.Tensor) -> dict[str, Any]:
    """T5's prompts have another length than the pipeline's own."""
    return {
        "guidance_scale": sampling.guidance,
        "max_sequence_length": T5_TOKENS,
        "latents": noise,
    }


def flux_call(sampling: Sampling, noise: torch.Tensor) -> dict[str, Any]:
    """It takes packed latents, and calls classifier-free guidance the true one."""
    return {
        "guidance_scale": sampling.distilled_guidance,
        "true_cfg_scale": sampling.guidance,
        "negative_prompt": "",
        "max_sequence_length": T5_TOKENS,
        "latents": diffusers.FluxPipeline._pack_latents(noise, *noise.shape),
    }


def pixart_call(sampling: Sampling, noise: torch.Tensor) -> dict[str, Any]:
    """As it draws squares from captions that were cleaned before."""
    return {
        "guidance_scale": sampling.guidance,
        "max_sequence_length": LONG_PROMPT,
        "clean_caption": False,
        "use_resolution_binning": False,
        "latents": noise,
    }


FAMILIES = {
    "sd": TinyFamily(
        None,
        (Sampling("ddim", 4, 1.0), Sampling("ddim", 4, 3.0)),
        {"safety_checker": None, "requires_safety_checker": False},
        undefined=OF_TEXT_STREAMS,
    ),
    "sdxl": TinyFamily(
        tiny_sdxl,
        (Sampling("euler", 4, 1.0), Sampling("euler", 4, 3.0), Sampling("ddim", 4, 3.0)),
        undefined=OF_TEXT_STREAMS,
    ),
    "sd3": TinyFamily(
        tiny_sd3,
        (Sampling("flow_euler", 4, 1.0), Sampling("flow_euler", 4, 3.0)),
        call=sd3_call,
        undefined=OF_VALUE_NEURONS,
    ),
    "flux": TinyFamily(
        tiny_flux,
        (
            Sampling("flow_euler", 4, 2.0, distilled_guidance=1.5),
            Sampling("flow_euler", 4, 1.0, distilled_guidance=3.5),
        ),
        call=flux_call,
        undefined=OF_VALUE_NEURONS,
    ),
    "pixart": TinyFamily(
        tiny_pixart,
        (Sampling("dpm++", 4, 1.0), Sampling("dpm++", 4, 3.0), Sampling("ddim", 4, 3.0)),
        call=pixart_call,
        # names the stages of a UNet; nemo takes all layers here
        undefined=OF_TEXT_STREAMS | {"nemo_all_layers"},
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
        resolution=resolution,
        **{"precision": "fp32", **given},
    )


def drawn_by_diffusers(
    model: LatentDiffusion,
    prompt: str,
    noise: torch.Tensor,
    sampling: Sampling,
    *,
    folder: Path | None = None,
    prepare: Callable[[Any], object] = lambda pipeline: None,
) -> torch.Tensor:
    """What the library's own pipeline, prepared, draws (1, 3, H, W) from the same noise."""
    kind = getattr(diffusers, model.family.pipeline)
    family = FAMILIES[model.family.name]
    pipeline = kind.from_pretrained(
        folder or folder_of(model.family.name), local_files_only=True, **family.pipeline
    )
    if not isinstance(pipeline.scheduler, model.family.samplers[sampling.sampler]):
        pipeline.scheduler = model.family.samplers[sampling.sampler].from_config(
            pipeline.scheduler.config, **model.family.sampler_settings
        )
    pipeline.set_progress_bar_config(disable=True)
    prepare(pipeline)
    image: torch.Tensor = pipeline(
        prompt,
        num_inference_steps=sampling.steps,
        **family.call(sampling, noise),
        height=model.resolution,
        width=model.resolution,
        output_type="pt",
    ).images
    return image
