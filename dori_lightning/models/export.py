"""Write a checkpoint for other programs to open: no bit lost, no pickle, no code.

Everything is written from the loaded parts rather than copied from the source's files, so that
nothing comes along that this program did not read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from dori_lightning.models.components import Component, Components, stem
from dori_lightning.models.fingerprint import configuration_of, fingerprint_of
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.original_layout import (
    PREFIXES,
    is_original_convolution,
    is_original_transposed,
    original_names,
)
from dori_lightning.models.tensors import is_open_clip, tied_names
from dori_lightning.runtime.artifacts import drop_keys
from dori_lightning.types import InputError

DTYPES: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
"""Dtypes that weights are written in, the narrowest first."""

SHARD_BYTES = 5_000_000_000
"""Bytes of weights in one file of a diffusers folder: more are no single upload on the hub."""

_OF_THIS_MACHINE = {"_name_or_path", "name_or_path", "is_local", "local_files_only"}
_NAMES_CODE = {"auto_map", "custom_pipelines", "trust_remote_code"}
"""Keys of configurations that name code to fetch and run; left out, as are this machine's."""


@dataclass(frozen=True)
class Weights:
    """Weights as they are written, on the CPU; fp32 ones share the model's memory.

    Attributes:
        states: Component to tensors by name.
        dtypes: Component to the name of its dtype.
        exact: Whether every weight has the value that it has in the model.
        configuration: Everything besides the weights that decides results.
    """

    states: Mapping[Component, Mapping[str, torch.Tensor]]
    dtypes: Mapping[Component, str]
    exact: bool
    configuration: Mapping[str, Any]

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint that the loader will find."""
        return fingerprint_of(self.states.values(), self.configuration)


def weights_of(components: Components, dtype: str | None = None) -> Weights:
    """Bring weights into the dtype they are written in.

    Args:
        components: Whose weights.
        dtype: ``fp16``, ``bf16`` or ``fp32``; None for the narrowest that holds every weight of a
            component exactly, which is that of the source's files as long as an edit does not need
            more.

    Raises:
        InputError: The dtype is none of these, or some weight is too large for it.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)} or null, got {dtype!r}")
    chosen, exact = {}, True
    states: dict[Component, dict[str, torch.Tensor]] = {}
    for component, module in components.modules.items():
        state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
        chosen[component] = dtype or next(
            n for n, d in DTYPES.items() if _holds(d, state) or n == "fp32"
        )
        wanted = DTYPES[chosen[component]]
        exact = exact and _holds(wanted, state)
        states[component] = {
            name: tensor.to(wanted).contiguous() for name, tensor in state.items()
        }
        for name, tensor in states[component].items():
            if not tensor.isfinite().all() and state[name].isfinite().all():
                raise InputError(
                    f"{name} has weights that are too large for {chosen[component]}\n"
                    f"  fix:   export in bf16 or fp32, or let the weights decide (dtype null)"
                )
    return Weights(states, chosen, exact, configuration_of(components))


def _holds(dtype: torch.dtype, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a dtype holds every value exactly."""
    return all(torch.equal(t.to(dtype).float(), t.float()) for t in state.values())


def write_folder(
    folder: Path,
    components: Components,
    weights: Weights,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a diffusers folder that the family's pipeline opens with ``from_pretrained``.

    The keys of CLIP's text encoders get the prefix ``text_model.`` of the original releases:
    versions 4 and 5 of transformers both read it, while keys without it would leave version 4
    with random weights.

    Args:
        folder: Where to; made if needed.
        components: Give the configurations.
        weights: What is written.
        shard_bytes: A component of more is written as several files of at most so much each.
    """
    write_configs(folder, components)
    for name, state in weights.states.items():
        tied = tied_names(components.modules[name])
        named = {key: tensor for key, tensor in state.items() if key not in tied}
        if type(components.modules[name]).__name__.startswith("CLIPText"):
            named = {
                key if key.startswith("text_projection.")
                else f"text_model.{key.removeprefix('text_model.')}": tensor
                for key, tensor in named.items()
                if not key.endswith("position_ids")
            }  # fmt: skip
        _write_shards(folder / name, stem(name), named, shard_bytes)


def _write_shards(
    folder: Path, called: str, state: Mapping[str, torch.Tensor], shard_bytes: int
) -> None:
    """Write tensors as one file, or as several with an index, under the names of diffusers."""
    plan = split_torch_state_dict_into_shards(
        dict(state),
        filename_pattern=f"{called}{{suffix}}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / f"{called}.safetensors.index.json", index)


def write_configs(folder: Path, components: Components) -> None:
    """Write everything of a diffusers folder but the weights.

    A text encoder's configuration says fp32 whatever its file holds: transformers would load half
    precision as such beside a denoiser that diffusers widens, and the pipeline would not run. The
    scheduler's leaves out what its source left out: there each sampler has its own default.
    """
    saved = {**components.modules, **components.tokenizers, "scheduler": components.scheduler}
    classes = {name: type(component).__name__ for name, component in saved.items()}
    for name, component in saved.items():
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        if name.startswith("text_encoder"):
            component.config.save_pretrained(place)
        elif name in components.tokenizers:
            component.save_pretrained(place)
        else:
            component.save_config(place)
    for path in folder.glob("*/*config.json"):
        config, name = json.loads(path.read_text("utf-8")), path.parent.name
        config = drop_keys(config, *_OF_THIS_MACHINE, *_NAMES_CODE)
        if name == "scheduler":
            unsaid = components.scheduler.config.get("_use_default_values", ())
            config = drop_keys(config, *unsaid)
        if name.startswith("text_encoder"):
            config = {**config, "architectures": [classes[name]], "dtype": "float32"}
        _write_json(path, config)
    of_transformers = (*components.tokenizers, *components.encoders)
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": components.family.pipeline,
            **components.family.index,
            **components.family.switches,
            **components.switches,
            **{
                name: ["transformers" if name in of_transformers else "diffusers", kind]
                for name, kind in classes.items()
            },
        },
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_single(
    path: Path, components: Components, weights: Weights, notes: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file in the original layout.

    Args:
        path: Where to.
        components: Tell the family, and whether a text encoder is OpenCLIP's.
        weights: What is written.
        notes: What the file's header says of it, as JSON under one key: several would be
            written in any order, and the file could not be compared by its hash.
    """
    state = _original_state(components, weights)
    note = {"dori_lightning": json.dumps(notes, sort_keys=True)} if notes else {"format": "pt"}
    save_file(state, path, metadata=note)


def check_written(
    source: Path, weights: Weights, *, family: str = "sd", config: Path | None = None
) -> None:
    """Load what was written as anybody would, and compare every weight.

    Args:
        source: Folder or single file.
        weights: What should be in it.
        family: Of which family it is.
        config: Folder with the configuration, for a single file.

    Raises:
        RuntimeError: It is another checkpoint.
    """
    read = load_checkpoint(
        name="written",
        source=str(source),
        family=family,
        config=None if config is None else str(config),
        device="cpu",
    )
    if read.fingerprint != weights.fingerprint:
        raise RuntimeError(
            f"{source} was written as checkpoint {weights.fingerprint}, but reads as "
            f"{read.fingerprint}"
        )


def _original_state(components: Components, weights: Weights) -> dict[str, torch.Tensor]:
    """Tensors of a whole checkpoint by their names in the original layout.

    Raises:
        InputError: The family has no such layout.
    """
    family = components.family
    if family.name not in PREFIXES:
        raise InputError(
            f"{family.title} has no layout of single files with everything in them",
            where="task.formats",
            fix="task.formats=[diffusers]",
        )
    state = {}
    for component, tensors in weights.states.items():
        open_clip = is_open_clip(component, components.modules[component])
        for name, joined in original_names(component, tensors, open_clip=open_clip).items():
            tensor = (
                tensors[joined[0]]
                if len(joined) == 1
                else torch.cat([tensors[one] for one in joined])
            )
            if is_original_convolution(component, name) and tensor.dim() == 2:
                tensor = tensor[:, :, None, None]
            if is_original_transposed(name):
                tensor = tensor.T
            state[f"{PREFIXES[family.name][component]}{name}"] = tensor.contiguous()
    return state
