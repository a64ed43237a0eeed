"""Names of tensors in the single files of CompVis and Stability, from those in diffusers.

``model.diffusion_model`` numbers all layers of the UNet in execution order, ``first_stage_model``
is the autoencoder, ``cond_stage_model`` the text encoder: OpenAI's in version 1, OpenCLIP's in
version 2. XL has both, below ``conditioner.embedders``.
"""

import re
from collections.abc import Iterable, Mapping

from dori_lightning.models.components import Component

PREFIXES: Mapping[str, Mapping[Component, str]] = {
    "sd": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.",
    },
    "sdxl": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.",
        "text_encoder_2": "conditioner.embedders.1.",
    },
}
"""What the original names of each component begin with, by family; others have no single files
with all components."""


def original_names(
    component: Component, names: Iterable[str], *, open_clip: bool = False
) -> dict[str, tuple[str, ...]]:
    """Original name, without the component's prefix, to the names of the tensors that are in it.

    One tensor each, but for OpenCLIP's queries, keys and values: those are one tensor, whose
    thirds along the first axis are in this order.

    Args:
        component: Of which component.
        names: All its names in diffusers or transformers; ``position_ids`` are left out.
        open_clip: Whether the text encoder is OpenCLIP's, of version 2.

    Raises:
        ValueError: A name that the layout has no place for.
    """
    names = list(names)
    if component not in ("unet", "vae") and not component.startswith("text_encoder"):
        raise ValueError(f"the original layout has no place for the {component}")
    if component == "unet":
        return {new: (old,) for old, new in _unet_names(names).items()}
    if component == "vae":
        return {new: (old,) for old, new in _autoencoder_names(names).items()}
    return _text_encoder_names(names, open_clip=open_clip)


def is_original_convolution(component: Component, original: str) -> bool:
    """Whether the original is a 1 x 1 convolution where diffusers may have a matrix."""
    return component == "vae" and ".attn_1." in original and original.endswith("weight")


def is_original_transposed(original: str) -> bool:
    """Whether the original is the transpose of the library's matrix."""
    return original.endswith("text_projection")


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
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
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
            component = f"block.{k}" if kind == "resnets" else kind.removesuffix("rs")
            rest = rest.replace("conv_shortcut", "nin_shortcut")
            result[name] = f"{side}.{level}.{component}.{rest}"
        elif middle is not None:
            side, kind, k, rest = middle[1], middle[2], middle[3], middle[4]
            if kind == "attentions":
                result[name] = f"{side}.mid.attn_1.{_renamed(rest, _ATTENTION)}"
            else:
                result[name] = f"{side}.mid.block_{int(k) + 1}.{rest}"
        else:
            result[name] = name.replace("conv_norm_out", "norm_out")
    return result


def _text_encoder_names(names: list[str], *, open_clip: bool) -> dict[str, tuple[str, ...]]:
    """Original name of each tensor of a ``CLIPTextModel``, and what is joined in it."""
    result: dict[str, tuple[str, ...]] = {}
    for name in names:
        bare = name.removeprefix("text_model.")
        if bare.endswith("position_ids"):
            continue
        if bare == "text_projection.weight":
            result["model.text_projection"] = (name,)
            continue
        if not open_clip:
            result[f"transformer.text_model.{bare}"] = (name,)
            continue
        joined = re.sub(r"\.[qkv]_proj\.", ".in_proj_", bare)
        parts: tuple[str, ...] = (name,)
        if joined != bare:
            parts = tuple(re.sub(r"\.[qkv]_proj\.", f".{one}_proj.", name) for one in "qkv")
        for old, new in _OPEN_CLIP.items():
            joined = joined.replace(old, new)
        result[f"model.{joined}"] = parts
    return result


def _renamed(rest: str, renames: Mapping[str, str]) -> str:
    for old, new in renames.items():
        if rest == old or rest.startswith(f"{old}."):
            return new + rest[len(old) :]
    return rest
