"""Tensors of a checkpoint's components out of files, under every name that programs give them.

A file may hold a whole component or some of its tensors, under the names of diffusers, of the
original single files, or of the training scripts below. Libraries fill a missing tensor with
random numbers and drop one that they do not know, with a warning at most; an audit would then
answer for weights that nobody trained. Here every tensor is accounted for.

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

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from dori_lightning.models.components import Component
from dori_lightning.models.original_layout import is_original_transposed, original_names
from dori_lightning.models.weight_files import WeightFile
from dori_lightning.types import InputError

COMPONENT_PREFIXES: Mapping[Component, tuple[str, ...]] = {
    "unet": ("model.diffusion_model.", "unet.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "text_encoder.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoder_2."),
}
"""What names of each component begin with in a file of several parts."""

_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and ``torch.compile`` put before names."""

_BARE: Mapping[Component, re.Pattern[str]] = {
    "unet": re.compile(r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks)\."),
    "vae": re.compile(r"(encoder|decoder)\.(conv_in|mid|down|up|norm_out|conv_out)|quant_conv\."),
    "text_encoder": re.compile(r"text_model\.|embeddings\.token_embedding|encoder\.layers\."),
}
"""How names of each component begin where nothing is put before them."""

_BESIDES = re.compile(
    r"(.*position_ids|.*text_projection(\.weight)?|.*logit_scale|.*attn_mask|vision_model\..*"
    r"|visual(_projection)?\..*|loss\..*|model_ema\..*|modifier_token\..*|embed|v_pred|ztsnr"
    r"|global_step|logvar|scale_factor|edm_.*|.*alphas.*|betas|posterior_.*)"
)
"""Tensors that lie beside a component's weights in files of CompVis, CLIP and their trainings."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in the autoencoder's attention before diffusers 0.18, and those since."""

_NAMED = 5
"""Names that a message gives of each kind."""


def empty_component(component: Component, kind: type[Any], folder: Path) -> nn.Module:
    """A component as its configuration in a diffusers folder says, without values of its weights.

    Args:
        component: Which one.
        kind: Its class, whatever the configuration names.
        folder: The folder.
    """
    with init_empty_weights(include_buffers=False):
        if issubclass(kind, PreTrainedModel):
            configuration: Any = kind.config_class
            settings = configuration.from_pretrained(
                folder, subfolder=component, local_files_only=True
            )
            # said here, or the folder could name a kernel that is fetched and run
            settings._attn_implementation = "sdpa"
            encoder: nn.Module = kind(settings)
            return encoder.eval()
        config = kind.load_config(str(folder), subfolder=component, local_files_only=True)
        made: nn.Module = kind.from_config(config)
        return made.eval()


def take_tensors(
    component: Component,
    module: nn.Module,
    files: Sequence[WeightFile],
    *,
    whole: bool,
    below: tuple[str, ...] = ("",),
    dtype: torch.dtype | None = torch.float32,
    what: str,
    where: str,
    fix: str,
) -> dict[str, Tensor]:
    """Read a component's tensors out of files, by the component's own names.

    Args:
        component: Which one.
        module: The component, with its ``config``; says which tensors there are and their shapes.
        files: Where they are.
        whole: Whether all of them must be there; otherwise those that are must be finite, too.
        below: Only names in the files that begin with one of these are looked at.
        dtype: What they are brought to; None leaves them as the files have them, where they take
            no memory of their own: they are the files' pages.
        what: What cannot be done, for the message.
        where: Files, for the message.
        fix: How to mend it, for the message.

    Raises:
        InputError: Tensors are missing, unexpected, of another shape, there twice, or no finite
            numbers; counts each kind and names the first of it.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    original = _original(component, module, list(shapes))
    places = _places(component, list(shapes)) | original
    given: dict[str, Tensor] = {}
    unexpected, misshapen, twice, broken = list[str](), list[str](), list[str](), list[str]()
    lost = set(shapes)
    for file in files:
        names = [name for name in file.names if name.startswith(below)]
        known = {
            name: places[bare] for name in names if (bare := _bare(component, name)) in places
        }
        unexpected += [
            n for n in names if n not in known and not _lies_besides(component, module, n)
        ]
        for name, tensor in file.tensors(known):
            if name not in shapes and is_original_transposed(name):
                tensor = tensor.T
            pieces = tensor.chunk(len(known[name])) if tensor.dim() else (tensor,)
            for place, piece in zip(known[name], pieces, strict=False):
                lost.discard(place)
                fits = _in_shape(piece, shapes[place], dtype)
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
    apart = _fill_tied(given, tied_names(module)) if whole else []
    missing = [called.get(n, n) for n in shapes if n in lost - given.keys()] if whole else []
    kinds = (
        (missing, f"of {len(shapes)} are missing"),
        (unexpected, "are unexpected"),
        (misshapen, "have another shape or type"),
        (twice, "are there twice"),
        (broken, "are no finite numbers"),
        (apart, "differ from the tensor that they are one with"),
    )
    found = [f"{len(names)} {kind} ({first_names(names)})" for names, kind in kinds if names]
    if found or not given:
        found = found or ["none is known"]
        raise InputError(f"{what}: of its tensors {'; '.join(found)}", where=where, fix=fix)
    return given


def tied_names(module: nn.Module) -> dict[str, str]:
    """Names of tensors that are another of the module's own, with the other's name."""
    return dict(getattr(module, "all_tied_weights_keys", None) or {})


def _fill_tied(given: dict[str, Tensor], tied: Mapping[str, str]) -> list[str]:
    """Give tied tensors that a file holds once their second name; returns those that differ."""
    apart = []
    for name, other in tied.items():
        own = given.get(name, given.get(other))
        if own is not None:
            given.setdefault(name, own)
            given.setdefault(other, own)
            if given[name] is not given[other] and not given[name].equal(given[other]):
                apart.append(name)
    return apart


def components_in(names: Iterable[str]) -> list[Component]:
    """Parts of which a file holds tensors, by their names."""
    names = list(names)
    return [
        component
        for component, prefixes in COMPONENT_PREFIXES.items()
        if any(
            name.startswith(prefixes) or (component in _BARE and _BARE[component].match(name))
            for name in names
        )
    ]


def _original(
    component: Component, module: nn.Module, names: list[str]
) -> dict[str, tuple[str, ...]]:
    """Names in the original layout to the component's own; none where that has no place for it."""
    try:
        return original_names(component, names, open_clip=is_open_clip(component, module))
    except ValueError:
        return {}


def is_open_clip(component: Component, module: nn.Module) -> bool:
    """Whether a component is a text encoder of OpenCLIP's: those have the exact GELU."""
    config: Any = module.config
    return component.startswith("text_encoder") and getattr(config, "hidden_act", None) == "gelu"


def _places(component: Component, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Known names of tensors to the component's own, besides those of the original layout."""
    places: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    for name in names:
        places.update((alias, (name,)) for alias in _further_names(component, name))
    return places


def _further_names(component: Component, name: str) -> Iterator[str]:
    """What training scripts and older versions call a tensor."""
    if component.startswith("text_encoder"):
        bare = name.removeprefix("text_model.")
        yield from (f"{before}{bare}" for before in ("", "text_model.", "transformer."))
    elif component == "unet":
        found = re.fullmatch(r"(.*\.attn2)\.to_(q|k|v|out)\.(.*)", name)
        if found:
            yield f"{found[1]}.processor.to_{found[2]}_custom_diffusion.{found[3]}"
    else:
        for old, new in _OLD_ATTENTION.items():
            if f".{new}." in name:
                yield name.replace(f".{new}.", f".{old}.")


def _bare(component: Component, name: str) -> str:
    """A name without what wrappers and whole checkpoints put before it."""
    for before in (*_WRAPPERS, *COMPONENT_PREFIXES.get(component, (f"{component}.",)), *_WRAPPERS):
        name = name.removeprefix(before)
    return name


def _lies_besides(component: Component, module: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to another component of a whole checkpoint, or to none."""
    others = [p for other, ps in COMPONENT_PREFIXES.items() if other != component for p in ps]
    bare = _bare(component, name)
    if is_open_clip(component, module):
        config: Any = module.config
        # files of version 2 hold the layer after the last one that is used
        others.append(f"model.transformer.resblocks.{config.num_hidden_layers}.")
    return bare.startswith(tuple(others)) or _BESIDES.fullmatch(bare) is not None


def _in_shape(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor | None:
    """A tensor in a dtype and a shape from which its own may differ by axes of one element."""
    short, long = sorted((tuple(tensor.shape), shape), key=len)
    if not tensor.is_floating_point() or (*short, *[1] * (len(long) - len(short))) != long:
        return None
    return (tensor if dtype is None else tensor.to(dtype)).reshape(shape)


def first_names(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
