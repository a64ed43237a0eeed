"""Load a checkpoint without letting it run anything.

Tensors come from safetensors; classes are chosen here, never by a file.

Reference: ``DiffusionPipeline.from_pretrained`` reads class names from ``model_index.json``; this
module does not.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from dori_lightning.models.fingerprint import configuration_of, fingerprint_of
from dori_lightning.models.original_layout import Part
from dori_lightning.models.replaced_parts import Replacement, parts_in
from dori_lightning.models.soundness import blamed, check_answers, check_parts
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.models.tensors import (
    check_folder_tensors,
    check_original_tensors,
    require_tensors,
)
from dori_lightning.models.weight_files import (
    PICKLES,
    STEMS,
    PredictionNote,
    WeightFile,
    choose_variant,
    explain_folder,
    is_weight_file,
    pickle_message,
    shipped_folder,
    variants,
)
from dori_lightning.types import InputError, first_line

log = logging.getLogger(__name__)

PredictionType = Literal["epsilon", "v_prediction"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

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
    unet: str | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
    prediction_type: PredictionType | None = None,
    variant: str | None = None,
    precision: Precision = "auto",
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
        unet: File or folder with other weights of the UNet, or some of them; see
            ``models.replaced_parts``. Names that it lacks stay the checkpoint's.
        vae: The same of the autoencoder.
        text_encoder: The same of the text encoder.
        prediction_type: What the UNet predicts; None for what the checkpoint's scheduler says.
        variant: Which weights of a folder or hub id, such as ``fp16``; None for those without a
            variant, or the only ones that a folder has.
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
    target = choose_device(device)
    autocast = choose_autocast(precision, target)
    others: dict[Part, str | None] = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    replacements = [
        Replacement.open(part, given) for part, given in others.items() if given is not None
    ]
    notes = [note for replacement in replacements for note in replacement.prediction_notes()]
    if isinstance(place, Path) and place.is_file():
        if variant is not None:
            raise InputError(
                f"{place} is a single file, which has no variants",
                where="checkpoint.variant",
                fix="leave it out",
            )
        note = WeightFile.open(place).prediction_note
        notes += [note] if note is not None and unet is None else []
        parts = load_single_file(place, config)
    else:
        parts = _load_folder(place, revision or "main", variant)
    parts["scheduler"] = _with_prediction_type(parts["scheduler"], prediction_type, notes)
    replaced = tuple(one.apply(parts[one.part]) for one in replacements)
    home = config if isinstance(place, Path) and place.is_file() else str(place)
    assert home is not None  # a single file without one is refused
    whole = {
        "unet": parts["unet"],
        "autoencoder": parts["vae"],
        "text_encoder": parts["text_encoder"],
        "tokenizer": parts["tokenizer"],
        "scheduler": parts["scheduler"],
    }
    check_parts(**whole, home=home)
    modules = [parts[k] for k in ("unet", "vae", "text_encoder")]
    states = (module.state_dict() for module in modules)
    fingerprint = fingerprint_of(states, configuration_of(**whole))
    for module in modules:
        module.to(target, torch.float32).requires_grad_(False)
    denoiser = parts["unet"].requires_grad_(True)
    if channels_last is True or (channels_last == "auto" and target.type == "cuda"):
        denoiser.to(memory_format=torch.channels_last)
        parts["vae"].to(memory_format=torch.channels_last)
    if gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if attention == "eager":
        denoiser.set_attn_processor(AttnProcessor())
    configs = "; ".join(f"{home}/{part}/config.json" for part in STEMS)
    with blamed(f"checkpoint {source} does not fit together", configs):
        model = StableDiffusion(
            **whole,
            name=name,
            fingerprint=fingerprint,
            resolution=resolution,
            autocast=autocast,
            replaced=replaced,
        )
    check_answers(model, home)
    return model


def resolve_source(source: str) -> Path | str:
    """Tell what a source is: the path of a folder or a single file, or a hub id.

    Args:
        source: Path of a diffusers folder, path of a ``.safetensors`` file, ``package:NAME`` for
            a checkpoint that ships with this package, or a hub id ``owner/name``.

    Raises:
        InputError: Nothing is there, or it is a pickle.
    """
    shipped = shipped_folder(source)
    if shipped is not None:
        return shipped
    path = Path(source).expanduser()
    if path.suffix.lower() in PICKLES:
        raise InputError(pickle_message(path))
    if path.is_dir() or is_weight_file(path):
        return path
    looks_like_hub = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    if not looks_like_hub or path.parent.is_dir():
        raise InputError(
            f"checkpoint {source!r} is neither a diffusers folder, a .safetensors file nor a hub "
            f"id 'owner/name'; checkpoint.source must name one of them"
        )
    return source


def _with_prediction_type(
    scheduler: DDIMScheduler, wanted: PredictionType | None, notes: Sequence[PredictionNote]
) -> DDIMScheduler:
    """A scheduler with the wanted prediction type, held against what the UNet's files note.

    Raises:
        InputError: A file notes another type than the configuration, and none is wanted.
    """
    configured = str(scheduler.config["prediction_type"])
    for note in notes:
        if note.kind == (wanted or configured):
            continue
        if wanted is None:
            raise InputError(
                f"{note.path} notes that the UNet predicts {note.kind} ({note.words}), but the "
                f"checkpoint's configuration says {configured}",
                where="checkpoint.prediction_type",
                fix=f"checkpoint.prediction_type={note.kind} if the file is right, "
                f"checkpoint.prediction_type={configured} if the configuration is",
            )
        log.warning(
            "%s notes that the UNet predicts %s (%s); checkpoint.prediction_type=%s is used",
            note.path, note.kind, note.words, wanted,
        )  # fmt: skip
    if wanted is None or wanted == configured:
        return scheduler
    made: DDIMScheduler = DDIMScheduler.from_config(scheduler.config, prediction_type=wanted)
    return made


def _check_folder(folder: Path, variant: str | None) -> dict[Part, str]:
    """Refuse an incomplete folder or one whose weights are none, before anything is read.

    Args:
        folder: A diffusers folder.
        variant: Which weights are wanted.

    Returns:
        Which variant of each part's weights to load; ``""`` for the weights without one.

    Raises:
        InputError: Says which part, and how to fix it.
    """
    chosen: dict[Part, str] = {}
    if not all((folder / part / "config.json").is_file() for part in STEMS):
        raise explain_folder(folder)
    for part in ("tokenizer", "scheduler"):
        if not (folder / part).is_dir():
            raise InputError(
                f"{folder} is not a diffusers Stable Diffusion folder: {part}/ is missing"
            )
    for part, stem in STEMS.items():
        chosen[part] = choose_variant(folder / part, stem, variant)
        for path in variants(folder / part, stem)[chosen[part]]:
            WeightFile.open(path)
    if variant is None and any(chosen.values()):
        log.info("%s has these variants of weights only: %s", folder, chosen)
    return chosen


def choose_autocast(precision: Precision, device: torch.device) -> torch.dtype | None:
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


def _existing_device(name: str) -> torch.device:
    """A device by torch's name for it.

    Raises:
        InputError: Torch knows no such device, or the machine has none.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("meta holds no numbers")
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        there = ", ".join(f"cuda:{k}" for k in range(torch.cuda.device_count()))
        raise InputError(
            f"there is no device {name!r} here: {first_line(error)}",
            where="checkpoint.device",
            fix=f"checkpoint.device=auto takes what there is: {there or 'the CPU (cpu)'}",
        ) from error
    return device


def choose_device(device: str) -> torch.device:
    """The named device; ``auto`` is this process's GPU, told by LOCAL_RANK, or else the CPU."""
    if device != "auto":
        return _existing_device(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _load_folder(place: Path | str, revision: str, variant: str | None) -> dict[str, Any]:
    where, options = str(place), dict[str, Any](revision=revision)
    chosen: dict[Part, str] = dict.fromkeys(STEMS, variant or "")
    fix = f"download it first where there is a network: hf download {where} --revision {revision}"
    if variant is None:
        fix += "; if it has half-precision weights alone, add checkpoint.variant=fp16"
    if isinstance(place, Path):
        chosen = _check_folder(place, variant)
        options = {"local_files_only": True}
        fix = "get it again: the folder is damaged or not a Stable Diffusion folder"
        for part, name in chosen.items():
            with _loading(where, part, fix):
                check_folder_tensors(part, place, variants(place / part, STEMS[part])[name])
    common = {
        part: {
            **options,
            "use_safetensors": True,
            "output_loading_info": True,
            "subfolder": part,
            "variant": name or None,
        }
        for part, name in chosen.items()
    }
    loaders: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel.from_pretrained(
            where, low_cpu_mem_usage=True, **common["unet"]
        ),
        "vae": lambda: AutoencoderKL.from_pretrained(
            where, low_cpu_mem_usage=True, **common["vae"]
        ),
        # attention is said here, or the folder could name a kernel that is fetched and run
        "text_encoder": lambda: CLIPTextModel.from_pretrained(
            where, attn_implementation="sdpa", dtype=torch.float32, **common["text_encoder"]
        ),
        "tokenizer": lambda: CLIPTokenizer.from_pretrained(
            where, subfolder="tokenizer", **options
        ),
        "scheduler": lambda: DDIMScheduler.from_pretrained(
            where, subfolder="scheduler", **options
        ),
    }
    parts: dict[str, Any] = {}
    for name, load in loaders.items():
        with _loading(where, name, fix):
            parts[name] = load()
    for part in chosen:
        parts[part], told = parts[part]
        names = {*parts[part].state_dict(), *told["missing_keys"]}
        found = (names - set(told["missing_keys"])) | set(told["unexpected_keys"])
        require_tensors(
            dict.fromkeys(sorted(names), ()),
            dict.fromkeys(sorted(found), ()),
            part,
            what=f"checkpoint {where} cannot be loaded",
            where=f"{where}/{part}",
        )
    return parts


def _loading(where: str, part: str, fix: str) -> AbstractContextManager[None]:
    """Blame the files of a part for what is raised while it loads."""
    file = {
        "tokenizer": "tokenizer.json, tokenizer_config.json, vocab.json, merges.txt",
        "scheduler": "scheduler_config.json",
    }.get(part, "config.json")
    return blamed(
        f"checkpoint {where} cannot be loaded, its {part} fails",
        f"{where}/{part}/{file}",
        fix,
    )


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
    file = WeightFile.open(path)
    for part, prefixes in _PREFIXES.items():
        if not any(key.startswith(prefixes) for key in file.names):
            raise _lacks(file, part, prefixes)
    if config is None:
        raise InputError(
            f"{path} is a single file and holds no configuration; name a diffusers folder or hub "
            f"id of the same architecture with checkpoint.config=..., "
            f"e.g. stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    weights = _with_text_model(file.tensors())
    local = Path(config).is_dir()
    options: dict[str, Any] = {"config": config, "local_files_only": local}
    with blamed(
        f"{path} does not load with the configuration of {config}",
        f"{path}; {config}/*/config.json",
        "name the configuration of the same architecture, or get the file again",
    ):
        if local:
            _refuse_kernels(Path(config) / "text_encoder" / "config.json")
        for one in STEMS:
            check_original_tensors(one, weights, config, file=path, local_files_only=local)
        return {
            "unet": UNet2DConditionModel.from_single_file(
                dict(weights), subfolder="unet", **options
            ),
            "vae": AutoencoderKL.from_single_file(dict(weights), subfolder="vae", **options),
            "text_encoder": create_diffusers_clip_model_from_ldm(  # type: ignore[no-untyped-call]
                CLIPTextModel, checkpoint=dict(weights), subfolder="text_encoder", **options
            ),
            "tokenizer": CLIPTokenizer.from_pretrained(
                config, subfolder="tokenizer", local_files_only=local
            ),
            "scheduler": DDIMScheduler.from_pretrained(
                config, subfolder="scheduler", local_files_only=local
            ),
        }


def _lacks(file: WeightFile, part: str, prefixes: tuple[str, ...]) -> InputError:
    """What to say of a single file without one of the parts."""
    held = parts_in(list(file.names))
    given = " ".join(f"checkpoint.{one}={file.path}" for one in held)
    return InputError(
        f"{file.path} has no {part} ({' or '.join(prefixes)}* among its {len(file.names)} "
        f"tensors); the file must hold a whole Stable Diffusion checkpoint in the original layout",
        where="checkpoint.source",
        fix=f"name the checkpoint that it belongs to, and this as its part: "
        f"checkpoint.source=BASE {given}"
        if held
        else "give a whole checkpoint",
    )


def _with_text_model(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the text encoder as newer files have them, where a file is from before.

    The files of 2022 and merges of them name the encoder's tensors without ``text_model.``.
    """
    older = re.compile(r"cond_stage_model\.transformer\.(?=embeddings|encoder|final_layer_norm)")
    newer = "cond_stage_model.transformer.text_model."
    return {older.sub(newer, name): tensor for name, tensor in weights.items()}


def _refuse_kernels(path: Path) -> None:
    """Refuse a configuration that names a kernel, which transformers would fetch and run."""
    held = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for key, value in held.items() if isinstance(held, dict) else ():
        if "attn_implementation" in key and value not in (None, "eager", "sdpa"):
            raise InputError(
                f"{path} asks for the attention {value!r}, which may be code of others; remove "
                f"{key}"
            )
