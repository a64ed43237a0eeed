"""SSCD from local files: tiny programs and random weights, no real ones."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dori_lightning.metrics.sscd import SSCD, GeneralizedMean, SSCDNet, _prepare
from dori_lightning.types import InputError


class _Tiny(nn.Module):
    """Means of nine patches: a program that runs in no time."""

    def forward(self, x):
        return torch.nn.functional.normalize(
            torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(1)
        )


def _hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("sscd") / "tiny.torchscript.pt"
    torch.jit.script(_Tiny()).save(str(path))
    return path


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return SSCDNet().eval()


def test_a_pinned_program_describes(program, photographs):
    sscd = SSCD(program, sha256=_hash(program).upper())
    assert (sscd.name, sscd.threshold) == ("sscd", 0.7)
    features = sscd.describe(photographs)
    assert features.shape == (8, 27)
    assert torch.allclose(features.norm(dim=1), torch.ones(8), atol=1e-6)
    similarity = sscd.similarity(photographs, photographs)
    assert torch.allclose(similarity.diagonal(), torch.ones(8), atol=1e-5)
    alone = torch.cat([sscd.similarity(x[None], photographs) for x in photographs])
    assert torch.equal(alone, similarity)


def test_a_program_without_hash_does_not_run(program):
    with pytest.raises(InputError, match=f"sha256={_hash(program)}"):
        SSCD(program)


def test_a_wrong_hash_is_refused(program):
    with pytest.raises(InputError, match="expected 00"):
        SSCD(program, sha256="00" * 32)


def test_a_missing_file_is_refused_at_once(tmp_path):
    with pytest.raises(InputError, match=r"none\.pt.*nothing is downloaded"):
        SSCD(tmp_path / "none.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_rubbish_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>not found</html>")
    with pytest.raises(InputError, match="no safetensors file"):
        SSCD(tmp_path / name)


def test_another_layout_is_refused(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="1 unknown"):
        SSCD(tmp_path / "other.safetensors")


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"hook": print}, tmp_path / "evil.pt")
    with pytest.raises(InputError):
        SSCD(tmp_path / "evil.pt")


def test_weights_describe_alike_from_either_file(tmp_path, network, photographs):
    save_file(network.state_dict(), tmp_path / "sscd.safetensors")
    torch.save(network.state_dict(), tmp_path / "sscd.torchvision.pt")
    images = photographs[:2]
    sscd = SSCD(tmp_path / "sscd.safetensors")
    first = sscd.describe(images)
    second = SSCD(tmp_path / "sscd.torchvision.pt").describe(images)
    with torch.no_grad():
        direct = network(_prepare(images))
    assert first.shape == (2, 512)
    assert torch.equal(first, second)
    assert torch.equal(sscd.describe(images[1:]), first[1:]), "the same alone and in a batch"
    assert torch.allclose(first, direct, atol=1e-5)


def test_generalized_mean_lies_between_average_and_maximum():
    x = torch.rand(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    pooled = GeneralizedMean()(x)[..., 0, 0]
    assert torch.allclose(GeneralizedMean(1.0)(x)[..., 0, 0], x.mean((2, 3)), atol=1e-6)
    assert (pooled > x.mean((2, 3))).all()
    assert (pooled < x.amax((2, 3))).all()


def test_images_are_squared_to_320_pixels_and_normalised():
    prepared = _prepare(torch.ones(1, 3, 60, 100))
    assert prepared.shape == (1, 3, 320, 320)
    red = prepared[0, 0]
    assert red.mean().item() == pytest.approx((1 - 0.485) / 0.229, abs=1e-4)
