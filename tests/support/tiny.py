"""A Stable Diffusion folder of a few thousand weights, made from nothing in a second."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from dori_lightning.models.export import weights_of, write_folder, write_single
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.stable_diffusion import StableDiffusion, stable_diffusion
from dori_lightning.planting.recipe import (
    PlantRecipe,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
)

WORDS = ("a", "red", "blue", "boat", "house", "on", "sea", "at", "night", "photo", "of", "cat")


def tiny_recipe(
    *, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", text_width: int = 12
) -> PlantRecipe:
    """32 x 32 pixels, 16 x 16 latents, 8 tokens."""
    return PlantRecipe(
        resolution=32,
        autoencoder_channels=(8, 8),
        latent_channels=4,
        unet_channels=(8, 8, 8, 8),
        heads=2,
        silent_blocks=(),
        text_width=text_width,
        text_layers=1,
        text_heads=2,
        max_length=8,
        prediction_type=prediction_type,
        stream_length=64,
        steps=4,
        batch=4,
        autoencoder_steps=3,
        autoencoder_batch=4,
    )


def write_tiny(folder: Path, recipe: PlantRecipe | None = None, *, seed: int = 0) -> Path:
    """Write a checkpoint with random weights, fp32, and return its folder."""
    return Path(shutil.copytree(_made(recipe or tiny_recipe(), seed), folder, dirs_exist_ok=True))


@cache
def _made(recipe: PlantRecipe, seed: int) -> Path:
    """A folder of this process with a checkpoint, to be copied."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(WORDS, max_length=recipe.max_length)
    components = stable_diffusion(
        unet=build_unet(recipe),
        autoencoder=build_autoencoder(recipe),
        text_encoder=build_text_encoder(
            tokenizer,
            width=recipe.text_width,
            layers=recipe.text_layers,
            heads=recipe.text_heads,
        ),
        tokenizer=tokenizer,
        scheduler=build_scheduler(recipe),
    )
    write_folder(folder, components, weights_of(components, "fp32"))
    return folder


def write_tiny_single(path: Path, recipe: PlantRecipe | None = None) -> Path:
    """Write the same checkpoint as one file in the original layout, and return its path."""
    path.write_bytes(_single(recipe or tiny_recipe()))
    return path


@cache
def _single(recipe: PlantRecipe) -> bytes:
    with tempfile.TemporaryDirectory() as place:
        components = tiny_model(Path(place) / "tiny", recipe).components
        write_single(Path(place) / "one.safetensors", components, weights_of(components))
        return (Path(place) / "one.safetensors").read_bytes()


def tiny_model(
    folder: Path, recipe: PlantRecipe | None = None, *, device: str = "cpu"
) -> StableDiffusion:
    """Write a tiny checkpoint and load it as a user would, in fp32."""
    return load_tiny(str(write_tiny(folder, recipe)), device=device)


def load_tiny(source: str, *, device: str = "cpu") -> StableDiffusion:
    """Load what ``write_tiny`` wrote."""
    return load_checkpoint(name="tiny", source=source, device=device, precision="fp32")
