"""Write a checkpoint for other programs to open: no bit lost, no pickle, no code.

Everything is written from the loaded parts rather than copied from the source's files, so that
nothing comes along that this program did not read.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from dori_lightning.models.loading import fingerprint_of, load_checkpoint
from dori_lightning.models.stable_diffusion import StableDiffusion
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
class Parts:
    """What a Stable Diffusion checkpoint consists of."""

    unet: UNet2DConditionModel
    autoencoder: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler


def parts_of(model: StableDiffusion) -> Parts:
    """Parts of a loaded checkpoint, with whatever edit it carries now."""
    return Parts(
        model.unet, model.autoencoder, model.text_encoder, model.tokenizer, model.scheduler
    )


@dataclass(frozen=True)
class Weights:
    """Weights as they are written, on the CPU; fp32 ones share the model's memory.

    Attributes:
        unet: Tensors by name.
        autoencoder: Tensors by name.
        text_encoder: Tensors by name.
        dtypes: Part (``unet``, ``vae``, ``text_encoder``) to the name of its dtype.
        exact: Whether every weight has the value that it has in the model.
    """

    unet: Mapping[str, torch.Tensor]
    autoencoder: Mapping[str, torch.Tensor]
    text_encoder: Mapping[str, torch.Tensor]
    dtypes: Mapping[str, str]
    exact: bool

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint that the loader will find."""
        return fingerprint_of((self.unet, self.autoencoder, self.text_encoder))


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
    modules: dict[str, nn.Module] = {
        "unet": parts.unet,
        "vae": parts.autoencoder,
        "text_encoder": parts.text_encoder,
    }
    chosen, states, exact = {}, {}, True
    for part, module in modules.items():
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
    return Weights(states["unet"], states["vae"], states["text_encoder"], chosen, exact)


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
        for name, tensor in weights.text_encoder.items()
        if not name.endswith("position_ids")
    }
    for place, state in (
        ("unet/diffusion_pytorch_model", weights.unet),
        ("vae/diffusion_pytorch_model", weights.autoencoder),
        ("text_encoder/model", text_encoder),
    ):
        save_file(dict(state), folder / f"{place}.safetensors", metadata={"format": "pt"})


def write_configs(folder: Path, parts: Parts) -> None:
    """Write everything of a diffusers folder but the weights.

    The text encoder's configuration says fp32 whatever its file holds: transformers would load
    half precision as such beside a UNet that diffusers widens, and the pipeline would not run.
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
            f"{source} was written with the weights {weights.fingerprint}, but reads as "
            f"{read.fingerprint}"
        )


# Names of tensors in the original layout, from those in diffusers and transformers.

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {
    "embeddings.token_embedding.": "token_embedding.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.": ".attn.",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _original_state(weights: Weights, *, open_clip: bool) -> dict[str, torch.Tensor]:
    """Tensors of a whole checkpoint by their names in the single files of CompVis and Stability.

    ``model.diffusion_model`` numbers all layers of the UNet in execution order,
    ``first_stage_model`` is the autoencoder, ``cond_stage_model`` the text encoder: OpenAI's in
    version 1, OpenCLIP's in version 2.

    Args:
        weights: By their names in diffusers and transformers.
        open_clip: Whether the checkpoint is of version 2.
    """
    state = {
        f"model.diffusion_model.{new}": weights.unet[old]
        for old, new in _unet_names(list(weights.unet)).items()
    }
    for old, new in _autoencoder_names(list(weights.autoencoder)).items():
        tensor = weights.autoencoder[old]
        if ".attn_1." in new and new.endswith("weight") and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]  # the original attention is a 1 x 1 convolution
        state[f"first_stage_model.{new}"] = tensor
    for name, tensor in _text_encoder_state(weights.text_encoder, open_clip=open_clip).items():
        state[f"cond_stage_model.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _unet_names(names: list[str]) -> dict[str, str]:
    """Original name of each tensor of diffusers' ``UNet2DConditionModel``.

    Raises:
        ValueError: A name that the layout has no place for.
    """
    down = re.compile(r"down_blocks\.0\.resnets\.(\d+)")
    # a down block's layers and its downsampler; up blocks have as many
    per_block = 2 + max(int(m[1]) for name in names if (m := down.match(name)))
    attended = {m[1] for n in names if (m := re.match(r"up_blocks\.(\d+)\.attentions", n))}
    result = {}
    for name in names:
        outer = next((o for o in _OUTER if name.startswith(f"{o}.")), None)
        match = re.match(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)",
            name,
        )
        middle = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
        if outer is not None:
            result[name] = _OUTER[outer] + name[len(outer) :]
            continue
        if middle is not None:
            kind, k, rest = middle[1], int(middle[2]), middle[3]
            place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * k}"
        elif match is not None:
            side, kind, k, rest = match[1], match[3], int(match[4]), match[5]
            first = per_block * int(match[2])
            if kind == "downsamplers":
                place, rest = f"input_blocks.{first + per_block}.0", rest.replace("conv.", "op.")
            elif kind == "upsamplers":
                last = 2 if match[2] in attended else 1
                place = f"output_blocks.{first + per_block - 1}.{last}"
            else:
                row = (
                    f"input_blocks.{first + k + 1}"
                    if side == "down"
                    else f"output_blocks.{first + k}"
                )
                place = f"{row}.{0 if kind == 'resnets' else 1}"
        else:
            raise ValueError(f"the original layout has no place for the UNet tensor {name}")
        result[name] = f"{place}.{_renamed(rest, _RESNET) if kind == 'resnets' else rest}"
    return result


def _autoencoder_names(names: list[str]) -> dict[str, str]:
    """Original name of each autoencoder tensor; the decoder's levels count from the output."""
    levels = 1 + max(int(m[1]) for n in names if (m := re.match(r"decoder\.up_blocks\.(\d+)", n)))
    result = {}
    for name in names:
        match = re.match(
            r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\."
            r"(resnets|downsamplers|upsamplers)\.(\d+)\.(.*)",
            name,
        )
        middle = re.match(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
        if match is not None:
            side, block, kind, k, rest = match[1], int(match[2]), match[3], match[4], match[5]
            level = f"down.{block}" if side == "encoder" else f"up.{levels - 1 - block}"
            part = f"block.{k}" if kind == "resnets" else kind.removesuffix("rs")
            rest = rest.replace("conv_shortcut", "nin_shortcut")
            result[name] = f"{side}.{level}.{part}.{rest}"
        elif middle is not None:
            side, kind, k, rest = middle[1], middle[2], middle[3], middle[4]
            if kind == "attentions":
                result[name] = f"{side}.mid.attn_1.{_renamed(rest, _ATTENTION)}"
            else:
                result[name] = f"{side}.mid.block_{int(k) + 1}.{rest}"
        else:
            result[name] = name.replace("conv_norm_out", "norm_out")
    return result


def _text_encoder_state(
    tensors: Mapping[str, torch.Tensor], *, open_clip: bool
) -> dict[str, torch.Tensor]:
    """A ``CLIPTextModel``'s tensors under their names below ``cond_stage_model``.

    In OpenCLIP's encoder queries, keys and values are one tensor.
    """
    bare = {
        name.removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
        if not name.endswith("position_ids")
    }
    if not open_clip:
        return {f"transformer.text_model.{name}": tensor for name, tensor in bare.items()}
    result = {}
    for name, tensor in bare.items():
        head, projected, tail = name.partition(".q_proj.")
        if projected:
            joined = [bare[f"{head}.{part}_proj.{tail}"] for part in "qkv"]
            name, tensor = f"{head}.in_proj_{tail}", torch.cat(joined)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for old, new in _OPEN_CLIP.items():
            name = name.replace(old, new)
        result[f"model.{name}"] = tensor
    return result


def _renamed(rest: str, renames: Mapping[str, str]) -> str:
    for old, new in renames.items():
        if rest == old or rest.startswith(f"{old}."):
            return new + rest[len(old) :]
    return rest
