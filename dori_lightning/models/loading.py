"""Load a checkpoint without letting it run anything.

Tensors come from safetensors; classes are chosen here, never by a file.

Reference: ``DiffusionPipeline.from_pretrained`` reads class names from ``model_index.json``; this
module does not.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import InputError, first_line

_PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_PREFIXES = {
    "UNet": ("model.diffusion_model.",),
    "autoencoder": ("first_stage_model.",),
    "text encoder": ("cond_stage_model.", "conditioner.embedders.0."),
}


def load_checkpoint(
    *,
    name: str,
    source: str,
    revision: str | None = None,
    config: str | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    attention: Literal["auto", "sdpa", "eager"] = "auto",
    channels_last: bool | Literal["auto"] = "auto",
    device: str = "auto",
    resolution: int | None = None,
    gradient_checkpointing: bool = False,
) -> StableDiffusion:
    """Load a Stable Diffusion checkpoint.

    Weights stay in fp32, so that an edit is exact; ``precision`` chooses the dtype that the
    denoiser computes in.

    Args:
        name: How reports call it.
        source: See ``resolve_source``.
        revision: Pinned commit of a hub id.
        config: For a single file: the diffusers folder or hub id with its configuration and
            tokenizer.
        precision: ``auto`` is bf16 on GPUs that have it and fp32 elsewhere.
        attention: ``auto`` is fused attention (``sdpa``).
        channels_last: ``auto`` is on for GPUs.
        device: ``auto`` is this process's GPU (LOCAL_RANK) if there is one.
        resolution: Image side in pixels, None for the checkpoint's own.
        gradient_checkpointing: Compute the denoiser's layers again on the way back instead of
            keeping what they gave: a fifth of the memory for half as much time again, where a
            gradient is asked for; nothing else changes.

    Raises:
        InputError: The source is missing, incomplete, pickled or does not fit together; says how
            to fix it.
    """
    place = resolve_source(source)
    target = _choose_device(device)
    autocast = _choose_autocast(precision, target)
    if isinstance(place, Path) and place.is_file():
        parts = load_single_file(place, config)
    else:
        parts = _load_folder(place, revision or "main")
    unet, vae, text_encoder = modules = [parts[k] for k in ("unet", "vae", "text_encoder")]
    fingerprint = fingerprint_of(module.state_dict() for module in modules)
    for module in modules:
        module.to(target, torch.float32).requires_grad_(False)
    unet.requires_grad_(True)
    if channels_last is True or (channels_last == "auto" and target.type == "cuda"):
        unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if attention == "eager":
        unet.set_attn_processor(AttnProcessor())
    try:
        return StableDiffusion(
            name=name,
            fingerprint=fingerprint,
            unet=unet,
            autoencoder=vae,
            text_encoder=text_encoder,
            tokenizer=parts["tokenizer"],
            scheduler=parts["scheduler"],
            resolution=resolution,
            autocast=autocast,
        )
    except ValueError as error:
        raise InputError(f"checkpoint {source} does not fit together: {error}") from error


def fingerprint_of(states: Iterable[Mapping[str, torch.Tensor]]) -> str:
    """First 16 hex digits of the SHA-256 over names, shapes and fp32 values of all weights.

    Args:
        states: Weights of UNet, autoencoder and text encoder, in this order.
    """
    digest = hashlib.sha256()
    for state in states:
        for name, tensor in sorted(state.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def resolve_source(source: str) -> Path | str:
    """Tell what a source is: the path of a folder or a single file, or a hub id.

    Args:
        source: Path of a diffusers folder, path of a ``.safetensors`` file, ``package:NAME`` for
            a checkpoint that ships with this package, or a hub id ``owner/name``.

    Raises:
        InputError: Nothing is there, or it is a pickle.
    """
    if source.startswith("package:"):
        assets = Path(str(resources.files("dori_lightning"))) / "assets"
        folder = assets / source.removeprefix("package:")
        if not (folder / "unet").is_dir():
            raise InputError(
                f"checkpoint {source} is not installed at {folder}; reinstall the package or "
                f"plant it anew with: python -m dori_lightning task=plant"
            )
        return folder
    path = Path(source).expanduser()
    if path.suffix in _PICKLES:
        raise InputError(_pickle_message(path))
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    looks_like_hub = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if not looks_like_hub or path.parent.is_dir():
        raise InputError(
            f"checkpoint {source!r} is neither a diffusers folder, a .safetensors file nor a hub "
            f"id 'owner/name'; checkpoint.source must name one of them"
        )
    return source


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle: opening it could run code, so it is refused. Convert it once, in a "
        f"sandbox if you do not trust it, with: "
        f"python -m dori_lightning.models.convert {path} OUTPUT.safetensors"
    )


def _check_folder(folder: Path) -> None:
    """Refuse an incomplete folder or one with pickled weights, before anything is read.

    Raises:
        InputError: Says which part, and how to fix it.
    """
    for part, stem in _PARTS.items():
        place = folder / part
        if not (place / "config.json").is_file():
            raise InputError(
                f"{folder} is not a diffusers Stable Diffusion folder: "
                f"{part}/config.json is missing"
            )
        if not list(place.glob(f"{stem}*.safetensors")):
            pickles = [p for p in sorted(place.iterdir()) if p.suffix in _PICKLES]
            raise InputError(
                _pickle_message(pickles[0])
                if pickles
                else f"{place} holds no weights ({stem}.safetensors is missing)"
            )
    for part in ("tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise InputError(
                f"{folder} is not a diffusers Stable Diffusion folder: {part}/ is missing"
            )


def _choose_autocast(precision: str, device: torch.device) -> torch.dtype | None:
    """What the denoiser computes in where it is not the weights' own fp32.

    Raises:
        InputError: fp16 on the CPU, which has no fast or safe kernels for it.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise InputError(
            "checkpoint.precision=fp16 needs a GPU; on the CPU use fp32 (exact) or bf16"
        )
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _choose_device(device: str) -> torch.device:
    """The named device; ``auto`` is this process's GPU, told by LOCAL_RANK, or else the CPU."""
    if device != "auto":
        return torch.device(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _load_folder(place: Path | str, revision: str) -> dict[str, Any]:
    where, options = str(place), dict[str, Any](revision=revision)
    if isinstance(place, Path):
        _check_folder(place)
        options = {"local_files_only": True}
    common = {**options, "use_safetensors": True}
    try:
        return {
            "unet": UNet2DConditionModel.from_pretrained(
                where, subfolder="unet", low_cpu_mem_usage=True, **common
            ),
            "vae": AutoencoderKL.from_pretrained(
                where, subfolder="vae", low_cpu_mem_usage=True, **common
            ),
            # said here, or the folder could name a kernel that is fetched and run
            "text_encoder": CLIPTextModel.from_pretrained(
                where, subfolder="text_encoder", attn_implementation="sdpa", **common
            ),
            "tokenizer": CLIPTokenizer.from_pretrained(where, subfolder="tokenizer", **options),
            "scheduler": DDIMScheduler.from_pretrained(where, subfolder="scheduler", **options),
        }
    except (OSError, ValueError, json.JSONDecodeError) as error:
        hint = (
            f"download it first where there is a network: "
            f"hf download {where} --revision {revision}"
            if isinstance(place, str)
            else "get it again: the folder is damaged or not a Stable Diffusion folder"
        )
        raise InputError(
            f"checkpoint {where} cannot be loaded: {first_line(error)}\n  fix:   {hint}"
        ) from error


def load_single_file(path: Path, config: str | None) -> dict[str, Any]:
    """Load UNet, autoencoder and text encoder from one file, everything else from ``config``.

    Nothing here touches the network where ``config`` is a folder.

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
        return {
            "unet": UNet2DConditionModel.from_single_file(str(path), subfolder="unet", **options),
            "vae": AutoencoderKL.from_single_file(str(path), subfolder="vae", **options),
            "text_encoder": create_diffusers_clip_model_from_ldm(  # type: ignore[no-untyped-call]
                CLIPTextModel, checkpoint=load_file(path), subfolder="text_encoder", **options
            ),
            "tokenizer": CLIPTokenizer.from_pretrained(
                config, subfolder="tokenizer", local_files_only=local
            ),
            "scheduler": DDIMScheduler.from_pretrained(
                config, subfolder="scheduler", local_files_only=local
            ),
        }
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"{path} does not load with the configuration of {config}: {first_line(error)}"
        ) from error


def _refuse_kernels(path: Path) -> None:
    """Refuse a configuration that names a kernel, which transformers would fetch and run."""
    held = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for key, value in held.items() if isinstance(held, dict) else ():
        if "attn_implementation" in key and value not in (None, "eager", "sdpa"):
            raise InputError(
                f"{path} asks for the attention {value!r}, which may be code of others; remove "
                f"{key}"
            )
