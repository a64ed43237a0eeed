"""Tensors of a checkpoint's parts out of files, under every name that programs give them.

A file may hold a whole part or some of its tensors, under the names of diffusers, of the original
single files, or of the training scripts below. Libraries fill a missing tensor with random numbers
and drop one that they do not know, with a warning at most; an audit would then answer for weights
that nobody trained. Here every tensor is accounted for.

References for the names: ESD (esd_sd.py) and diffusers' scripts save diffusers' own; concept-prune
(save_union_over_time.py) a state dict of the UNet; ESD of 2023 and CompVis
``model.diffusion_model.*``; Concept Ablation (model_pipeline.py) ``{"unet": {...}}``, which
``models.convert`` writes as ``unet.*``; Custom Diffusion in diffusers
``*.attn2.processor.to_k_custom_diffusion.*``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from dori_lightning.models.original_layout import PREFIXES, Part, original_names
from dori_lightning.models.weight_files import WeightFile
from dori_lightning.types import InputError

PART_PREFIXES: Mapping[Part, tuple[str, ...]] = {
    "unet": (PREFIXES["unet"], "unet.", "diffusion_model."),
    "vae": (PREFIXES["vae"], "vae."),
    "text_encoder": (PREFIXES["text_encoder"], "text_encoder.", "conditioner.embedders.0."),
}
"""What names of each part begin with in a file of several parts."""

_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and ``torch.compile`` put before names."""

_BARE: Mapping[Part, re.Pattern[str]] = {
    "unet": re.compile(r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks)\."),
    "vae": re.compile(r"(encoder|decoder)\.(conv_in|mid|down|up|norm_out|conv_out)|quant_conv\."),
    "text_encoder": re.compile(r"text_model\.|embeddings\.token_embedding|encoder\.layers\."),
}
"""How names of each part begin where nothing is put before them."""

_BESIDES = re.compile(
    r"(.*position_ids|.*text_projection(\.weight)?|.*logit_scale|.*attn_mask|vision_model\..*"
    r"|visual(_projection)?\..*|loss\..*|model_ema\..*|modifier_token\..*|embed|v_pred|ztsnr"
    r"|global_step|logvar|scale_factor|edm_.*|.*alphas.*|betas|posterior_.*)"
)
"""Tensors that lie beside a part's weights in files of CompVis, CLIP and their trainings."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in the autoencoder's attention before diffusers 0.18, and those since."""

_NAMED = 5
"""Names that a message gives of each kind."""


def empty_part(part: Part, folder: Path) -> nn.Module:
    """A part as its configuration in a diffusers folder says, without values of its weights."""
    with init_empty_weights(include_buffers=False):
        if part == "text_encoder":
            settings = CLIPTextConfig.from_pretrained(
                folder, subfolder=part, local_files_only=True
            )
            # said here, or the folder could name a kernel that is fetched and run
            settings._attn_implementation = "sdpa"
            encoder: nn.Module = CLIPTextModel(settings)
            return encoder.eval()
        kind = UNet2DConditionModel if part == "unet" else AutoencoderKL
        config = kind.load_config(str(folder), subfolder=part, local_files_only=True)
        made: nn.Module = kind.from_config(config)
        return made.eval()


def take_tensors(
    part: Part,
    module: nn.Module,
    files: Sequence[WeightFile],
    *,
    whole: bool,
    below: tuple[str, ...] = ("",),
    what: str,
    where: str,
    fix: str,
) -> dict[str, Tensor]:
    """Read a part's tensors out of files, in fp32 and by the part's own names.

    Args:
        part: Which one.
        module: The part, with its ``config``; says which tensors there are and their shapes.
        files: Where they are.
        whole: Whether all of them must be there; otherwise those that are must be finite, too.
        below: Only names in the files that begin with one of these are looked at.
        what: What cannot be done, for the message.
        where: Files, for the message.
        fix: How to mend it, for the message.

    Raises:
        InputError: Tensors are missing, unexpected, of another shape, there twice, or no finite
            numbers; counts each kind and names the first of it.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    original = _original(part, module, list(shapes))
    places = _places(part, list(shapes)) | original
    given: dict[str, Tensor] = {}
    unexpected, misshapen, twice, broken = list[str](), list[str](), list[str](), list[str]()
    lost = set(shapes)
    for file in files:
        names = [name for name in file.names if name.startswith(below)]
        known = {name: places[bare] for name in names if (bare := _bare(part, name)) in places}
        unexpected += [n for n in names if n not in known and not _lies_besides(part, module, n)]
        for name, tensor in file.tensors(known):
            pieces = tensor.chunk(len(known[name])) if tensor.dim() else (tensor,)
            for place, piece in zip(known[name], pieces, strict=False):
                lost.discard(place)
                fits = _in_shape(piece, shapes[place])
                if fits is None:
                    size, wanted = _size(tuple(piece.shape)), _size(shapes[place])
                    misshapen.append(f"{name} {size} instead of {wanted}")
                elif place in given:
                    twice.append(name)
                elif not whole and not fits.isfinite().all():
                    broken.append(name)
                else:
                    given[place] = fits
    # what they are called in a file of several parts
    named = {own: f"{below[0]}{name}" for name, owns in original.items() for own in owns}
    called = named if below[0] else {}
    missing = [called.get(name, name) for name in shapes if name in lost] if whole else []
    kinds = (
        (missing, f"of {len(shapes)} are missing"),
        (unexpected, "are unexpected"),
        (misshapen, "have another shape or type"),
        (twice, "are there twice"),
        (broken, "are no finite numbers"),
    )
    found = [f"{len(names)} {kind} ({first_names(names)})" for names, kind in kinds if names]
    if found or not given:
        found = found or ["none is known"]
        raise InputError(f"{what}: of its tensors {'; '.join(found)}", where=where, fix=fix)
    return given


def parts_in(names: Iterable[str]) -> list[Part]:
    """Parts of which a file holds tensors, by their names."""
    names = list(names)
    return [
        part
        for part, prefixes in PART_PREFIXES.items()
        if any(name.startswith(prefixes) or _BARE[part].match(name) for name in names)
    ]


def _original(part: Part, module: nn.Module, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Names in the original layout to the part's own; none where it has no place for the part."""
    try:
        return original_names(part, names, open_clip=_is_open_clip(part, module))
    except ValueError:
        return {}


def _is_open_clip(part: Part, module: nn.Module) -> bool:
    config: Any = module.config
    return part == "text_encoder" and config.hidden_act == "gelu"


def _places(part: Part, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Known names of tensors to the part's own, besides those of the original layout."""
    places: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    for name in names:
        places.update((alias, (name,)) for alias in _further_names(part, name))
    return places


def _further_names(part: Part, name: str) -> Iterator[str]:
    """What training scripts and older versions call a tensor."""
    if part == "text_encoder":
        bare = name.removeprefix("text_model.")
        yield from (f"{before}{bare}" for before in ("", "text_model.", "transformer."))
    elif part == "unet":
        found = re.fullmatch(r"(.*\.attn2)\.to_(q|k|v|out)\.(.*)", name)
        if found:
            yield f"{found[1]}.processor.to_{found[2]}_custom_diffusion.{found[3]}"
    else:
        for old, new in _OLD_ATTENTION.items():
            if f".{new}." in name:
                yield name.replace(f".{new}.", f".{old}.")


def _bare(part: Part, name: str) -> str:
    """A name without what wrappers and whole checkpoints put before it."""
    for before in (*_WRAPPERS, *PART_PREFIXES[part], *_WRAPPERS):
        name = name.removeprefix(before)
    return name


def _lies_besides(part: Part, module: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to another part of a whole checkpoint, or to none."""
    others = [p for other, ps in PART_PREFIXES.items() if other != part for p in ps]
    bare = _bare(part, name)
    if _is_open_clip(part, module):
        config: Any = module.config
        # files of version 2 hold the layer after the last one that is used
        others.append(f"model.transformer.resblocks.{config.num_hidden_layers}.")
    return bare.startswith(tuple(others)) or _BESIDES.fullmatch(bare) is not None


def _in_shape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A tensor in fp32 in a shape from which its own may differ by axes of one element."""
    short, long = sorted((tuple(tensor.shape), shape), key=len)
    if not tensor.is_floating_point() or (*short, *[1] * (len(long) - len(short))) != long:
        return None
    return tensor.float().reshape(shape)


def first_names(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
