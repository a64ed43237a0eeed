"""LoRA files: low-rank changes of a checkpoint's layers, added to its weights once and for all.

Two layouts are read. sd-scripts, and most trainers and merging tools, name a layer's tensors
``lora_unet_mid_block_..._to_k.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``; diffusers
and peft ``unet.down_blocks.0....to_k.lora_A.weight`` and ``.lora_B.weight``, before peft
``.lora.down.weight``. diffusers translates names and peft makes the sums. A library skips what it
does not know with a warning at most; here every tensor of a file is accounted for.

A layer's change is ``scale * alpha / rank * up @ down``. ``alpha / rank`` is brought into ``up``
here: of text encoders, diffusers gives every layer the alpha that most of them have.

References: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022; layouts:
sd-scripts (networks/lora.py), diffusers (loaders/lora_pipeline.py).
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
import transformers
from torch import Tensor, nn

from dori_lightning.models.components import Component, Components, Family
from dori_lightning.models.soundness import blamed
from dori_lightning.models.weight_files import PICKLES, WeightFile, is_weight_file, pickle_message
from dori_lightning.types import FusedLora, InputError

log = logging.getLogger(__name__)

_LIBRARY: Any = diffusers.utils

LoraSetting: TypeAlias = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
"""``checkpoint.lora``: a file, ``{path: FILE, scale: NUMBER}``, or a list of either."""

_ENDS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".down.weight", ".up.weight"),
)
"""What the two tensors of a layer end with: sd-scripts, peft, diffusers before peft."""

_OTHER_METHODS = {
    "DoRA": re.compile(r"dora|lora_magnitude_vector"),
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "OFT": re.compile(r"\.(oft|boft)_"),
    "LoCon with a core": re.compile(r"\.lora_mid\."),
}
"""Methods with other sums, told by names of tensors."""

_SIGNS = {
    "flux": re.compile(r"double_blocks|single_blocks|single_transformer_blocks|\bflux"),
    "sd3": re.compile(r"joint_blocks|\.attn\.add_[qkv]_proj|\bsd3|stable-diffusion-v?3"),
    "sdxl": re.compile(
        r"lora_te2_|\btext_encoder_2\.|unet.*transformer_blocks[._][1-9]|\bsdxl|stable-diffusion-xl"
    ),
    "sd": re.compile(r"lora_unet_|\bunet\.|\bsd_v|stable-diffusion-v"),
}
"""Families by what names of tensors, or notes in the header, tell of them; the first counts."""

_NOTES = ("modelspec.architecture", "ss_base_model_version")
"""What trainers note of the model that a file belongs to."""

_ADAPTER = "fused"
"""What peft calls the layers for as long as they are beside the weights."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file; opened, so that what it is is known.

    Attributes:
        file: Its header.
        scale: Factor of its change.
        layers: Name of each layer in the file to the names of its tensors: down, up and, where
            there is one, alpha.
    """

    file: WeightFile
    scale: float
    layers: Mapping[str, tuple[str, ...]]

    @classmethod
    def open_all(cls, setting: LoraSetting | None) -> tuple["Lora", ...]:
        """Open the files of ``checkpoint.lora``; reads their headers only.

        Raises:
            InputError: A file is missing or something else, a scale is no number, or peft is not
                installed; says how to mend it.
        """
        entries = lora_entries(setting)
        if entries and not _LIBRARY.USE_PEFT_BACKEND:
            raise InputError(
                "a LoRA is loaded with peft, which is not installed, or too old for diffusers",
                where="checkpoint.lora",
                fix="pip install 'dori_lightning[lora]', or pip install 'peft>=0.18,<1'",
            )
        return tuple(cls._open(path, scale) for path, scale in entries)

    @classmethod
    def _open(cls, source: str, scale: float) -> "Lora":
        path = Path(source).expanduser()
        if path.suffix.lower() in PICKLES:
            raise InputError(pickle_message(path), where="checkpoint.lora")
        if path.is_dir():
            path = _file_in(path)
        if not path.is_file():
            raise InputError(
                f"there is no LoRA {source}",
                where="checkpoint.lora",
                fix="give a .safetensors file on this machine; of a hub id, the file that "
                "'hf download' prints",
            )
        file = WeightFile.open(path, adapter=True)
        return cls(file, scale, _layers_of(file))

    def fuse(self, components: Components) -> FusedLora:
        """Add the change to the components' weights, which are in fp32 and stay plain layers.

        Args:
            components: The checkpoint's; changed.

        Returns:
            What was changed.

        Raises:
            InputError: A layer has no place in the checkpoint, or another shape there, or nothing
                changes.
        """
        family = components.family
        pipeline = getattr(diffusers, family.pipeline)
        if not hasattr(pipeline, "lora_state_dict"):
            raise InputError(
                f"diffusers loads no LoRA into {family.title}",
                where="checkpoint.lora",
                fix="merge it with the tool that made it; then checkpoint.source=",
            )
        with blamed(f"{self.file.path} cannot be read", str(self.file.path), self._fix(family)):
            translated = _translated(pipeline, components, self._tensors())
            places = self._places(components, pipeline._lora_loadable_modules, translated)
        with blamed(f"{self.file.path} cannot be added", str(self.file.path), self._fix(family)):
            changed = {
                component: self._add(pipeline, components, component, tensors)
                for component, tensors in places.items()
            }
        if not any(changed.values()):
            raise InputError(
                f"{self.file.path} changes no weight at scale {self.scale:g}: its layers are zero",
                where="checkpoint.lora",
                fix="give another scale, or the file of a training that has ended",
            )
        found = FusedLora(
            source=self.file.path.name,
            sha256=self.file.sha256(),
            scale=self.scale,
            layers=changed,
        )
        log.info("LoRA %s at scale %g: changed layers %s", found.source, self.scale, changed)
        return found

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors in fp32, with alpha, and what the header says instead, brought into up."""
        notes = _adapter_notes(self.file)
        found: dict[str, Tensor] = {}
        for layer, names in self.layers.items():
            read = dict(self.file.tensors(names))
            down, up = (read[name].to(torch.float32) for name in names[:2])
            rank = down.shape[0]
            if len(names) > 2:
                factor = float(read[names[2]].to(torch.float32)) / rank
            else:
                factor = _noted_factor(notes, layer, rank)
            if not math.isfinite(factor):
                raise InputError(f"alpha of layer {layer} is {factor * rank}", fix="get it again")
            found[names[0]], found[names[1]] = down, up * factor
        return found

    def _places(
        self, components: Components, loadable: Sequence[str], translated: Mapping[str, Tensor]
    ) -> dict[Component, dict[str, Tensor]]:
        """The tensors of each component by peft's names, each held against its layer.

        Raises:
            InputError: A layer has no place, or another shape.
        """
        found: dict[Component, dict[str, Tensor]] = {}
        astray = list(translated)
        for component in loadable:
            begin = f"{component}."
            own = {name: tensor for name, tensor in translated.items() if name.startswith(begin)}
            if own and component in components.modules:
                found[component] = _by_layer(components, component, own)
                astray = [name for name in astray if name not in own]
        for component, tensors in found.items():
            modules = dict(components.modules[component].named_modules())
            for layer in dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors):
                down, up = (f"{layer}.lora_{end}.weight" for end in "AB")
                weight = getattr(modules.get(layer), "weight", None)
                if not isinstance(weight, Tensor):
                    astray += [f"{component}.{down}", f"{component}.{up}"]
                    continue
                shape = (tensors[up].shape[0], *tensors[down].shape[1:])
                if shape != tuple(weight.shape):
                    raise self._misfit(
                        components.family,
                        f"layer {component}.{layer} has {tuple(weight.shape)} weights, the LoRA's "
                        f"are for {shape}",
                    )
        if astray:
            raise self._misfit(
                components.family,
                f"{len(astray)} of its tensors have no place in it, such as {min(astray)}",
            )
        return found

    def _add(
        self,
        pipeline: Any,
        components: Components,
        component: Component,
        tensors: Mapping[str, Tensor],
    ) -> int:
        """Add the change of one component; returns the number of layers whose weights differ."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        module: Any = components.modules[component]
        # on the meta device first: nothing is drawn at random
        options: dict[str, Any] = {"adapter_name": _ADAPTER, "low_cpu_mem_usage": True}
        if component == components.family.denoiser:
            module.load_lora_adapter(dict(tensors), prefix=None, **options)
        else:
            named = {f"{component}.{name}": tensor for name, tensor in tensors.items()}
            options["prefix"] = component
            with _no_progress_bar():
                pipeline.load_lora_into_text_encoder(named, None, module, **options)
        layers: list[Any] = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
        if 2 * len(layers) != len(tensors):
            raise ValueError(f"{len(layers)} of {len(tensors) // 2} layers of {component} loaded")
        changed = 0
        for layer in layers:
            before = layer.get_base_layer().weight.detach().clone()
            layer.scale_layer(self.scale)
            layer.merge(safe_merge=True)  # raises where the sum is no number
            changed += not torch.equal(before, layer.get_base_layer().weight)
        _LIBRARY.recurse_remove_peft_layers(module)
        del module.peft_config
        module._hf_peft_config_loaded = False
        return changed

    def _misfit(self, family: Family, what: str) -> InputError:
        return InputError(
            f"{self.file.path} does not fit this checkpoint of {family.title}: {what}",
            where="checkpoint.lora",
            fix=self._fix(family),
        )

    def _fix(self, family: Family) -> str:
        """How a file that does not fit is mended, by the family that it looks like."""
        likely = looks_like(self.file.names, self.file.notes)
        if likely is None or likely == family.name:
            return (
                "give the checkpoint that it was trained on as checkpoint.source, or the LoRA in "
                "diffusers' layout"
            )
        return (
            f"it looks like a LoRA of another family: give a checkpoint of that, with "
            f"checkpoint.family={likely}"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing one for a few tensors."""
    logs: Any = transformers.logging
    shown = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logs.enable_progress_bar()


def looks_like(names: Iterable[str], notes: Mapping[str, str]) -> str | None:
    """The family that a LoRA seems to be of, by its notes or else its tensors' names."""
    for told in ([notes[key].lower() for key in _NOTES if key in notes], names):
        whole = "\n".join(told)
        found = next((name for name, sign in _SIGNS.items() if sign.search(whole)), None)
        if found is not None:
            return found
    return None


def lora_entries(setting: LoraSetting | None) -> list[tuple[str, float]]:
    """The files of ``checkpoint.lora`` with their scales; none without one.

    Raises:
        InputError: An entry is neither a file nor a path with a scale.
    """
    if setting is None:
        return []
    several = isinstance(setting, Sequence) and not isinstance(setting, str)
    return [_path_and_scale(entry) for entry in (setting if several else [setting])]


def _path_and_scale(entry: Any) -> tuple[str, float]:
    """One entry of ``checkpoint.lora``.

    Raises:
        InputError: It is neither a file nor a path with a scale.
    """
    fix = "checkpoint.lora=FILE, or 'checkpoint.lora=[{path: FILE, scale: 0.8}]'"
    given = {"path": entry} if isinstance(entry, str) else entry
    path = given.get("path") if isinstance(given, Mapping) else None
    if not isinstance(path, str) or set(given) - {"path", "scale"}:
        raise InputError(f"{entry!r} is no LoRA", where="checkpoint.lora", fix=fix)
    scale: Any = given.get("scale", 1.0)
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not number or not math.isfinite(scale):
        raise InputError(
            f"the scale of a LoRA must be a number, got {scale!r}",
            where="checkpoint.lora",
            fix=fix,
        )
    return path, float(scale)


def _file_in(folder: Path) -> Path:
    """The LoRA in a training's folder: diffusers' own name, or the only file of weights.

    Raises:
        InputError: There are several, or none.
    """
    own = folder / "pytorch_lora_weights.safetensors"
    files = [path for path in sorted(folder.iterdir()) if is_weight_file(path)]
    if own in files or len(files) == 1:
        return own if own in files else files[0]
    raise InputError(
        f"{folder} holds {len(files)} .safetensors files, none called {own.name}",
        where="checkpoint.lora",
        fix="give the file itself",
    )


def _layers_of(file: WeightFile) -> dict[str, tuple[str, ...]]:
    """The layers of a file, every tensor of which must belong to one.

    Raises:
        InputError: There are none, or tensors of other methods.
    """
    names, found = set(file.names), dict[str, tuple[str, ...]]()
    for name in file.names:
        for down, up in _ENDS:
            layer = name.removesuffix(down)
            if layer != name and f"{layer}{up}" in names and layer not in found:
                alpha = f"{layer}.alpha"
                found[layer] = (name, f"{layer}{up}", *([alpha] if alpha in names else []))
    besides = sorted(names.difference(*found.values()))
    if besides or not found:
        kinds = [
            kind
            for kind, sign in _OTHER_METHODS.items()
            if any(sign.search(name) for name in besides)
        ]
        what = f"of {', '.join(kinds)}" if kinds else "that belong to no layer of a LoRA"
        fix = "merge it into its checkpoint with the tool that made it; then checkpoint.source="
        if not found and not kinds:
            fix = (
                "give a LoRA in the layout of sd-scripts or diffusers; whole weights are given "
                "with checkpoint.source= or checkpoint.unet="
            )
        raise InputError(
            f"{file.path} has {len(besides)} tensors {what}, such as {(besides or [''])[0]}",
            where="checkpoint.lora",
            fix=fix,
        )
    return found


def _adapter_notes(file: WeightFile) -> dict[str, Any]:
    """What diffusers' trainings note of their adapters: ``unet.lora_alpha``, ...

    Raises:
        InputError: They are damaged.
    """
    with blamed(f"the notes of {file.path} are damaged", str(file.path)):
        notes = json.loads(file.notes.get("lora_adapter_metadata", "{}"))
        return dict(notes)


def _noted_factor(notes: Mapping[str, Any], layer: str, rank: int) -> float:
    """``alpha / rank`` of a layer by the notes; 1 without any, as diffusers has it."""
    component, _, name = layer.partition(".")
    own = {
        key.removeprefix(f"{component}."): value
        for key, value in notes.items()
        if key.startswith(f"{component}.")
    }
    alpha = own.get("lora_alpha", rank)
    for pattern, special in (own.get("alpha_pattern") or {}).items():
        if name == pattern.lstrip("^") or name.endswith(f".{pattern}"):
            alpha = special
    return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _translated(
    pipeline: Any, components: Components, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors under diffusers' names, each behind its component's."""
    unet = components.modules.get("unet")
    options = {} if unet is None else {"unet_config": unet.config}
    found: Any = pipeline.lora_state_dict(dict(tensors), **options)
    return dict(found[0] if isinstance(found, tuple) else found)


def _by_layer(
    components: Components, component: Component, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a component under peft's names, as its own modules are called."""
    own = {name.removeprefix(f"{component}."): tensor for name, tensor in tensors.items()}
    module: nn.Module = components.modules[component]
    if component == components.family.denoiser:
        return dict(_LIBRARY.convert_unet_state_dict_to_peft(own))
    newer = _LIBRARY.convert_state_dict_to_diffusers(own)
    found: dict[str, Tensor] = _LIBRARY.convert_state_dict_to_peft(newer)
    if hasattr(module, "text_model"):
        return found
    return {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
