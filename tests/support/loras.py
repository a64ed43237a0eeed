"""LoRA files for tiny checkpoints, in the layouts that trainers write, and what they change."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.original_layout import original_names

LAYOUTS = ("peft", "sd-scripts", "old diffusers")

_LAST = {
    "unet": ("attn2.to_k", "attn1.to_out.0", "ff.net.2", "proj_in", "resnets.0.conv1"),
    "transformer": ("attn.to_q", "attn.add_v_proj", "ff.net.0.proj", "norm.linear"),
    "text_encoder": ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"),
}

_OLD = {
    "to_q": "processor.to_q_lora", "to_k": "processor.to_k_lora", "to_v": "processor.to_v_lora",
    "to_out.0": "processor.to_out_lora", "q_proj": "to_q_lora", "out_proj": "to_out_lora",
}  # fmt: skip

_FLUX = {
    "transformer_blocks.0.attn.to_q+transformer_blocks.0.attn.to_k+transformer_blocks.0.attn.to_v":
    "double_blocks_0_img_attn_qkv",
    "transformer_blocks.1.attn.to_add_out": "double_blocks_1_txt_attn_proj",
    "transformer_blocks.0.ff.net.0.proj": "double_blocks_0_img_mlp_0",
    "single_transformer_blocks.1.proj_out": "single_blocks_1_linear2",
}  # fmt: skip
"""Layers, joined with ``+`` where one of sd-scripts' holds several, to its names in FLUX.1."""


def chosen_layers(model: LatentDiffusion, component: str) -> dict[str, torch.Tensor]:
    """Name and weight of some layers of every kind, those of one block first."""
    module = model.components.modules[component]
    wanted = _LAST[component.removesuffix("_2")]
    return {name: layer.weight for name, layer in module.named_modules() if name.endswith(wanted)}


def write_lora(
    path: Path,
    model: LatentDiffusion,
    layout: str = "peft",
    *,
    components: tuple[str, ...] | None = None,
    alpha: float | None = 3.0,
    rank: int = 2,
    size: float = 0.1,
    seed: int = 0,
    notes: dict[str, str] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a random LoRA that fits a model.

    Args:
        path: Where.
        model: Tiny, of any family.
        layout: One of ``LAYOUTS``.
        components: Denoiser and text encoders that it changes; None for all that can be.
        alpha: In sd-scripts' layout; the others have none.
        rank: Of every layer.
        size: Standard deviation of the change's factors.
        seed: Of the values.
        notes: What the header says.

    Returns:
        ``component.name`` of each changed weight to its change at scale 1.
    """
    generator = torch.Generator().manual_seed(seed)
    family = model.family
    if components is None:
        encoders = ("text_encoder",) if family.name in ("sd", "flux") else (
            "text_encoder", "text_encoder_2",
        )  # fmt: skip
        components = (family.denoiser, *encoders)
    tensors, changes = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    factor = alpha / rank if layout == "sd-scripts" and alpha is not None else 1.0
    for component in components:
        module: Any = model.components.modules[component]
        weights = module.state_dict()
        for names, called in _called(model, component, layout):
            shapes = [weights[f"{name}.weight"].shape for name in names]
            down = torch.randn(rank, *shapes[0][1:], generator=generator) * size
            outputs = [shape[0] for shape in shapes]
            kernel = (1,) * (len(shapes[0]) - 2)
            up = torch.randn(sum(outputs), rank, *kernel, generator=generator) * size
            ends = {
                "peft": ("lora_A", "lora_B"),
                "sd-scripts": ("lora_down", "lora_up"),
                "old diffusers": ("down", "up"),
            }[layout]
            tensors[f"{called}.{ends[0]}.weight"] = down
            tensors[f"{called}.{ends[1]}.weight"] = up
            if layout == "sd-scripts" and alpha is not None:
                tensors[f"{called}.alpha"] = torch.tensor(alpha)
            change = factor * (up.flatten(1) @ down.flatten(1))
            for name, own, shape in zip(names, change.split(outputs), shapes, strict=True):
                changes[f"{component}.{name}"] = own.reshape(shape)
    save_file(tensors, path, metadata={"format": "pt", **(notes or {})})
    return changes


def _called(
    model: LatentDiffusion, component: str, layout: str
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Layers of a component that share a LoRA layer, and what the layout calls it."""
    family, names = model.family.name, list(chosen_layers(model, component))
    if layout == "sd-scripts" and component == "transformer":
        yield from ((tuple(own.split("+")), f"lora_unet_{name}") for own, name in _FLUX.items())
        return
    original = dict[str, str]()
    if component == "unet" and layout == "sd-scripts":
        whole = model.components.modules["unet"].state_dict()
        original = {own: old for old, (own,) in original_names("unet", whole).items()}
    for name in names:
        public = name
        if component.startswith("text_encoder") and not name.startswith("text_model."):
            public = f"text_model.{name}"
        if layout == "peft":
            yield (name,), f"{component}.{public}"
        elif layout == "old diffusers":
            last = next((end for end in _OLD if public.endswith(f".{end}")), None)
            if last is None:
                middle = ".lora_linear_layer" if component.startswith("text") else ".lora"
                yield (name,), f"{component}.{public}{middle}"
            else:
                yield (name,), f"{component}.{public.removesuffix(last)}{_OLD[last]}"
        elif component == "unet":
            if family == "sdxl":  # trained on the original UNet
                public = original[f"{name}.weight"].removesuffix(".weight")
            yield (name,), f"lora_unet_{public.replace('.', '_')}"
        else:
            number = {"text_encoder": "1", "text_encoder_2": "2"}[component]
            prefix = "lora_te" if family == "sd" else f"lora_te{number}"
            yield (name,), f"{prefix}_{public.replace('.', '_')}"
