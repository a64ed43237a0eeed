"""Equal shapes are not enough: a row's bits must not depend on its place in a batch either.

What a pair, an image or a prompt gives is promised to be the same in any company. On the CPU all
batches have one shape, and each network that is run in batches is held to the rest of the promise
here: the same row at every place. Networks whose kernels do not keep it on every processor, such
as LPIPS' (large strides), take their rows one by one; see ``descriptors.in_fixed_batches``.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dori_lightning
from dori_lightning.models.generation import CPU_IMAGES
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.stable_diffusion import StableDiffusion

Batch = dict[str, torch.Tensor]


def predicted(model: StableDiffusion, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.predict_noise(batch["noise"], batch["timesteps"], batch["embeddings"])


def gradient(model: StableDiffusion, batch: Batch) -> torch.Tensor:
    embeddings = batch["embeddings"].clone().requires_grad_(True)
    with model.frozen(), torch.enable_grad():
        loss = model.denoising_loss(
            batch["latents"], batch["noise"], batch["timesteps"], embeddings
        )
        (found,) = torch.autograd.grad(loss.sum(), embeddings)
    return torch.cat([found.flatten(1), loss.detach()[:, None]], 1)


def decoded(model: StableDiffusion, batch: Batch) -> torch.Tensor:
    return model.decode_latents(batch["latents"])


def check_every_place(model: StableDiffusion, network: Callable[..., torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(CPU_IMAGES, *model.latent_shape, generator=generator),
        "noise": torch.randn(CPU_IMAGES, *model.latent_shape, generator=generator),
        "timesteps": torch.randint(1000, (CPU_IMAGES,), generator=generator),
        "embeddings": torch.randn(CPU_IMAGES, *model.embedding_shape, generator=generator),
    }
    rows = network(model, batch)
    for chosen in (0, 7, CPU_IMAGES - 1):
        # the same row at all places at once
        alike = {name: v[chosen].expand_as(v).contiguous() for name, v in batch.items()}
        for place, row in enumerate(network(model, alike)):
            assert torch.equal(row, rows[chosen]), f"row {chosen} at place {place}"


@pytest.mark.parametrize("network", [predicted, gradient, decoded])
def test_a_row_has_the_same_bits_at_every_place_of_its_batch(model, network):
    check_every_place(model, network)


@pytest.mark.slow
@pytest.mark.parametrize("network", [predicted, gradient, decoded])
def test_a_row_of_the_embedded_benchmark_has_the_same_bits_at_every_place(network):
    folder = Path(dori_lightning.__file__).parent / "assets" / "dori_tiny"
    model = load_checkpoint(name="dori_tiny", source=str(folder), device="cpu")
    check_every_place(model, network)


def test_prompts_and_images_are_encoded_as_if_alone(model):
    prompts = ["a cat", "a boat at night", "a red house"]
    images = torch.rand(3, 3, model.resolution, model.resolution)
    embeddings, latents = model.encode_prompts(prompts), model.encode_images(images)
    for place, prompt in enumerate(prompts):
        assert torch.equal(model.encode_prompts([prompt])[0], embeddings[place])
        assert torch.equal(model.encode_images(images[place : place + 1])[0], latents[place])
