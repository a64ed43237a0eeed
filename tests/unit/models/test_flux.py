"""What FLUX.1 has that no other family has; ``contract/test_families.py`` tests the rest."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from dori_lightning.models.export import weights_of, write_folder
from dori_lightning.models.flux import Flux
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import InputError
from support.families import drawn_by_diffusers, folder_of, load_family, tiny_flux

DEV = Sampling("flow_euler", 3, 1.0, distilled_guidance=3.5)
SCHNELL = Sampling("flow_euler", 3, 1.0)


@pytest.fixture(scope="module")
def dev():
    return load_family("flux")


@pytest.fixture(scope="module")
def schnell_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("schnell")
    torch.manual_seed(0)
    components = tiny_flux(distilled=False)
    write_folder(folder, components, weights_of(components, "fp32"))
    return folder


@pytest.mark.parametrize("resolution", [32, 48])
def test_schnell_has_no_guidance_and_no_shift(schnell_folder, resolution):
    model = load_family("flux", source=str(schnell_folder), resolution=resolution)
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    ours = model.generate(model.encode_prompts(["a red boat"]), noise, SCHNELL)
    theirs = drawn_by_diffusers(model, "a red boat", noise, SCHNELL, folder=schnell_folder)
    assert (ours - theirs).abs().max() < 1e-4
    levels = model.scheduler_of(SCHNELL).sigmas
    assert torch.allclose(levels, torch.tensor([1, 2 / 3, 1 / 3, 0]))


def test_larger_images_stay_noisy_longer(dev):
    def middle(resolution: int) -> float:
        return float(load_family("flux", resolution=resolution).scheduler_of(DEV).sigmas[1])

    assert 2 / 3 < middle(24) < middle(96)
    # in training there is no shift: the middle timestep is half noise
    assert float(dev.scales(torch.tensor([499]))[1]) == pytest.approx(0.5)


def test_guidance_is_an_input_of_dev_alone(dev, schnell_folder):
    schnell = load_family("flux", source=str(schnell_folder))
    for model, sampling in ((dev, SCHNELL), (schnell, DEV)):
        with pytest.raises(InputError, match=r"sampling\.distilled_guidance"):
            model.scheduler_of(sampling)


def test_losses_are_at_guidance_one_and_time_is_a_share(dev):
    told: list[tuple[float, float]] = []

    def listen(_, __, given):
        told.append((float(given["guidance"][0]), float(given["timestep"][0])))

    noise = torch.randn(1, *dev.latent_shape)
    embedding = dev.encode_prompts(["a cat"])
    with dev.denoiser().register_forward_pre_hook(listen, with_kwargs=True), torch.no_grad():
        dev.denoising_loss(noise, noise, torch.tensor([249]), embedding)
        dev.denoise(embedding, noise, DEV)
    assert told[0] == (1.0, pytest.approx(0.25))
    assert told[1] == (3.5, 1.0)


def test_single_blocks_are_refused_with_the_reason(dev):
    assert dev.stages == ("double",)
    for role in ("text.value", "feed_forward.out"):
        with pytest.raises(InputError, match="tokens of text and of the image"):
            dev.layers(role, ["double", "single"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"in_channels": 96, "out_channels": 64}, "inpainting"),
        ({"pooled_projection_dim": 24}, "pooled_projection_dim"),
        ({"joint_attention_dim": 24}, "joint_attention_dim"),
    ],
)
def test_other_models_are_none_of_the_family(changes, says):
    components = tiny_flux()
    assert not list(Flux.unlike_the_family(components))
    other = FluxTransformer2DModel.from_config({**components.denoiser.config, **changes})
    ((what, blamed),) = Flux.unlike_the_family(components.with_module("transformer", other))
    assert says in what
    assert "transformer" in blamed


def test_t5_takes_as_many_tokens_as_asked_for(dev, tmp_path):
    short = load_family("flux", prompt_tokens=6)
    assert short.embedding_shape == (7, 32)
    assert short.fingerprint != dev.fingerprint
    write_folder(tmp_path, short.components, weights_of(short.components))
    assert load_family("flux", source=str(tmp_path)).fingerprint == short.fingerprint
    for count in (2, 13):
        with pytest.raises(InputError, match=r"checkpoint\.prompt_tokens"):
            load_family("flux", prompt_tokens=count)
    with pytest.raises(InputError, match=r"checkpoint\.prompt_tokens"):
        load_family("sd", prompt_tokens=6)


def test_a_transformer_of_other_files_takes_the_checkpoints_place(dev, tmp_path):
    shutil.copytree(folder_of("flux") / "transformer", tmp_path / "transformer")
    again = load_family("flux", transformer=str(tmp_path / "transformer"))
    assert again.fingerprint == dev.fingerprint
    assert [part.part for part in again.replaced] == ["transformer"]
