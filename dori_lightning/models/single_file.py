"""Load a ``.safetensors`` file in the original Stable Diffusion layout.

Nothing here touches the network where the configuration is a folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from dori_lightning.types import InputError

__all__ = ["load_single_file"]

_PREFIXES = {
    "UNet": ("model.diffusion_model.",),
    "autoencoder": ("first_stage_model.",),
    "text encoder": ("cond_stage_model.", "conditioner.embedders.0."),
}


def load_single_file(path: Path, config: str | None) -> dict[str, Any]:
    """Load UNet, autoencoder and text encoder from one file, everything else from ``config``.

    Args:
        path: The file, with keys as in the original releases (``model.diffusion_model.…``).
        config: Diffusers folder or hub id with the same architecture: its ``config.json`` files,
            tokenizer and scheduler are used, none of its weights.

    Returns:
        The parts ``unet``, ``vae``, ``text_encoder``, ``tokenizer`` and ``scheduler``.

    Raises:
        InputError: A part is missing from the file, or no configuration is given or it does not
            fit.
    """
    if config is None:
        raise InputError(
            f"{path} is a single file and holds no configuration; name a diffusers folder or hub "
            f"id of the same architecture with checkpoint.config=..., "
            f"e.g. stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise InputError(
            f"{path} is no safetensors file, whatever its name, or damaged: {error}; get it again"
        ) from error
    for part, prefixes in _PREFIXES.items():
        if not any(key.startswith(prefixes) for key in keys):
            raise InputError(
                f"{path} has no {part} ({' or '.join(prefixes)}* among its {len(keys)} tensors); "
                f"the file must hold a whole Stable Diffusion checkpoint in the original layout"
            )
    local = Path(config).is_dir()
    options: dict[str, Any] = {"config": config, "local_files_only": local}
    try:
        if local:
            _refuse_kernels(Path(config) / "text_encoder" / "config.json")
        unet = UNet2DConditionModel.from_single_file(str(path), subfolder="unet", **options)
        vae = AutoencoderKL.from_single_file(str(path), subfolder="vae", **options)
        text_encoder = create_diffusers_clip_model_from_ldm(  # type: ignore[no-untyped-call]
            CLIPTextModel,
            checkpoint=load_file(path),
            subfolder="text_encoder",
            config=config,
            local_files_only=local,
        )
        tokenizer = CLIPTokenizer.from_pretrained(
            config, subfolder="tokenizer", local_files_only=local
        )
        scheduler = DDIMScheduler.from_pretrained(
            config, subfolder="scheduler", local_files_only=local
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path} does not load with the configuration of {config}: {first}"
        ) from error
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": scheduler,
    }


def _refuse_kernels(path: Path) -> None:
    """Refuse a configuration that names a kernel, which transformers would fetch and run."""
    held = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for key, value in held.items() if isinstance(held, dict) else ():
        if "attn_implementation" in key and value not in (None, "eager", "sdpa"):
            raise InputError(
                f"{path} asks for the attention {value!r}, which may be code of others; remove "
                f"{key}"
            )
