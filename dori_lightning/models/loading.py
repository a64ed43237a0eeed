"""Load a checkpoint without letting it run anything.

Tensors come from safetensors; classes are chosen here, never by a file.

Reference: ``DiffusionPipeline.from_pretrained`` reads class names from ``model_index.json``; this
module does not.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from huggingface_hub import snapshot_download
from transformers import CLIPTokenizer

from dori_lightning.models.fingerprint import configuration_of, fingerprint_of
from dori_lightning.models.original_layout import Part
from dori_lightning.models.replaced_parts import Replacement
from dori_lightning.models.soundness import blamed, check_answers, check_parts
from dori_lightning.models.stable_diffusion import Parts, StableDiffusion
from dori_lightning.models.tensors import PART_PREFIXES, empty_part, parts_in, take_tensors
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
from dori_lightning.runtime.logging import with_progress
from dori_lightning.types import InputError, first_line

log = logging.getLogger(__name__)

PredictionType = Literal["epsilon", "v_prediction"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

_WORDS: dict[Part, str] = {
    "unet": "UNet", "vae": "autoencoder", "text_encoder": "text encoder",
}  # fmt: skip


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
        file = WeightFile.open(place)
        notes += [file.prediction_note] if file.prediction_note and unet is None else []
        home = _home_of_single_file(file, config)
        parts = _load_parts(home, dict.fromkeys(STEMS, (file,)), single=file.path)
    else:
        home = place if isinstance(place, Path) else _fetched(place, revision or "main", variant)
        parts = _load_parts(home, _files_of_folder(home, variant))
    parts["scheduler"] = _with_prediction_type(parts["scheduler"], prediction_type, notes)
    replaced = tuple(one.apply(parts[one.part]) for one in replacements)
    whole = Parts(*(parts[name] for name in (*STEMS, "tokenizer", "scheduler")))
    check_parts(whole, str(home))
    modules = with_progress("fingerprint of the checkpoint", [*whole.modules.values()])
    states = (module.state_dict() for module in modules)
    fingerprint = fingerprint_of(states, configuration_of(whole))
    for module in whole.modules.values():
        module.to(target).requires_grad_(False)
    denoiser = parts["unet"].requires_grad_(True)
    if channels_last is True or (channels_last == "auto" and target.type == "cuda"):
        denoiser.to(memory_format=torch.channels_last)
        parts["vae"].to(memory_format=torch.channels_last)
    if gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    configs = "; ".join(f"{home}/{part}/config.json" for part in STEMS)
    with blamed(f"checkpoint {source} does not fit together", configs):
        model = StableDiffusion(
            whole,
            name=name,
            fingerprint=fingerprint,
            resolution=resolution,
            autocast=autocast,
            replaced=replaced,
        )
    check_answers(model, str(home))
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


def _files_of_folder(folder: Path, variant: str | None) -> dict[Part, tuple[WeightFile, ...]]:
    """Weight files of each part of a diffusers folder.

    Args:
        folder: The folder.
        variant: Which weights are wanted.

    Raises:
        InputError: A part is missing or has no such weights; says which, and how to fix it.
    """
    if not all((folder / part / "config.json").is_file() for part in STEMS):
        raise explain_folder(folder)
    for other in ("tokenizer", "scheduler"):
        if not (folder / other).is_dir():
            raise InputError(
                f"{folder} is not a diffusers Stable Diffusion folder: {other}/ is missing"
            )
    chosen = {part: choose_variant(folder / part, stem, variant) for part, stem in STEMS.items()}
    if variant is None and any(chosen.values()):
        log.info("%s has these variants of weights only: %s", folder, chosen)
    return {
        part: tuple(map(WeightFile.open, variants(folder / part, STEMS[part])[name]))
        for part, name in chosen.items()
    }


def _home_of_single_file(file: WeightFile, config: str | None) -> Path:
    """Folder with the configuration of a single file, which must hold all parts.

    Raises:
        InputError: A part is missing from the file, or no configuration is given.
    """
    held = parts_in(file.names)
    for part, words in _WORDS.items():
        if not any(name.startswith(PART_PREFIXES[part]) for name in file.names):
            given = " ".join(f"checkpoint.{one}={file.path}" for one in held)
            raise InputError(
                f"{file.path} has no {words} ({PART_PREFIXES[part][0]}* among its "
                f"{len(file.names)} tensors); the file must hold a whole Stable Diffusion "
                f"checkpoint in the original layout",
                where="checkpoint.source",
                fix=f"name the checkpoint that it belongs to, and this as its part: "
                f"checkpoint.source=BASE {given}"
                if held
                else "give a whole checkpoint",
            )
    if config is None:
        raise InputError(
            f"{file.path} is a single file and holds no configuration; name a diffusers folder or "
            f"hub id of the same architecture with checkpoint.config=..., "
            f"e.g. stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    folder = Path(config).expanduser()
    return folder if folder.is_dir() else _fetched(config, "main", None, weights=False)


def _fetched(source: str, revision: str, variant: str | None, *, weights: bool = True) -> Path:
    """Folder with the files of a hub id, out of the hub's cache or downloaded to it.

    Raises:
        InputError: There are none, or no network.
    """
    names = ["*/config.json", "tokenizer/*", "scheduler/*"]
    end = f"{'' if variant is None else f'.{variant}'}.safetensors"
    for part, stem in STEMS.items() if weights else ():
        names += [f"{part}/{stem}{end}", f"{part}/{stem}-?????-of-?????{end}"]
    fix = f"download it first where there is a network: hf download {source} --revision {revision}"
    with blamed(f"checkpoint {source} cannot be loaded", source, fix):
        return Path(snapshot_download(source, revision=revision, allow_patterns=names))


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


def _load_parts(
    home: Path, files: dict[Part, tuple[WeightFile, ...]], *, single: Path | None = None
) -> dict[str, Any]:
    """Parts out of files, as the configuration in a diffusers folder says.

    Args:
        home: The folder.
        files: Weights of each part.
        single: The one file of all parts, where there is one.

    Returns:
        ``unet``, ``vae``, ``text_encoder``, ``tokenizer`` and ``scheduler``.

    Raises:
        InputError: The configuration cannot be read, or the tensors are not those that it asks
            for.
    """
    fails = f"checkpoint {home} cannot be loaded"
    if single is not None:
        fails = f"{single} does not load with the configuration of {home}"
    parts: dict[str, Any] = {}
    for part, own in with_progress("load the checkpoint", [*files.items()]):
        with _loading(fails, home, part):
            parts[part] = empty_part(part, home)
        paths = ", ".join(str(file.path) for file in own)
        given = take_tensors(
            part,
            parts[part],
            own,
            whole=True,
            below=("",) if single is None else PART_PREFIXES[part],
            what=f"{fails}, its {part} fails",
            where=f"{paths}; {home / part / 'config.json'}",
            fix="get both files of one checkpoint again; a converter that dropped or renamed "
            "tensors must be run again",
        )
        parts[part].load_state_dict(given, assign=True)
    with _loading(fails, home, "tokenizer"):
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(
            home, subfolder="tokenizer", local_files_only=True
        )
    with _loading(fails, home, "scheduler"):
        parts["scheduler"] = DDIMScheduler.from_pretrained(
            str(home), subfolder="scheduler", local_files_only=True
        )
    return parts


def _loading(fails: str, home: Path, part: str) -> AbstractContextManager[None]:
    """Blame the files of a part for what is raised while it loads."""
    file = {
        "tokenizer": "tokenizer.json, tokenizer_config.json, vocab.json, merges.txt",
        "scheduler": "scheduler_config.json",
    }.get(part, "config.json")
    fix = "get it again: the folder is damaged or not a Stable Diffusion folder"
    return blamed(f"{fails}, its {part} fails", f"{home}/{part}/{file}", fix)
