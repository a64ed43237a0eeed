"""Names of Stable Diffusion's tensors in the original layout, from their names in diffusers.

The layout is that of the single files of CompVis and Stability: ``model.diffusion_model`` numbers
all layers of the UNet in execution order, ``first_stage_model`` is the autoencoder,
``cond_stage_model`` the text encoder.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn

__all__ = ["autoencoder_names", "unet_names", "write_single_file"]

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
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _inner(rest: str, renames: Mapping[str, str]) -> str:
    for old, new in renames.items():
        if rest == old or rest.startswith(f"{old}."):
            return new + rest[len(old) :]
    return rest


def unet_names(names: list[str], *, layers_per_block: int = 2) -> dict[str, str]:
    """Original name of each UNet tensor.

    Args:
        names: Names in diffusers' ``UNet2DConditionModel``.
        layers_per_block: Resnets per down block; up blocks have one more.

    Raises:
        ValueError: A name that the layout has no place for.
    """
    attended = {m[1] for n in names if (m := re.match(r"up_blocks\.(\d+)\.attentions", n))}
    result = {}
    for name in names:
        outer = next((o for o in _OUTER if name.startswith(f"{o}.")), None)
        if outer is not None:
            result[name] = _OUTER[outer] + name[len(outer) :]
            continue
        match = re.match(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)",
            name,
        )
        middle = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
        if middle is not None:
            kind, k, rest = middle[1], int(middle[2]), middle[3]
            place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * k}"
            result[name] = f"{place}.{_inner(rest, _RESNET) if kind == 'resnets' else rest}"
        elif match is not None:
            side, block, kind, k, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            if kind == "downsamplers":
                place, rest = (
                    f"input_blocks.{(layers_per_block + 1) * (block + 1)}.0",
                    rest.replace("conv.", "op."),
                )
            elif kind == "upsamplers":
                number = (layers_per_block + 1) * block + layers_per_block
                place = f"output_blocks.{number}.{2 if str(block) in attended else 1}"
            else:
                number = (layers_per_block + 1) * block + k
                row = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
                place = f"{row}.{0 if kind == 'resnets' else 1}"
                rest = _inner(rest, _RESNET) if kind == "resnets" else rest
            result[name] = f"{place}.{rest}"
        else:
            raise ValueError(f"the original layout has no place for the UNet tensor {name}")
    return result


def autoencoder_names(names: list[str]) -> dict[str, str]:
    """Original name of each autoencoder tensor.

    The original layout numbers the decoder's levels from the output.
    """
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
            level = (
                f"{side}.down.{block}" if side == "encoder" else f"{side}.up.{levels - 1 - block}"
            )
            rest = rest.replace("conv_shortcut", "nin_shortcut")
            part = {
                "resnets": f"block.{k}",
                "downsamplers": "downsample",
                "upsamplers": "upsample",
            }[kind]
            result[name] = f"{level}.{part}.{rest}"
        elif middle is not None:
            side, kind, k, rest = middle[1], middle[2], int(middle[3]), middle[4]
            if kind == "attentions":
                result[name] = f"{side}.mid.attn_1.{_inner(rest, _ATTENTION)}"
            else:
                result[name] = f"{side}.mid.block_{k + 1}.{rest}"
        else:
            result[name] = name.replace("conv_norm_out", "norm_out")
    return result


def write_single_file(
    path: Path, *, unet: nn.Module, autoencoder: nn.Module, text_encoder: nn.Module
) -> None:
    """Write a Stable Diffusion v1 checkpoint as one safetensors file in the original layout."""
    state: dict[str, torch.Tensor] = {}
    for prefix, module, rename in (
        ("model.diffusion_model", unet, unet_names),
        ("first_stage_model", autoencoder, autoencoder_names),
    ):
        tensors = module.state_dict()
        for old, new in rename(list(tensors)).items():
            tensor = tensors[old]
            if ".attn_1." in new and new.endswith("weight") and tensor.dim() == 2:
                tensor = tensor[:, :, None, None]  # the original attention is a 1 x 1 convolution
            state[f"{prefix}.{new}"] = tensor.detach().cpu().contiguous().clone()
    for name, tensor in text_encoder.state_dict().items():
        inner = name if name.startswith("text_model.") else f"text_model.{name}"
        state[f"cond_stage_model.transformer.{inner}"] = tensor.detach().cpu().contiguous().clone()
    save_file(state, path, metadata={"format": "pt"})
