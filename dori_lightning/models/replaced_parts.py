"""Parts of a checkpoint out of other files: a mended UNet on the base that it was made from.

A file may hold a whole part or some of its tensors, under the names of diffusers, of the original
single files, or of the training scripts below; what it does not hold stays the base's.

References for the names: ESD (esd_sd.py) and diffusers' scripts save diffusers' own; concept-prune
(save_union_over_time.py) a state dict of the UNet; ESD of 2023 and CompVis
``model.diffusion_model.*``; Concept Ablation (model_pipeline.py) ``{"unet": {...}}``, which
``models.convert`` writes as ``unet.*``; Custom Diffusion in diffusers
``*.attn2.processor.to_k_custom_diffusion.*``.
"""

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dori_lightning.models.fingerprint import plain_value
from dori_lightning.models.original_layout import PREFIXES, Part, original_names
from dori_lightning.models.tensors import OLD_ATTENTION, first_names
from dori_lightning.models.weight_files import (
    PredictionNote,
    WeightFile,
    find_weights,
    part_folder,
    shipped_folder,
)
from dori_lightning.types import InputError, ReplacedPart

log = logging.getLogger(__name__)

_PART_PREFIXES: Mapping[Part, tuple[str, ...]] = {
    "unet": ("unet.", PREFIXES["unet"], "diffusion_model."),
    "vae": ("vae.", PREFIXES["vae"]),
    "text_encoder": ("text_encoder.", PREFIXES["text_encoder"], "conditioner.embedders.0."),
}
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and ``torch.compile`` put before names."""

_BARE: Mapping[Part, re.Pattern[str]] = {
    "unet": re.compile(r"(down_blocks|up_blocks|mid_block|input_blocks|output_blocks)\."),
    "vae": re.compile(r"(encoder|decoder)\.(conv_in|mid|down|up|norm_out|conv_out)|quant_conv\."),
    "text_encoder": re.compile(r"text_model\.|embeddings\.token_embedding|encoder\.layers\."),
}
"""How names of each part begin where nothing is put before them."""

_BESIDES = re.compile(
    r"(.*position_ids|.*text_projection(\.weight)?|.*logit_scale|vision_model\..*"
    r"|visual_projection\..*|loss\..*|model_ema\..*|modifier_token\..*|embed|v_pred|ztsnr"
    r"|global_step|logvar|scale_factor|edm_.*|.*alphas.*|betas|posterior_.*)"
)
"""Tensors that lie beside a part's weights in files of CompVis, CLIP and their trainings."""

_TEXT_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps",
)  # fmt: skip
"""What decides an embedding; the rest of a text encoder's configuration does not."""


@dataclass(frozen=True)
class Replacement:
    """Files to take tensors of one part from; opened, so that what they are is known.

    Attributes:
        part: Of which part.
        source: The file or folder that was named.
        files: The weight files.
    """

    part: Part
    source: Path
    files: tuple[WeightFile, ...]

    @classmethod
    def open(cls, part: Part, source: str) -> "Replacement":
        """Find and open the files of a part; reads their headers only.

        Args:
            part: Of which part.
            source: A ``.safetensors`` file, the part's folder, or a folder that holds it under
                its name (``checkpoint-500`` with ``unet/`` in it), or ``package:NAME`` for one
                that ships with this package.

        Raises:
            InputError: There are none, or they are something else; says how to mend it.
        """
        place = shipped_folder(source) or Path(source).expanduser()
        files = tuple(WeightFile.open(path) for path in find_weights(place, part))
        return cls(part, place, files)

    def prediction_notes(self) -> Iterator[PredictionNote]:
        """What the files, and a scheduler beside a UNet's folder, say that the UNet predicts."""
        if self.part != "unet":
            return
        yield from (note for file in self.files if (note := file.prediction_note) is not None)
        folder = part_folder(self.source, self.part)
        path = folder.parent / "scheduler" / "scheduler_config.json"
        if self.source.is_dir() and path.is_file():
            kind = _read_json(path).get("prediction_type", "epsilon")
            yield PredictionNote(path, str(kind), f"prediction_type {kind!r}")

    def apply(self, module: nn.Module) -> ReplacedPart:
        """Put the tensors into a loaded part, which becomes fp32; the others stay the base's.

        Args:
            module: The base's part, with its ``config``.

        Returns:
            What is on what.

        Raises:
            InputError: The files or their configuration do not fit the base; nothing is changed.
        """
        self._check_config(module)
        module.float()
        base = module.state_dict()
        given = self._tensors(module, base)
        _refuse_differences(self.source, self.part, given, base)
        changed = sum(not torch.equal(tensor, base[name]) for name, tensor in given.items())
        module.load_state_dict(given, strict=False)
        found = ReplacedPart(
            part=self.part,
            source=self._name(),
            files={file.path.name: file.sha256() for file in self.files},
            replaced=len(given),
            changed=changed,
            total=len(base),
        )
        log.info(
            "%s: %d of %d tensors are those of %s, %d of them differ from the checkpoint's",
            self.part, found.replaced, found.total, self.source, changed,
        )  # fmt: skip
        if not changed:
            log.warning(
                "%s holds the same weights as the checkpoint: checkpoint.%s changes nothing",
                self.source, self.part,
            )  # fmt: skip
        return found

    def _name(self) -> str:
        """What reports call the source: no more of its place than tells which it is."""
        place = self.source.absolute()  # not resolved: files of the hub cache are links to hashes
        return f"{place.parent.name}/{place.name}" if place.name == self.part else place.name

    def _tensors(
        self, module: nn.Module, base: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Tensors by the base's names, in fp32.

        Raises:
            InputError: Some belong to no place of the base, or have another shape.
        """
        places = _places(self.part, module, list(base))
        held = {name: file for file in self.files for name in file.names}
        known = {name: places[bare] for name in held if (bare := _bare(self.part, name)) in places}
        others = [n for n in held if n not in known and not _lies_besides(self.part, n)]
        if not known:
            raise self._of_no_part(list(held))
        if others:
            raise InputError(
                f"{len(others)} of the {len(held)} tensors of {self.source} have no place in the "
                f"checkpoint's {self.part}: {first_names(others)}",
                where=f"checkpoint.{self.part}",
                fix="give the checkpoint that it was made from as checkpoint.source, or a file "
                "with the names of diffusers or of the original single files",
            )
        given, wrong = {}, []
        for file in self.files:
            for name, tensor in file.tensors().items():
                if name not in known:
                    continue
                pieces = tensor.chunk(len(known[name])) if tensor.dim() else (tensor,)
                for place, piece in zip(known[name], pieces, strict=False):
                    fits = _in_shape(piece, base[place])
                    if fits is None or place in given or not fits.isfinite().all():
                        wrong.append(f"{name} {tuple(piece.shape)} for {tuple(base[place].shape)}")
                    else:
                        given[place] = fits
        if wrong:
            raise InputError(
                f"{len(wrong)} of the {len(held)} tensors of {self.source} do not fit the "
                f"checkpoint's {self.part}: of another shape, no finite numbers, or there twice: "
                f"{first_names(wrong)}",
                where=f"checkpoint.{self.part}",
                fix="give the checkpoint that it was made from as checkpoint.source",
            )
        return given

    def _of_no_part(self, names: list[str]) -> InputError:
        """What to say of a file in which nothing belongs to this part."""
        others = [part for part in parts_in(names) if part != self.part]
        return InputError(
            f"{self.source} holds no {self.part}: "
            f"its {len(names)} tensors are {first_names(names)}",
            where=f"checkpoint.{self.part}",
            fix=f"it looks like a {others[0]}: checkpoint.{others[0]}={self.source}"
            if others
            else "give a file with the names of diffusers or of the original single files",
        )

    def _check_config(self, module: nn.Module) -> None:
        """Refuse a folder whose configuration says another model than the base's.

        Raises:
            InputError: Names the values that differ.
        """
        path = part_folder(self.source, self.part) / "config.json"
        if not self.source.is_dir() or not path.is_file():
            return
        own = _read_json(path)
        config: Any = module.config
        base = dict(config) if isinstance(config, Mapping) else config.to_dict()
        differ = [
            f"{key} {own[key]!r}, the checkpoint has {base[key]!r}"
            for key in base
            if key in own
            and self._decides(key)
            and plain_value(own[key]) != plain_value(base[key])
        ]
        if differ:
            raise InputError(
                f"{path} says another model than the checkpoint's {self.part}: "
                f"{'; '.join(differ[:5])}",
                where=f"checkpoint.{self.part}",
                fix="give the checkpoint that it was made from as checkpoint.source; or, if the "
                "values do not matter, the weight file itself instead of the folder",
            )

    def _decides(self, key: str) -> bool:
        """Whether a value of the configuration decides what the part computes."""
        if self.part == "text_encoder":
            return key in _TEXT_SETTINGS
        # the size of an autoencoder's training images is only a note
        return not key.startswith("_") and (self.part, key) != ("vae", "sample_size")


def _read_json(path: Path) -> dict[str, Any]:
    """The settings in a configuration's file.

    Raises:
        InputError: It is damaged.
    """
    try:
        held = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}", fix="get it again") from error
    if not isinstance(held, dict):
        raise InputError(f"{path} holds no settings", fix="get it again")
    return held


def parts_in(names: list[str]) -> list[Part]:
    """Parts of which a file holds tensors, by their names."""
    return [
        part
        for part, prefixes in _PART_PREFIXES.items()
        if any(name.startswith(prefixes) or _BARE[part].match(name) for name in names)
    ]


def _places(part: Part, module: nn.Module, names: list[str]) -> dict[str, tuple[str, ...]]:
    """Every known name of a tensor to the base's own; several where they are joined in one."""
    places: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    open_clip = False
    if part == "text_encoder":
        config: Any = module.config
        open_clip = config.hidden_act == "gelu"
        for name in names:
            bare = name.removeprefix("text_model.")
            for before in ("", "text_model.", "transformer."):
                places[f"{before}{bare}"] = (name,)
    try:
        places.update(original_names(part, names, open_clip=open_clip))
    except ValueError:
        log.debug("the original layout has no names for this %s", part)
    for name in names:
        places.update((alias, (name,)) for alias in _names_of_scripts(part, name))
    return places


def _names_of_scripts(part: Part, name: str) -> Iterator[str]:
    """Further names of a tensor, by what training scripts and older versions call it."""
    if part == "unet":
        found = re.fullmatch(r"(.*\.attn2)\.to_(q|k|v|out)\.(.*)", name)
        if found:
            yield f"{found[1]}.processor.to_{found[2]}_custom_diffusion.{found[3]}"
    if part == "vae":
        for old, new in OLD_ATTENTION.items():
            if f".{new}." in name:
                yield name.replace(f".{new}.", f".{old}.")


def _bare(part: Part, name: str) -> str:
    """A name without what wrappers and whole checkpoints put before it."""
    for before in (*_WRAPPERS, *_PART_PREFIXES[part], *_WRAPPERS):
        name = name.removeprefix(before)
    return name


def _lies_besides(part: Part, name: str) -> bool:
    """Whether a tensor belongs to another part of a whole checkpoint, or to none."""
    others = [p for other, ps in _PART_PREFIXES.items() if other != part for p in ps]
    return name.startswith(tuple(others)) or _BESIDES.fullmatch(_bare(part, name)) is not None


def _in_shape(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
    """A tensor in fp32 in another's shape, from which it may differ by axes of one element."""
    if not tensor.is_floating_point():
        return None
    short, long = sorted((tensor.shape, like.shape), key=len)
    if (*short, *[1] * (len(long) - len(short))) != tuple(long):
        return None
    return tensor.float().reshape(like.shape)


def _refuse_differences(
    source: Path, part: Part, given: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]
) -> None:
    """Refuse tensors that are what changed, to be added, rather than weights.

    Mended weights point where the base's point; a difference is small and points elsewhere.

    Raises:
        InputError: They look like differences.
    """
    size = own = along = 0.0
    for name, tensor in given.items():
        size += float(tensor.square().sum())
        own += float(base[name].square().sum())
        along += float((tensor * base[name]).sum())
    if size and math.sqrt(size) < 0.3 * math.sqrt(own) and along < 0.5 * math.sqrt(size * own):
        raise InputError(
            f"{source} looks like differences to be added to a {part}, not like weights: its "
            f"values are {math.sqrt(size / own):.2g} as large as the checkpoint's and hardly "
            f"along them",
            where=f"checkpoint.{part}",
            fix="add them to the weights that they were taken from, and save the sum",
        )
