"""Whether a file holds the tensors that its configuration asks for: read from headers, exactly.

Libraries fill a missing tensor with random numbers and drop one that they do not know, with a
warning at most; an audit would then answer for weights that nobody trained.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from dori_lightning.models.original_layout import (
    PREFIXES,
    Part,
    is_original_convolution,
    original_names,
)
from dori_lightning.models.weight_files import WeightFile
from dori_lightning.types import InputError

Shape = tuple[int, ...]

_NAMED = 5
"""Names that a message gives of each kind."""

_EXTRAS: Mapping[Part, re.Pattern[str]] = {
    "unet": re.compile("(?!)"),
    # the discriminator and the averaged weights of its training
    "vae": re.compile(r"(loss|model_ema)\."),
    # of the whole CLIP model; the embeddings that are returned use none of them
    "text_encoder": re.compile(
        r"(.*\.)?(position_ids|logit_scale|text_projection(\.weight)?|attn_mask)$"
        r"|(vision_model|visual|visual_projection)\."
    ),
}
"""Names of tensors that files of a part may hold besides its own, from their beginning."""

_OTHER_ENCODER = "conditioner.embedders.0."
"""What the text encoder's names begin with in files of later programs."""

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in the autoencoder's attention before diffusers 0.18, and those since."""


def empty_part(part: Part, config: str, **options: Any) -> nn.Module:
    """A part with the shapes of its configuration and no values.

    Args:
        part: Which one.
        config: Diffusers folder or hub id.
        **options: For the libraries: ``local_files_only``, ``revision``.
    """
    with torch.device("meta"):
        if part == "text_encoder":
            settings = CLIPTextConfig.from_pretrained(config, subfolder=part, **options)
            # said here, or the folder could name a kernel that is fetched and run
            settings._attn_implementation = "sdpa"
            return CLIPTextModel(settings)
        kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
        made: nn.Module = kind.from_config(kind.load_config(config, subfolder=part, **options))
        return made


def check_folder_tensors(part: Part, folder: Path, files: Sequence[Path]) -> None:
    """Refuse weights in the layout of diffusers and transformers that a part does not ask for.

    Args:
        part: Which one.
        folder: Diffusers folder with its configuration.
        files: Its weights.

    Raises:
        InputError: Tensors are missing, unexpected or of another shape; counts them and names the
            first of each.
    """
    expected = _shapes(empty_part(part, str(folder), local_files_only=True))
    found = {
        _current(part, name): shape
        for path in files
        for name, shape in WeightFile.open(path).shapes().items()
    }
    prefix = "text_model." if part == "text_encoder" else ""
    require_tensors(
        {name.removeprefix(prefix): shape for name, shape in expected.items()},
        {name.removeprefix(prefix): shape for name, shape in found.items()},
        part,
        what=f"checkpoint {folder} cannot be loaded",
        where=f"{', '.join(str(path) for path in files)}; {folder / part / 'config.json'}",
    )


def check_original_tensors(
    part: Part, weights: Mapping[str, Tensor], config: str, *, file: Path, **options: Any
) -> None:
    """Refuse a part of a single file in the original layout that its configuration does not fit.

    Args:
        part: Which one.
        weights: All tensors of the file.
        config: Diffusers folder or hub id with the configuration.
        file: For messages.
        **options: See ``empty_part``.

    Raises:
        InputError: See ``check_folder_tensors``.
    """
    empty: Any = empty_part(part, config, **options)
    shapes = _shapes(empty)
    open_clip = part == "text_encoder" and empty.config.hidden_act == "gelu"
    expected: dict[str, Shape] = {}
    for original, own in original_names(part, shapes, open_clip=open_clip).items():
        rows, *rest = shapes[own[0]]
        expected[original] = (rows * len(own), *rest)
    prefix = PREFIXES[part]
    found: dict[str, Shape] = {}
    for name, tensor in weights.items():
        if part == "text_encoder":
            name = name.replace(_OTHER_ENCODER, prefix, 1)
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = tuple(tensor.shape)
    if open_clip:  # files of version 2 hold the layer after the last one that is used
        layers = empty.config.num_hidden_layers
        unused = f"model.transformer.resblocks.{layers}."
        found = {name: shape for name, shape in found.items() if not name.startswith(unused)}
    for shapes in (expected, found):
        for name in shapes:
            if is_original_convolution(part, name):
                shapes[name] = shapes[name][:2]
    require_tensors(
        expected,
        found,
        part,
        prefix=prefix,
        what=f"{file} does not load with the configuration of {config}",
        where=f"{file}; {config}/{part}/config.json",
    )


def require_tensors(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    part: Part,
    *,
    what: str,
    where: str,
    prefix: str = "",
) -> None:
    """Refuse tensors that are missing, unexpected or of another shape.

    Args:
        expected: Shapes by name.
        found: Shapes by name.
        part: Whose; harmless extras of it are accepted.
        what: What cannot be done then, for the message.
        where: Files, for the message.
        prefix: What names in the message begin with.

    Raises:
        InputError: Counts each kind and names the first of it.
    """
    missing = [name for name in expected if name not in found]
    other = [n for n in found if n not in expected and not _EXTRAS[part].match(n)]
    wrong = [n for n, shape in expected.items() if found.get(n, shape) != shape]
    shapes = [f"{n} {_size(found[n])} instead of {_size(expected[n])}" for n in wrong]
    kinds = []
    for names, kind in (
        (missing, f"of {len(expected)} are missing"),
        (other, "are unexpected"),
        (shapes, "have another shape"),
    ):
        if names:
            kinds.append(f"{len(names)} {kind} ({first_names(names, prefix)})")
    if kinds:
        raise InputError(
            f"{what}: the tensors of its {part} are not those that its configuration asks for: "
            f"{'; '.join(kinds)}",
            where=where,
            fix="get both files of one checkpoint again; a converter that dropped or renamed "
            "tensors must be run again",
        )


def _shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _current(part: Part, name: str) -> str:
    """A tensor's name today, for one that had another in the autoencoder's attention."""
    if part != "vae":
        return name
    return re.sub(
        r"(?<=\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)",
        lambda match: OLD_ATTENTION[match[1]],
        name,
    )


def first_names(names: Iterable[str], prefix: str = "") -> str:
    """The first names of a list for a message, each with what it begins with in its file."""
    names = list(names)
    rest = ", ..." if len(names) > _NAMED else ""
    return ", ".join(prefix + name for name in names[:_NAMED]) + rest


def _size(shape: Shape) -> str:
    return " x ".join(map(str, shape)) or "a number"
