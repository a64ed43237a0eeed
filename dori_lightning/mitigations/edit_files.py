"""Edits as safetensors files: nothing in them is executed, and damaged ones are noticed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dori_lightning.files import write_atomically
from dori_lightning.mitigations.edits import (
    Edit,
    MaskEdit,
    Origin,
    PairMaskEdit,
    WeightEdit,
)
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["is_writable", "read_edit", "write_edit"]

LAYOUT = "1"

_LARGEST = 2**31
"""Elements of a mask, at most: a damaged shape must not ask for all memory."""


def write_edit(path: Path, edit: Edit) -> Path:
    """Write an edit; masks are kept as the flat places of what is pruned.

    Args:
        path: Where to, ``.safetensors``.
        edit: A mask, per-pair mask or weight edit.

    Raises:
        TypeError: It is of another kind, which has nothing to write.
    """
    shapes: dict[str, list[int]] = {}
    if isinstance(edit, MaskEdit):
        kind, tensors = "mask", _places(edit.masks, shapes, "")
    elif isinstance(edit, PairMaskEdit):
        kind, tensors = "pair_mask", {}
        for pair, own in edit.masks.items():
            tensors.update(_places(own, shapes, f"{pair}|"))
    elif isinstance(edit, WeightEdit):
        kind = "weights"
        tensors = {name: w.detach().cpu().contiguous() for name, w in edit.weights.items()}
    else:
        raise TypeError(f"{type(edit).__name__} has nothing to write")
    note = {
        "layout": LAYOUT,
        "kind": kind,
        "identity": edit.identity,
        "origin": json.dumps(asdict(edit.origin)),
        "shapes": json.dumps(shapes),
        "pairs": json.dumps(list(edit.masks) if isinstance(edit, PairMaskEdit) else []),
    }
    return write_atomically(path, save(tensors, metadata=note))


def read_edit(path: Path) -> Edit:
    """Read an edit that ``write_edit`` wrote.

    Raises:
        InputError: There is no such file, or it is damaged or of another layout.
    """
    try:
        data = path.read_bytes()  # not mapped: a file cut by another process would kill this one
    except OSError as error:
        raise InputError(f"cannot read the edit {path}: {error.strerror or error}") from error
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        note = header.get("__metadata__", {})
        if "layout" not in note:
            raise ValueError("it holds tensors, but does not say of which edit")
        if note["layout"] != LAYOUT:
            raise ValueError(f"its layout is {note['layout']}, not {LAYOUT}")
        edit = _edit(note, tensors)
        if edit.identity != note["identity"]:
            raise ValueError("its content does not fit the hash in it")
    except (LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{path} is no edit of this program, or damaged: {error}\n"
            f"  mend:  remove it, it will be computed again"
        ) from error
    return edit


def _edit(note: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Edit:
    origin = Origin(**json.loads(note["origin"]))
    shapes: dict[str, list[int]] = json.loads(note["shapes"])
    if note["kind"] == "weights":
        return WeightEdit(origin, {name: value.clone() for name, value in tensors.items()})
    masks = {}
    for name, places in tensors.items():
        if math.prod(shapes[name]) > _LARGEST:
            raise ValueError(f"a mask of shape {tuple(shapes[name])} is no model's")
        mask = torch.zeros(shapes[name], dtype=torch.bool)
        mask.view(-1)[places.long()] = True
        masks[name] = mask
    if note["kind"] == "mask":
        return MaskEdit(origin, masks)
    if note["kind"] != "pair_mask":
        raise ValueError(f"unknown kind {note['kind']!r}")
    own: dict[str, dict[str, Any]] = {pair: {} for pair in json.loads(note["pairs"])}
    for name, mask in masks.items():
        pair, _, parameter = name.partition("|")
        own[pair][parameter] = mask
    return PairMaskEdit(origin, own)


def _places(
    masks: Mapping[str, torch.Tensor], shapes: dict[str, list[int]], prefix: str
) -> dict[str, torch.Tensor]:
    found = {}
    for name, mask in masks.items():
        shapes[prefix + name] = list(mask.shape)
        found[prefix + name] = mask.flatten().nonzero()[:, 0].to(torch.int32).cpu()
    return found


def is_writable(edit: Edit) -> bool:
    """Whether an edit has something to write; others are cheap to make again."""
    return isinstance(edit, MaskEdit | PairMaskEdit | WeightEdit)
