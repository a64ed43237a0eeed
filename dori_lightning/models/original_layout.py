"""Names of Stable Diffusion's tensors in the original layout, from their names in diffusers.

The layout is that of the single files of CompVis and Stability: ``model.diffusion_model`` numbers
all layers of the UNet in execution order, ``first_stage_model`` is the autoencoder,
``cond_stage_model`` the text encoder: OpenAI's in version 1, OpenCLIP's in version 2.
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

__all__ = [
    "autoencoder_names",
    "original_state",
    "text_encoder_state",
    "unet_names",
    "write_single_file",
]

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


def text_encoder_state(
    tensors: Mapping[str, torch.Tensor], *, open_clip: bool
) -> dict[str, torch.Tensor]:
    """Text encoder's tensors under their names below ``cond_stage_model``.

    Args:
        tensors: Those of a ``CLIPTextModel``.
        open_clip: Whether the checkpoint is of version 2, whose encoder is OpenCLIP's: queries,
            keys and values are one tensor there.
    """
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    bare = {name: t for name, t in bare.items() if not name.endswith("position_ids")}
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


def original_state(
    *,
    unet: Mapping[str, torch.Tensor],
    autoencoder: Mapping[str, torch.Tensor],
    text_encoder: Mapping[str, torch.Tensor],
    open_clip: bool = False,
) -> dict[str, torch.Tensor]:
    """Tensors of a whole checkpoint in the original layout.

    Args:
        unet: Tensors of diffusers' ``UNet2DConditionModel``.
        autoencoder: Those of ``AutoencoderKL``.
        text_encoder: Those of a ``CLIPTextModel``.
        open_clip: See ``text_encoder_state``.
    """
    depth = [
        int(m[1]) for name in unet if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", name))
    ]
    names = unet_names(list(unet), layers_per_block=1 + max(depth))
    state = {f"model.diffusion_model.{new}": unet[old] for old, new in names.items()}
    for old, new in autoencoder_names(list(autoencoder)).items():
        tensor = autoencoder[old]
        if ".attn_1." in new and new.endswith("weight") and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]  # the original attention is a 1 x 1 convolution
        state[f"first_stage_model.{new}"] = tensor
    for name, tensor in text_encoder_state(text_encoder, open_clip=open_clip).items():
        state[f"cond_stage_model.{name}"] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def write_single_file(
    path: Path, *, unet: nn.Module, autoencoder: nn.Module, text_encoder: nn.Module
) -> None:
    """Write a Stable Diffusion v1 checkpoint as one safetensors file in the original layout."""
    state = original_state(
        unet=unet.state_dict(),
        autoencoder=autoencoder.state_dict(),
        text_encoder=text_encoder.state_dict(),
    )
    save_file(state, path, metadata={"format": "pt"})
