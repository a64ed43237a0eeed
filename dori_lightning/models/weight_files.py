"""Files and folders of weights: what they are by their content, whatever they are called.

Nothing here unpickles anything or needs a model.

Reference: format of safetensors, https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dori_lightning.models.components import Component, Family, stem
from dori_lightning.types import InputError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")

_SUFFIX = ".safetensors"
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_ADAPTER = re.compile(r"(^|[._])(lora|lycoris|hada|lokr|oft|boft|dora)(?=[._])|\.diff(_b)?$")
_MARKS = {
    "sdxl": ("Stable Diffusion XL", "conditioner.embedders.1."),
    "sd3": ("Stable Diffusion 3", "model.diffusion_model.joint_blocks."),
    "flux": ("FLUX", "double_blocks."),
}
"""Families by their names, with what names of tensors tell a single file of one."""


@dataclass(frozen=True)
class PredictionNote:
    """What a file says that a UNet predicts.

    Attributes:
        path: The file.
        kind: ``epsilon`` or ``v_prediction``.
        words: The note itself.
    """

    path: Path
    kind: str
    words: str


@dataclass(frozen=True)
class WeightFile:
    """The header of a safetensors file.

    Attributes:
        path: Where it is.
        names: Names of its tensors.
        notes: What its maker wrote into the header, such as ``modelspec.architecture``.
    """

    path: Path
    names: tuple[str, ...]
    notes: Mapping[str, str]

    @classmethod
    def open(cls, path: Path, *, adapter: bool = False) -> "WeightFile":
        """Read a header.

        Args:
            path: The file.
            adapter: Whether it is to be an adapter, which is refused otherwise.

        Raises:
            InputError: The file is something else, damaged, an adapter, or of another family of
                models; says what, and how to mend it.
        """
        _refuse_other_content(path)
        try:
            with safe_open(path, framework="pt") as file:
                names, notes = tuple(file.keys()), dict(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is no safetensors file, whatever its name, or damaged: {error}",
                fix="get it again",
            ) from error
        if not adapter:
            _refuse_adapters(path, names, notes)
        return cls(path, names, notes)

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Some tensors with their names, on the CPU and in the dtype of the file."""
        with safe_open(self.path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)

    def sha256(self) -> str:
        """SHA-256 of the file, as ``sha256sum`` prints it."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def check_family(self, wanted: Family) -> None:
        """Refuse a file of another family.

        Raises:
            InputError: Names the family that it is of.
        """
        for name, (title, mark) in _MARKS.items():
            if name != wanted.name and any(
                tensor.startswith(mark) or f".{mark}" in tensor for tensor in self.names
            ):
                raise InputError(
                    f"{self.path} is of the family {title} (it has tensors {mark}*), not of "
                    f"{wanted.title}",
                    where="checkpoint.family",
                    fix=f"checkpoint.family={name}, if this program has it",
                )

    @property
    def prediction_note(self) -> PredictionNote | None:
        """What the file notes of its prediction type; None where it notes nothing."""
        noted = self.notes.get("modelspec.prediction_type", "").lower()
        if noted in ("v", "v_prediction", "epsilon"):
            kind = "epsilon" if noted == "epsilon" else "v_prediction"
            return PredictionNote(self.path, kind, f"modelspec.prediction_type {noted!r}")
        if "v_pred" in self.names:
            return PredictionNote(self.path, "v_prediction", "a tensor 'v_pred'")
        architecture = self.notes.get("modelspec.architecture", "")
        if architecture.startswith("stable-diffusion-v2-768-v"):
            return PredictionNote(
                self.path, "v_prediction", f"modelspec.architecture {architecture!r}"
            )
        return None


def _refuse_other_content(path: Path) -> None:
    """Refuse what is no safetensors file by its first bytes and its size.

    Raises:
        InputError: Says what it is.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            length = int.from_bytes(start[:8], "little")
            if size > 8 and start[8:9] == b"{" and 8 + length <= size:
                file.seek(8)
                ends = _ends(file.read(length))
            else:
                ends = []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    again = "get it again"
    begins = start.lstrip().lower()
    if not size:
        raise InputError(f"{path} is empty", fix=again)
    if start.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path} is a git-lfs pointer of {size} bytes, not the weights that it points to",
            fix="fetch them with: git lfs pull",
        )
    if begins.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(
            f"{path} is a web page, not weights",
            fix="download the file itself; the page may have asked for a login, or its address "
            "was that of a page (/blob/ instead of /resolve/)",
        )
    # a header of 1,152 bytes also begins as a pickle does
    if not ends and start.startswith(
        (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    ):
        raise InputError(pickle_message(path))
    if start.startswith(b"GGUF"):
        raise InputError(
            f"{path} is a GGUF file, whose weights are rounded to a few bits",
            fix="get the .safetensors file that it was made from",
        )
    if start[8:9] == b"{" and not (ends and max(ends) + 8 + length == size):
        missing = f" of {max(ends) + 8 + length:,}" if ends else ""
        raise InputError(
            f"{path} is cut off or damaged: it has {size:,}{missing} bytes", fix=again
        )


def _ends(header: bytes) -> list[int]:
    """Where each tensor of a header ends; empty where the header cannot be read."""
    try:
        fields = json.loads(header)
        return [0, *(int(v["data_offsets"][1]) for k, v in fields.items() if k != "__metadata__")]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return []


def _refuse_adapters(path: Path, names: Sequence[str], notes: Mapping[str, str]) -> None:
    """Refuse weights that belong beside a checkpoint.

    Raises:
        InputError: Says what it is.
    """
    adapters = [name for name in names if _ADAPTER.search(name)]
    if adapters:
        raise InputError(
            f"{path} is a LoRA or a similar adapter ({len(adapters)} of its {len(names)} tensors, "
            f"such as {adapters[0]}), which holds no weights of its own",
            fix=f"name the checkpoint that it was trained on, and this as its LoRA: "
            f"checkpoint.source=BASE checkpoint.lora={path}",
        )
    if {"layout", "kind", "identity", "origin"} <= notes.keys():
        raise InputError(
            f"{path} is an edit of this program, which says what changes and is no checkpoint",
            fix=f"write the edited checkpoint with: task=export task.edit={path}",
        )


def pickle_message(path: Path) -> str:
    """What to say of a pickle: how it is converted."""
    return (
        f"{path} is a pickle: opening it could run code, so it is refused. Convert it once, in a "
        f"sandbox if you do not trust it, with: "
        f"python -m dori_lightning.models.convert {path} OUTPUT.safetensors"
    )


def is_weight_file(path: Path) -> bool:
    """Whether a file is called one of safetensors, in any case."""
    return path.suffix.lower() == _SUFFIX and path.is_file()


def variants(folder: Path, component: Component) -> dict[str, list[Path]]:
    """Weights in a component's folder by variant, such as ``fp16``; ``""`` for those without.

    Args:
        folder: Of the component.
        component: Which one; tells what diffusers calls its weights.
    """
    found: dict[str, list[Path]] = {}
    called = stem(component)
    for path in sorted(folder.glob(f"{called}*{_SUFFIX}")):
        rest = _SHARD.sub("", path.name.removeprefix(called).removesuffix(_SUFFIX))
        if rest == "" or rest.startswith("."):
            found.setdefault(rest.removeprefix("."), []).append(path)
    # shards before the whole, as diffusers takes them where there are both
    return {name: [p for p in own if _SHARD.search(p.name)] or own for name, own in found.items()}


def choose_variant(folder: Path, component: Component, wanted: str | None) -> str:
    """Which variant of a component's weights to load; ``""`` for the weights without one.

    Args:
        folder: Of the component.
        component: Which one; tells what diffusers calls its weights.
        wanted: None for the weights without a variant, or the only variant where there is one.

    Raises:
        InputError: There are no weights, not this variant, or several and none is wanted.
    """
    found = variants(folder, component)
    named = ", ".join(name or "weights without a variant" for name in found)
    if not found:
        raise _no_weights(folder, component)
    if wanted is not None and wanted not in found:
        raise InputError(
            f"{folder} has no {wanted} weights ({stem(component)}.{wanted}{_SUFFIX} is missing); "
            f"it has {named}",
            where="checkpoint.variant",
            fix="leave checkpoint.variant out, or name one that every component has",
        )
    if wanted is not None:
        return wanted
    if "" not in found and len(found) > 1:
        raise InputError(
            f"{folder} has several variants of its weights, {named}",
            where="checkpoint.variant",
            fix=f"choose one: checkpoint.variant={next(iter(found))}",
        )
    return "" if "" in found else next(iter(found))


def _no_weights(folder: Path, component: Component) -> InputError:
    """What to say of a component's folder without weights."""
    called, files = stem(component), sorted(folder.iterdir())
    pickled = next((path for path in files if path.suffix.lower() in PICKLES), None)
    if pickled is not None:
        return InputError(pickle_message(pickled))
    other = next((path for path in files if is_weight_file(path)), None)
    if other is not None:
        return InputError(
            f"{folder} holds no {called}{_SUFFIX}, but {other.name}",
            fix=f"rename it if these are its weights: mv {other} {folder / called}{_SUFFIX}",
        )
    return InputError(f"{folder} holds no weights ({called}{_SUFFIX} is missing)")


def shipped_folder(source: str) -> Path | None:
    """Folder of what a source calls ``package:NAME``; None of other sources.

    Raises:
        InputError: This package ships no such checkpoint.
    """
    if not source.startswith("package:"):
        return None
    assets = Path(str(resources.files("dori_lightning"))) / "assets"
    folder = assets / source.removeprefix("package:")
    if not (folder / "unet").is_dir() and not (folder / "transformer").is_dir():
        raise InputError(
            f"checkpoint {source} is not installed at {folder}; reinstall the package or "
            f"plant it anew with: python -m dori_lightning task=plant"
        )
    return folder


def find_weights(source: Path, component: Component) -> list[Path]:
    """Files with the weights of one component.

    Args:
        source: The file itself, the component's folder, or a folder that holds one of its name.
        component: ``unet``, ``vae`` or ``text_encoder``.

    Raises:
        InputError: Nothing is there, or no weights, or weights of several kinds.
    """
    if source.suffix.lower() in PICKLES:
        raise InputError(pickle_message(source))
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(
            f"checkpoint.{component}={source} does not exist",
            fix="give a .safetensors file, or a folder with one; of a hub id, the folder that "
            "'hf download' prints",
        )
    folder = component_folder(source, component)
    found = variants(folder, component)
    if found:
        return found[choose_variant(folder, component, None)]
    files = [path for path in sorted(folder.iterdir()) if is_weight_file(path)]
    if len(files) > 1:
        raise InputError(
            f"{folder} holds {len(files)} weight files, none of them called "
            f"{stem(component)}{_SUFFIX}: {', '.join(path.name for path in files[:5])}",
            where=f"checkpoint.{component}",
            fix="give the file itself",
        )
    if not files:
        raise _no_weights(folder, component)
    return files


def component_folder(source: Path, component: Component) -> Path:
    """The folder of a component: itself, or the one of the component's name in it."""
    return source / component if (source / component).is_dir() else source


def explain_folder(folder: Path, family: Family) -> InputError:
    """What to say of a folder that is no checkpoint of a family, by what it is instead."""
    for above in ("snapshots/*", "*", "models--*/snapshots/*"):
        inside = _newest(folder.glob(f"{above}/{family.denoiser}/config.json"))
        if inside is not None:
            cached = "snapshots" in above
            return InputError(
                f"{folder} is {'a folder of the hub cache' if cached else 'no checkpoint'}, but "
                f"holds one",
                where="checkpoint.source",
                fix=f"checkpoint.source={inside.parent.parent}",
            )
    component = _component_of(folder, family)
    if component is not None:
        return InputError(
            f"{folder} is a {component} alone, no whole checkpoint",
            where="checkpoint.source",
            fix=f"name the checkpoint that it belongs to, and this as its component: "
            f"checkpoint.source=BASE checkpoint.{component}={folder}",
        )
    held = [name for name in family.modules if _holds_weights(folder / name)]
    if held and not any((folder / name).is_dir() for name in ("tokenizer", "scheduler")):
        given = " ".join(f"checkpoint.{name}={folder / name}" for name in held)
        return InputError(
            f"{folder} holds only {', '.join(held)} of a checkpoint",
            where="checkpoint.source",
            fix=f"name the checkpoint that it belongs to: checkpoint.source=BASE {given}",
        )
    files = [path for path in sorted(folder.iterdir()) if is_weight_file(path)]
    if files:
        return InputError(
            f"{folder} is no diffusers folder, but holds "
            f"{'a single file' if len(files) == 1 else f'{len(files)} single files'}",
            where="checkpoint.source",
            fix=f"checkpoint.source={files[0]} checkpoint.config=FOLDER_OF_THE_SAME_ARCHITECTURE",
        )
    pickled = next(
        (path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICKLES), None
    )
    if pickled is not None:
        return InputError(pickle_message(pickled))
    missing = [name for name in family.modules if not (folder / name / "config.json").is_file()]
    return InputError(
        f"{folder} is not a diffusers folder of {family.title}: "
        f"{missing[0] if missing else family.denoiser}/config.json is missing"
    )


def _holds_weights(folder: Path) -> bool:
    return folder.is_dir() and any(is_weight_file(path) for path in folder.iterdir())


def class_name(folder: Path, file: str = "config.json") -> str | None:
    """Class that a component's configuration names, as data; None where it names none."""
    try:
        held = json.loads((folder / file).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(held, dict):
        return None
    named = [held.get("_class_name"), *(held.get("architectures") or [])]
    return next((str(name) for name in named if name), None)


def _component_of(folder: Path, family: Family) -> Component | None:
    """Which component a folder is, by the class that its configuration names."""
    classes = {kind.__name__: name for name, kind in reversed([*family.modules.items()])}
    return classes.get(class_name(folder) or "")


def _newest(paths: Iterable[Path]) -> Path | None:
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)
