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
from safetensors.torch import save_file

from dori_lightning.models.fingerprint import configuration_of, fingerprint_of
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.original_layout import (
    PREFIXES,
    Part,
    is_original_convolution,
    original_names,
)
from dori_lightning.models.stable_diffusion import Parts
from dori_lightning.models.weight_files import STEMS
from dori_lightning.runtime.artifacts import drop_keys
from dori_lightning.types import InputError

DTYPES: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
"""Dtypes that weights are written in, the narrowest first."""

_OF_THIS_MACHINE = {"_name_or_path", "name_or_path", "is_local", "local_files_only"}
_NAMES_CODE = {"auto_map", "custom_pipelines", "trust_remote_code"}
"""Keys of configurations that name code to fetch and run; left out, as are this machine's."""


@dataclass(frozen=True)
class Weights:
    """Weights as they are written, on the CPU; fp32 ones share the model's memory.

    Attributes:
        states: Part to tensors by name.
        dtypes: Part to the name of its dtype.
        exact: Whether every weight has the value that it has in the model.
        configuration: Everything besides the weights that decides results.
    """

    states: Mapping[Part, Mapping[str, torch.Tensor]]
    dtypes: Mapping[Part, str]
    exact: bool
    configuration: Mapping[str, Any]

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint that the loader will find."""
        return fingerprint_of(self.states.values(), self.configuration)


def weights_of(parts: Parts, dtype: str | None = None) -> Weights:
    """Bring weights into the dtype they are written in.

    Args:
        parts: Whose weights.
        dtype: ``fp16``, ``bf16`` or ``fp32``; None for the narrowest that holds every weight of a
            part exactly, which is that of the source's files as long as an edit does not need
            more.

    Raises:
        InputError: The dtype is none of these, or some weight is too large for it.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)} or null, got {dtype!r}")
    chosen, exact = {}, True
    states: dict[Part, dict[str, torch.Tensor]] = {}
    for part, module in parts.modules.items():
        state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
        chosen[part] = dtype or next(
            n for n, d in DTYPES.items() if _holds(d, state) or n == "fp32"
        )
        wanted = DTYPES[chosen[part]]
        exact = exact and _holds(wanted, state)
        states[part] = {name: tensor.to(wanted).contiguous() for name, tensor in state.items()}
        for name, tensor in states[part].items():
            if not tensor.isfinite().all() and state[name].isfinite().all():
                raise InputError(
                    f"{name} has weights that are too large for {chosen[part]}\n"
                    f"  fix:   export in bf16 or fp32, or let the weights decide (dtype null)"
                )
    return Weights(states, chosen, exact, configuration_of(parts))


def _holds(dtype: torch.dtype, state: Mapping[str, torch.Tensor]) -> bool:
    """Whether a dtype holds every value exactly."""
    return all(torch.equal(t.to(dtype).float(), t.float()) for t in state.values())


def write_folder(folder: Path, parts: Parts, weights: Weights) -> None:
    """Write a diffusers folder that ``StableDiffusionPipeline.from_pretrained`` opens.

    The text encoder's keys get the prefix ``text_model.`` of the original releases: versions 4
    and 5 of transformers both read it, while keys without it would leave version 4 with random
    weights.

    Args:
        folder: Where to; made if needed.
        parts: Give the configurations.
        weights: What is written.
    """
    write_configs(folder, parts)
    text_encoder = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in weights.states["text_encoder"].items()
        if not name.endswith("position_ids")
    }
    for part, state in {**weights.states, "text_encoder": text_encoder}.items():
        path = folder / part / f"{STEMS[part]}.safetensors"
        save_file(dict(state), path, metadata={"format": "pt"})


def write_configs(folder: Path, parts: Parts) -> None:
    """Write everything of a diffusers folder but the weights.

    The text encoder's configuration says fp32 whatever its file holds: transformers would load
    half precision as such beside a UNet that diffusers widens, and the pipeline would not run.
    The scheduler's leaves out what its source left out: there each sampler has its own default.
    """
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    parts.unet.save_config(folder / "unet")
    parts.autoencoder.save_config(folder / "vae")
    parts.text_encoder.config.save_pretrained(folder / "text_encoder")
    parts.tokenizer.save_pretrained(folder / "tokenizer")
    parts.scheduler.save_config(folder / "scheduler")
    for path in folder.glob("*/*config.json"):
        config = json.loads(path.read_text("utf-8"))
        config = drop_keys(config, *_OF_THIS_MACHINE, *_NAMES_CODE)
        if path.parent.name == "scheduler":
            config = drop_keys(config, *parts.scheduler.config.get("_use_default_values", ()))
        if path.parent.name == "text_encoder":
            config = {**config, "architectures": ["CLIPTextModel"], "dtype": "float32"}
        _write_json(path, config)
    none = [None, None]
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": none,
            "image_encoder": none,
            "requires_safety_checker": False,
            "safety_checker": none,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_single(
    path: Path, parts: Parts, weights: Weights, notes: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file in the original layout.

    Args:
        path: Where to.
        parts: Tell the version: an encoder with exact GELU is OpenCLIP's, of version 2.
        weights: What is written.
        notes: What the file's header says of it, as JSON under one key: several would be
            written in any order, and the file could not be compared by its hash.
    """
    state = _original_state(weights, open_clip=parts.text_encoder.config.hidden_act == "gelu")
    note = {"dori_lightning": json.dumps(notes, sort_keys=True)} if notes else {"format": "pt"}
    save_file(state, path, metadata=note)


def check_written(source: Path, weights: Weights, *, config: Path | None = None) -> None:
    """Load what was written as anybody would, and compare every weight.

    Args:
        source: Folder or single file.
        weights: What should be in it.
        config: Folder with the configuration, for a single file.

    Raises:
        RuntimeError: It is another checkpoint.
    """
    read = load_checkpoint(
        name="written",
        source=str(source),
        config=None if config is None else str(config),
        device="cpu",
    )
    if read.fingerprint != weights.fingerprint:
        raise RuntimeError(
            f"{source} was written as checkpoint {weights.fingerprint}, but reads as "
            f"{read.fingerprint}"
        )


def _original_state(weights: Weights, *, open_clip: bool) -> dict[str, torch.Tensor]:
    """Tensors of a whole checkpoint by their names in the original layout.

    Args:
        weights: By their names in diffusers and transformers.
        open_clip: Whether the checkpoint is of version 2.
    """
    state = {}
    for part, tensors in weights.states.items():
        for name, joined in original_names(part, tensors, open_clip=open_clip).items():
            tensor = (
                tensors[joined[0]]
                if len(joined) == 1
                else torch.cat([tensors[one] for one in joined])
            )
            if is_original_convolution(part, name) and tensor.dim() == 2:
                tensor = tensor[:, :, None, None]
            state[f"{PREFIXES[part]}{name}"] = tensor.contiguous()
    return state
