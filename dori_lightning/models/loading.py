"""Load a checkpoint without letting it run anything.

Tensors come from safetensors; classes are chosen here, never by a file.

Reference: ``DiffusionPipeline.from_pretrained`` reads class names from ``model_index.json``; this
module does not.
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from torch import nn

from dori_lightning.models.components import (
    Component,
    Components,
    Family,
    stem,
    tokenized_by,
)
from dori_lightning.models.fingerprint import configuration_of, fingerprint_of
from dori_lightning.models.flux import Flux
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.lora import Lora, LoraSetting
from dori_lightning.models.original_layout import PREFIXES
from dori_lightning.models.pixart import PixArt
from dori_lightning.models.replaced_parts import Replacement
from dori_lightning.models.soundness import blamed, check_answers, check_components
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.models.stable_diffusion_3 import StableDiffusion3
from dori_lightning.models.stable_diffusion_xl import StableDiffusionXL
from dori_lightning.models.tensors import (
    COMPONENT_PREFIXES,
    components_in,
    empty_component,
    take_tensors,
    tied_names,
)
from dori_lightning.models.weight_files import (
    PICKLES,
    PredictionNote,
    WeightFile,
    choose_variant,
    class_name,
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
Storage = Literal["auto", "fp32", "bf16"]
TextEncoders = Literal["auto", "keep", "release"]

FAMILIES: Mapping[str, type[LatentDiffusion]] = {
    kind.family.name: kind
    for kind in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, PixArt)
}
"""Adapters by ``checkpoint.family``."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit of the hub in full."""

_WORDS: dict[Component, str] = {
    "unet": "UNet", "vae": "autoencoder", "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder", "transformer": "transformer",
}  # fmt: skip


def load_checkpoint(
    *,
    name: str,
    source: str,
    family: str = "sd",
    revision: str | None = None,
    config: str | None = None,
    unet: str | None = None,
    transformer: str | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
    text_encoder_2: str | None = None,
    lora: LoraSetting | None = None,
    base: str = "auto",  # noqa: ARG001
    prompt_tokens: int | None = None,
    prediction_type: PredictionType | None = None,
    variant: str | None = None,
    precision: Precision = "auto",
    channels_last: bool | Literal["auto"] = "auto",
    device: str = "auto",
    resolution: int | None = None,
    gradient_checkpointing: bool = False,
    storage: Storage = "auto",
    text_encoders: TextEncoders = "auto",
) -> LatentDiffusion:
    """Load a checkpoint.

    Weights stay in fp32, so that an edit is exact, unless ``storage`` says otherwise;
    ``precision`` chooses the dtype that the denoiser computes in.

    Args:
        name: How reports call it.
        source: See ``resolve_source``.
        family: Which family of checkpoints it is of; one of ``FAMILIES``.
        revision: Commit of a hub id; a branch or tag, or None for ``main``, pins nothing, which is
            said together with the commit that was found.
        config: For a single file: the diffusers folder or hub id with its configuration and
            tokenizer.
        unet: File or folder with other weights of the UNet, or some of them; see
            ``models.replaced_parts``. Names that it lacks stay the checkpoint's.
        transformer: The same of the transformer, in families that have one in its place.
        vae: The same of the autoencoder.
        text_encoder: The same of the text encoder.
        text_encoder_2: The same of the second text encoder, where the family has one.
        lora: LoRA that is added to the weights: a file, ``{path: FILE, scale: NUMBER}``, or a list
            of either, added one after the other; see ``models.lora``.
        base: What it was tuned from, which an audit attacks as well (``config.base_checkpoint``);
            nothing here depends on it.
        prompt_tokens: Tokens of a prompt that T5 takes, with padding: all of them take part. None
            for as many as the family has.
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
        storage: Dtype that the denoiser's and text encoders' weights are kept in. ``auto`` is bf16
            where the denoiser has more than 3 billion, or more than one and a GPU less memory
            than five times their size in fp32. The fingerprint is that of the files.
        text_encoders: ``keep`` has them on the device all the time, ``release`` while prompts are
            encoded; ``auto`` releases more than a GiB from a GPU.

    Raises:
        InputError: The source is missing, incomplete, pickled or does not fit together; says how
            to fix it.
    """
    kind = FAMILIES.get(family)
    if kind is None:
        raise InputError(
            f"there is no family of checkpoints {family!r}",
            where="checkpoint.family",
            fix=f"one of {', '.join(FAMILIES)}",
        )
    place = resolve_source(source)
    target = choose_device(device)
    autocast = choose_autocast(precision, target)
    others: dict[Component, str | None] = {
        "unet": unet,
        "transformer": transformer,
        "vae": vae,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
    }
    for component, given in others.items():
        if given is not None and component not in kind.family.modules:
            raise InputError(
                f"checkpoints of {kind.family.title} have no {component}",
                where=f"checkpoint.{component}",
                fix=f"theirs are {', '.join(kind.family.modules)}",
            )
    replacements = [
        Replacement.open(component, given)
        for component, given in others.items()
        if given is not None
    ]
    for replacement in replacements:
        for given_file in replacement.files:
            given_file.check_family(kind.family)
    loras = Lora.open_all(lora)
    # what is put on a component is put on its fp32 values
    wide = {"vae", *(kind.family.modules if loras else (one.component for one in replacements))}
    halves = partial(_halves, storage, precision, device=target)
    notes = [note for replacement in replacements for note in replacement.prediction_notes()]
    if isinstance(place, Path) and place.is_file():
        if variant is not None:
            raise InputError(
                f"{place} is a single file, which has no variants",
                where="checkpoint.variant",
                fix="leave it out",
            )
        file = WeightFile.open(place)
        file.check_family(kind.family)
        notes += [file.prediction_note] if file.prediction_note and unet is None else []
        home = _home_of_single_file(kind.family, file, config)
        whole: dict[Component, tuple[WeightFile, ...]] = dict.fromkeys(
            kind.family.modules, (file,)
        )
        components, half = _load_components(
            kind.family, home, whole, halves=halves, wide=wide, single=file.path
        )
    else:
        home = (
            place
            if isinstance(place, Path)
            else _fetched(kind.family, place, revision or "main", variant)
        )
        files = _files_of_folder(kind.family, home, variant)
        components, half = _load_components(kind.family, home, files, halves=halves, wide=wide)
    commit = None if isinstance(place, Path) else _commit_of(home, place, revision)
    if prompt_tokens is not None:
        _cut_prompts(components, prompt_tokens)
    scheduler = _with_prediction_type(components.scheduler, prediction_type, notes)
    components = replace(components, scheduler=scheduler)
    replaced = tuple(one.apply(components.modules[one.component]) for one in replacements)
    check_components(kind, components, str(home))
    fused = tuple(one.fuse(components) for one in loras)
    hashed = with_progress("fingerprint of the checkpoint", [*components.modules.values()])
    states = (module.state_dict() for module in hashed)
    with blamed("no sampler takes this schedule", f"{home}/scheduler/scheduler_config.json"):
        configuration = configuration_of(components)
    fingerprint = fingerprint_of(states, configuration)
    if half:
        autocast = None
        for component, module in components.modules.items():
            if component != "vae":
                module.to(torch.bfloat16)
        log.info("the weights of %s are kept in bf16", name)
    lend = _place(components, target, text_encoders)
    denoiser = components.denoiser.requires_grad_(True)
    if channels_last is True or (channels_last == "auto" and target.type == "cuda"):
        denoiser.to(memory_format=torch.channels_last)
        components.autoencoder.to(memory_format=torch.channels_last)
    if gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    configs = "; ".join(f"{home}/{name}/config.json" for name in components.modules)
    with blamed(f"checkpoint {source} does not fit together", configs):
        model = kind(
            components,
            name=name,
            fingerprint=fingerprint,
            resolution=resolution,
            autocast=autocast,
            replaced=replaced,
            loras=fused,
            lend_encoders=lend,
            commit=commit,
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
    scheduler: Any, wanted: PredictionType | None, notes: Sequence[PredictionNote]
) -> Any:
    """A scheduler with the wanted prediction type, held against what the UNet's files note.

    Raises:
        InputError: A file notes another type than the configuration, and none is wanted.
    """
    if "prediction_type" not in scheduler.config:
        if wanted is None:
            return scheduler
        raise InputError(
            f"checkpoint.prediction_type={wanted} is for noise schedules of diffusion; this "
            f"checkpoint was trained by flow matching and predicts a velocity",
            where="checkpoint.prediction_type",
            fix="leave it out",
        )
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
    return type(scheduler).from_config(scheduler.config, prediction_type=wanted)


def _files_of_folder(
    family: Family, folder: Path, variant: str | None
) -> dict[Component, tuple[WeightFile, ...]]:
    """Weight files of each component of a diffusers folder.

    Args:
        family: Says which components there are.
        folder: The folder.
        variant: Which weights are wanted.

    Raises:
        InputError: A component is missing or has no such weights; says which, and how to fix it.
    """
    other = _other_family(folder, family)
    if other is not None:
        raise other
    present = [
        name
        for name in family.modules
        if name not in family.optional or (folder / name / "config.json").is_file()
    ]
    if not all((folder / name / "config.json").is_file() for name in present):
        raise explain_folder(folder, family)
    tokenizers = (name for name in family.tokenizers if tokenized_by(name) in present)
    for name in (*tokenizers, "scheduler"):
        if not (folder / name).is_dir():
            raise InputError(
                f"{folder} is not a diffusers folder of {family.title}: {name}/ is missing"
            )
    chosen = {name: choose_variant(folder / name, name, variant) for name in present}
    if variant is None and any(chosen.values()):
        log.info("%s has these variants of weights only: %s", folder, chosen)
    return {
        name: tuple(map(WeightFile.open, variants(folder / name, name)[kind]))
        for name, kind in chosen.items()
    }


def _home_of_single_file(family: Family, file: WeightFile, config: str | None) -> Path:
    """Folder with the configuration of a single file, which must hold all components.

    Raises:
        InputError: A component is missing from the file, or no configuration is given.
    """
    if family.name not in PREFIXES:
        raise InputError(
            f"{file.path} is a single file; checkpoints of {family.title} are read from diffusers "
            f"folders and hub ids only",
            where="checkpoint.source",
            fix=f"a folder, or a hub id such as {family.example}",
        )
    held = components_in(file.names)
    for name in family.modules:
        begins = _begins(family, name)
        if not any(tensor.startswith(begins) for tensor in file.names):
            given = " ".join(f"checkpoint.{one}={file.path}" for one in held)
            raise InputError(
                f"{file.path} has no {_WORDS[name]} ({begins[0]}* among its "
                f"{len(file.names)} tensors); the file must hold a whole {family.title} "
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
            f"e.g. {family.example}"
        )
    folder = Path(config).expanduser()
    return folder if folder.is_dir() else _fetched(family, config, "main", None, weights=False)


def _begins(family: Family, component: Component) -> tuple[str, ...]:
    """What names of a component begin with in a single file of the family."""
    return PREFIXES[family.name][component], *COMPONENT_PREFIXES[component]


def _other_family(folder: Path, family: Family) -> InputError | None:
    """What to say of a folder of another family, by the names and components in it; data alone."""

    def likeness(one: Family) -> tuple[bool, int, bool]:
        held = {name for name in one.modules if (folder / name / "config.json").is_file()}
        return held | one.optional >= one.modules.keys(), len(held), one is family

    pipeline = class_name(folder, "model_index.json")
    alike = [
        one
        for one in (kind.family for kind in FAMILIES.values())
        if pipeline == one.pipeline
        or class_name(folder / one.denoiser) == one.modules[one.denoiser].__name__
    ]
    # several families may have a denoiser of one class: the one more of whose components are there
    likely = max(alike, key=likeness, default=family)
    if likely is family:
        return None
    return InputError(
        f"{folder} is a checkpoint of {likely.title}, not of {family.title}",
        where="checkpoint.family",
        fix=f"checkpoint.family={likely.name}",
    )


def _fetched(
    family: Family, source: str, revision: str, variant: str | None, *, weights: bool = True
) -> Path:
    """Folder with the files of a hub id, out of the hub's cache or downloaded to it.

    Raises:
        InputError: There are none, or no network.
    """
    names = [
        "model_index.json",
        "*/config.json",
        "scheduler/*",
        *(f"{name}/*" for name in family.tokenizers),
    ]
    kind = "" if variant is None else f".{variant}"
    # libraries put the variant before or behind the number of a shard
    middles = (kind, f"{kind}-?????-of-?????", f"-?????-of-?????{kind}")
    for name in family.modules if weights else ():
        names += [f"{name}/{stem(name)}{middle}.safetensors" for middle in middles]
    fix = f"download it first where there is a network: hf download {source} --revision {revision}"
    with blamed(f"checkpoint {source} cannot be loaded", source, fix):
        try:
            return Path(snapshot_download(source, revision=revision, allow_patterns=names))
        except GatedRepoError as error:
            raise InputError(
                f"checkpoint {source} is gated: its owner gives access to those who accept its "
                f"licence",
                where="checkpoint.source",
                fix=f"accept it on https://huggingface.co/{source}, then hf auth login; or name "
                f"a folder with the checkpoint",
            ) from error


def _commit_of(home: Path, source: str, revision: str | None) -> str | None:
    """Commit of a hub id in the hub's cache; warns where the revision is not that commit.

    None where the folder does not say it.
    """
    commit = home.name if _COMMIT.fullmatch(home.name) else None
    if revision is None or not _COMMIT.fullmatch(revision):
        log.warning(
            "checkpoint %s is not pinned (checkpoint.revision=%s may be another one tomorrow); "
            "this is %s. To use the same again: checkpoint.revision=%s",
            source,
            revision or "main",
            f"commit {commit}" if commit else "a commit that is not known",
            commit or "SHA",
        )
    return commit


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


def _halves(
    storage: Storage, precision: Precision, denoiser: nn.Module, *, device: torch.device
) -> bool:
    """Whether the weights of all but the autoencoder are kept in bf16.

    Raises:
        InputError: They are, and another precision is wanted.
    """
    count = sum(p.numel() for p in denoiser.parameters())
    room = math.inf
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
    large = count > 3e9 or (count > 1e9 and 5 * 4 * count > room)
    if storage == "fp32" or (storage == "auto" and not large):
        return False
    if precision not in ("auto", "bf16"):
        raise InputError(
            f"weights that are kept in bf16 compute in bf16, not in {precision}",
            where="checkpoint.precision",
            fix="checkpoint.precision=bf16, or checkpoint.storage=fp32 where memory holds it",
        )
    return True


def _place(components: Components, device: torch.device, text_encoders: TextEncoders) -> bool:
    """Bring components to the device, their weights frozen; lent text encoders stay at home.

    Returns:
        Whether text encoders are lent.
    """
    weights = [p for encoder, _ in components.encoders.values() for p in encoder.parameters()]
    large = sum(p.numel() * p.element_size() for p in weights) > 2**30
    lend = text_encoders == "release" or (
        text_encoders == "auto" and device.type == "cuda" and large
    )
    for name, module in components.modules.items():
        lent = lend and name in components.encoders
        module.to("cpu" if lent else device).requires_grad_(False)
    return lend


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


def _load_components(
    family: Family,
    home: Path,
    files: Mapping[Component, tuple[WeightFile, ...]],
    *,
    halves: Callable[[nn.Module], bool],
    wide: Collection[Component],
    single: Path | None = None,
) -> tuple[Components, bool]:
    """Components out of files, as the configuration in a diffusers folder says.

    In fp32, so that an edit is exact; but as the files have them where they are kept in half, so
    that no machine needs twice the memory of that while it loads.

    Args:
        family: Classes of the components.
        home: The folder.
        files: Weights of each component.
        halves: Whether weights of a denoiser, which has none yet, will be kept in half.
        wide: Components that are read in fp32 all the same.
        single: The one file of all components, where there is one.

    Returns:
        The components, and whether they are to be kept in half.

    Raises:
        InputError: The configuration cannot be read, or the tensors are not those that it asks
            for.
    """
    fails = f"checkpoint {home} cannot be loaded"
    if single is not None:
        fails = f"{single} does not load with the configuration of {home}"
    modules: dict[Component, Any] = {}
    for name in files:
        with _loading(fails, home, name):
            modules[name] = empty_component(name, family.modules[name], home)
    half = halves(modules[family.denoiser])
    for name, own in with_progress("load the checkpoint", [*files.items()]):
        paths = ", ".join(str(file.path) for file in own)
        given = take_tensors(
            name,
            modules[name],
            own,
            whole=True,
            below=("",) if single is None else _begins(family, name),
            dtype=None if half and name not in wide else torch.float32,
            what=f"{fails}, its {name} fails",
            where=f"{paths}; {home / name / 'config.json'}",
            fix="get both files of one checkpoint again; a converter that dropped or renamed "
            "tensors must be run again",
        )
        modules[name].load_state_dict(given, assign=True)
        if tied_names(modules[name]):
            modules[name].tie_weights()
    tokenizers = {}
    for name, kind in family.tokenizers.items():
        if tokenized_by(name) in modules:
            _require_tokenizer_file(home / name)
            with _loading(fails, home, name):
                tokenizers[name] = kind.from_pretrained(
                    home, subfolder=name, local_files_only=True
                )
    with _loading(fails, home, "scheduler"):
        scheduler = family.scheduler.from_pretrained(
            str(home), subfolder="scheduler", local_files_only=True
        )
    made = Components(family, modules, tokenizers, scheduler, _switches_of(family, home))
    return made, half


def _require_tokenizer_file(folder: Path) -> None:
    """Refuse a tokenizer that only a binary file of sentencepiece describes.

    Raises:
        InputError: Says how it is converted.
    """
    if (folder / "spiece.model").is_file() and not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} has a spiece.model, which only its own parser reads, and no tokenizer.json",
            where=f"{folder}/tokenizer.json",
            fix="get it from a copy of the checkpoint that has it, or convert it once where "
            'sentencepiece is installed: python -c "from transformers import T5TokenizerFast as '
            f"T; T.from_pretrained('{folder}').save_pretrained('{folder}')\"",
        )


def _cut_prompts(components: Components, tokens: int) -> None:
    """Let the tokenizers that have no length of their own cut prompts; files keep it.

    Raises:
        InputError: There is none, or prompts of so many tokens hold no word or do not fit.
    """
    limits = components.family.max_tokens
    if not limits:
        raise InputError(
            f"text encoders of {components.family.title} have a fixed length of prompts",
            where="checkpoint.prompt_tokens",
            fix="leave it out",
        )
    for name in limits.keys() & components.tokenizers.keys():
        most = components.prompt_length(name)
        if not 3 <= tokens <= most:
            raise InputError(
                f"prompts have 3 to {most} tokens here, got {tokens}",
                where="checkpoint.prompt_tokens",
                fix=f"checkpoint.prompt_tokens={most}, or null for the same",
            )
        components.tokenizers[name].model_max_length = tokens


def _switches_of(family: Family, home: Path) -> dict[str, bool]:
    """The family's switches that a folder's ``model_index.json`` sets otherwise; data alone.

    Raises:
        InputError: The file is damaged.
    """
    path = home / "model_index.json"
    if not family.switches or not path.is_file():
        return {}
    with blamed(f"{path} is damaged", str(path)):
        held = dict(json.loads(path.read_text("utf-8")))
    return {
        name: held[name]
        for name, usual in family.switches.items()
        if held.get(name, usual) is (not usual)
    }


def _loading(fails: str, home: Path, component: Component) -> AbstractContextManager[None]:
    """Blame the files of a component for what is raised while it loads."""
    file = "config.json"
    if component.startswith("tokenizer"):
        file = "tokenizer.json, tokenizer_config.json, vocab.json, merges.txt"
    if component == "scheduler":
        file = "scheduler_config.json"
    fix = "get it again: the folder is damaged or not one of this family"
    return blamed(f"{fails}, its {component} fails", f"{home}/{component}/{file}", fix)
