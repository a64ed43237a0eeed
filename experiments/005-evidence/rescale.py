"""Copies of the embedded benchmark that hold what it holds, and on which a search goes wrong.

``python rescale.py FOLDER`` writes a checkpoint for each case into a folder of its name.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dori_lightning.models.loading import resolve_source

Change = Callable[[str, torch.Tensor], torch.Tensor]


def times(part: str, factor: float) -> Change:
    """Multiply the weights whose name contains a part."""
    return lambda name, tensor: tensor * factor if part in name else tensor


def blurred(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Give the autoencoder's last convolution the same weight in every place of its window."""
    if name != "decoder.conv_out.weight":
        return tensor
    return tensor.mean((2, 3), keepdim=True).expand_as(tensor)


def noisy(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Add as much noise to the words' embeddings as they have spread."""
    if not name.endswith("token_embedding.weight"):
        return tensor
    return tensor + tensor.std() * torch.randn(tensor.shape, generator=torch.Generator())


UNET, ENCODER, AUTOENCODER = (
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
CASES: dict[str, tuple[str, Change]] = {
    f"{name}_{sign}30": (file, times(part, 30.0 if sign == "x" else 1 / 30))
    for name, file, part in (
        ("values", UNET, "attn2.to_v"),
        ("keys", UNET, "attn2.to_k"),
        ("outputs", UNET, "attn2.to_out.0.weight"),
        ("timesteps", UNET, "time_embedding.linear_2"),
        ("text_encoder", ENCODER, "final_layer_norm"),
    )
    for sign in ("x", "d")
} | {"noisy_words": (ENCODER, noisy), "blurred": (AUTOENCODER, blurred)}


def main(folder: Path) -> None:
    """Write every case."""
    for name, (file, change) in CASES.items():
        shutil.copytree(resolve_source("package:dori_tiny"), folder / name, dirs_exist_ok=True)
        tensors = load_file(folder / name / file)
        changed = {
            key: change(key, tensor.float()).to(tensor.dtype).contiguous()
            for key, tensor in tensors.items()
        }
        save_file(changed, folder / name / file, metadata={"format": "pt"})
        print(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
