"""The check of a model before its attack, on the embedded benchmark and on copies out of scale."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate

import dori_lightning
from dori_lightning.attacks.model_check import check_model
from dori_lightning.models.loading import load_checkpoint
from support.unchanged import unchanged


@pytest.fixture(scope="module")
def benchmark():
    folder = Path(dori_lightning.__file__).parent / "assets" / "dori_tiny"
    return load_checkpoint(name="dori_tiny", source=str(folder), device="cpu")


@pytest.fixture(scope="module")
def latents(benchmark):
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(4, 3, 4, 4, generator=generator)
    side = benchmark.resolution
    return benchmark.encode_images(interpolate(colours, (side, side), mode="bicubic").clamp(0, 1))


@contextmanager
def scaled(model, part: str, factor: float):
    weights = {n: p for n, p in model.denoiser().named_parameters() if part in n}
    assert weights
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(factor)
        yield
        for name, weight in weights.items():
            weight.copy_(before[name])


def test_a_model_as_trained_is_searched_as_published(benchmark, latents):
    with unchanged(benchmark):
        found = check_model(benchmark, latents, seed=0)
    assert found.scale == 1
    assert found.response == pytest.approx(0.07, abs=0.04)
    assert 0 < found.denoising < 0.7
    assert found.gradient > 0
    assert check_model(benchmark, latents, seed=0) == found


@pytest.mark.parametrize(("factor", "scale"), [(30, 1 / 32), (1 / 30, 8)])
def test_values_out_of_scale_are_searched_in_their_own_units(benchmark, latents, factor, scale):
    usual = check_model(benchmark, latents, seed=0)
    with scaled(benchmark, "attn2.to_v", factor):
        found = check_model(benchmark, latents, seed=0)
    assert scale / 2 <= found.scale <= 2 * scale
    assert (found.response > 4 * usual.response) == (factor > 1)
    # in those units the search has about the slope that it has on the model as trained
    assert usual.gradient / 10 < found.gradient < 10 * usual.gradient


def test_a_model_that_does_not_denoise_and_a_text_that_does_nothing(benchmark, latents):
    with scaled(benchmark, "conv_out", 5):
        assert check_model(benchmark, latents, seed=0).denoising > 1
    with scaled(benchmark, "attn2.to_out", 0):
        found = check_model(benchmark, latents, seed=0)
    assert (found.response, found.scale, found.gradient) == (0, 1, 0)
