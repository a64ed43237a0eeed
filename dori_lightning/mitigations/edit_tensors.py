"""The tensors of an edit: named by their content, and checked against what they change."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from dori_lightning.models.protocol import TextToImage

__all__ = ["check_masks", "content_hash", "parameters_of"]


def content_hash(
    kind: str,
    fingerprint: str,
    tensors: Mapping[str, torch.Tensor],
    names: Sequence[str] = (),
) -> str:
    """Hash of an edit's content.

    Args:
        kind: Kind of edit.
        fingerprint: Of the checkpoint it is for.
        tensors: What it consists of, by name.
        names: What else decides what the edit does.
    """
    digest = hashlib.sha256("|".join([kind, fingerprint, *names]).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        # flat, because a single number cannot be viewed as bytes
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def check_masks(masks: Mapping[str, torch.Tensor]) -> None:
    """Refuse masks that are not boolean: written and read again they would be another edit.

    Raises:
        TypeError: Names the first.
    """
    for name, mask in masks.items():
        if mask.dtype is not torch.bool:
            raise TypeError(f"masks are boolean, that of {name} is {mask.dtype}")


def parameters_of(
    model: TextToImage, tensors: Mapping[str, torch.Tensor], *, rows: bool = False
) -> dict[str, nn.Parameter]:
    """Parameters of the denoiser that an edit's tensors belong to.

    Args:
        model: Whose denoiser.
        tensors: Parameter name to a tensor of the parameter's shape.
        rows: Whether a tensor may also have one element per output row, (C_out,).

    Raises:
        InputError: The denoiser has no parameter of a name, or one of another shape.
    """
    known = dict(model.denoiser().named_parameters())
    found = {}
    for name, tensor in tensors.items():
        if name not in known:
            raise InputError(f"the edit changes {name}, which {model.name} does not have")
        shape = known[name].shape
        if tensor.shape != shape and not (rows and tensor.shape == shape[:1]):
            raise InputError(
                f"the edit has shape {tuple(tensor.shape)} for {name}, but {model.name} has "
                f"{tuple(shape)} there"
            )
        found[name] = known[name]
    return found
