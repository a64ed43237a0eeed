"""Turn pickled weights into safetensors.

``python -m dori_lightning.models.convert INPUT OUTPUT.safetensors``

Only tensors are unpickled (``weights_only=True``). Other objects in a training's checkpoint, such
as Lightning's callbacks, are dropped: nothing of theirs is imported or called, and an empty
object takes the place of each.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dori_lightning.runtime.artifacts import partial_file
from dori_lightning.types import InputError, first_line

_STATES = ("state_dict", "model", "module", "params", "params_ema")
"""Keys under which trainings keep the weights, the best first."""

_PARTS = ("unet", "vae", "text_encoder", "modifier_token")
"""Keys under which the deltas of Concept Ablation and Custom Diffusion keep those of each part."""

_HARMLESS = {
    "int", "float", "bool", "str", "bytes", "bytearray", "complex", "list", "tuple", "dict",
    "set", "frozenset", "slice", "range", "object", "type",
}  # fmt: skip
"""Built-in types, which a training may leave; no other built-in belongs into a checkpoint."""

_DANGEROUS = (
    "builtins", "os", "posix", "nt", "sys", "subprocess", "pty", "shutil", "socket", "importlib",
    "runpy", "ctypes", "code", "codeop", "commands", "webbrowser", "pickle", "marshal", "types",
    "operator", "asyncio", "multiprocessing", "urllib", "http", "requests", "tempfile", "signal",
)  # fmt: skip
"""Modules whose functions no training leaves in a checkpoint; an attack would."""


@dataclass(frozen=True)
class Converted:
    """What became of a pickle.

    Attributes:
        tensors: Number of tensors that were written.
        dropped: What else the file held at its top level, by key.
    """

    tensors: int
    dropped: tuple[str, ...]


class _Dropped:
    """What takes the place of every object that is no tensor; it does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "_Dropped":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """What takes the place of a ``defaultdict``, which is filled where it is read."""
    return {}


def convert(source: Path, target: Path) -> Converted:
    """Write the tensors of a pickled state dict as safetensors.

    The state dict may lie under ``state_dict`` or another usual key; of the deltas of Concept
    Ablation, which have one for each part, names begin with the part (``unet.``).

    Raises:
        InputError: The file is missing, asks for code that no training leaves, or holds no
            tensors.
    """
    held = _unpickled(source)
    tensors = {
        name: tensor.detach().contiguous().clone() for name, tensor in _weights(held).items()
    }
    if not tensors:
        raise InputError(f"{source} holds no tensors")
    with partial_file(target) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(target)
    used = {key for key in (*_STATES, *_PARTS) if key in held}
    dropped = tuple(str(k) for k in held if k not in used and k not in tensors) if held else ()
    return Converted(len(tensors), dropped)


def _unpickled(source: Path) -> Mapping[Any, Any]:
    """The dictionary in a file, with empty objects in place of all that are no tensors.

    Raises:
        InputError: It is missing, no such file, or asks for code.
    """
    if not source.is_file():
        raise InputError(f"{source} does not exist")
    try:
        others = get_unsafe_globals_in_checkpoint(str(source))
    except Exception:  # of torch's older format: then it must hold tensors alone
        others = []
    code = [name for name in others if _is_code(name)]
    if code:
        raise InputError(
            f"{source} is not a plain file of tensors and is refused: it asks for "
            f"{', '.join(sorted(code))}, which no training leaves in a checkpoint",
            fix="do not open it with anything else either, and tell whoever published it",
        )
    try:
        stand_ins = {"collections.defaultdict": _plain_dict}
        with safe_globals([(stand_ins.get(name, _Dropped), name) for name in others]):
            held = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{source} is not a plain file of tensors and is refused: {first_line(error)}",
            fix="load it where you trust it, and save its state_dict() alone",
        ) from error
    return held if isinstance(held, dict) else {}


def _is_code(name: str) -> bool:
    """Whether a name in a pickle is of a module that runs programs or code."""
    module, _, rest = name.partition(".")
    return module in _DANGEROUS and not (module == "builtins" and rest in _HARMLESS)


def _weights(held: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint by name."""
    inner = next((held[key] for key in _STATES if isinstance(held.get(key), dict)), held)
    return dict(_named(inner))


def _named(held: Mapping[Any, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in held.items():
        if isinstance(value, torch.Tensor):
            yield str(key), value
        elif key in _PARTS and isinstance(value, dict):
            for name, tensor in value.items():
                if isinstance(tensor, torch.Tensor):
                    yield f"{key}.{name}", tensor


def main(arguments: list[str]) -> int:
    """Convert as the command line says, and tell what was written; returns the exit code."""
    if len(arguments) != 2:
        sys.stderr.write(
            "usage: python -m dori_lightning.models.convert INPUT OUTPUT.safetensors\n"
        )
        return 2
    try:
        made = convert(Path(arguments[0]), Path(arguments[1]))
    except InputError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return 2
    sys.stdout.write(f"tensors written to {arguments[1]}: {made.tensors}\n")
    if made.dropped:
        sys.stdout.write(f"left out: {', '.join(made.dropped)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
