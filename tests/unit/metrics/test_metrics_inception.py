from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models.inception import Inception3

from dori_lightning.metrics.image_distances import InceptionFeatures, _prepare, fid_inception
from dori_lightning.types import InputError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = fid_inception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def features(weights):
    return InceptionFeatures(weights, batch=2)


def test_padding_does_not_dilute_the_pooled_branches(features):
    network = features.network
    x = torch.ones(1, 192, 5, 5)
    seen = []
    branch = network.get_submodule("Mixed_5b.branch_pool")
    branch.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    network.get_submodule("Mixed_5b")(x)
    assert torch.allclose(seen[0], torch.ones(1, 192, 5, 5)), "the average of ones is one"
    plain = F.avg_pool2d(x, 3, 1, 1)
    assert plain[0, 0, 0, 0] == pytest.approx(4 / 9), "torchvision's own counts the padding"


def test_the_last_block_pools_by_the_maximum(features):
    network = features.network
    x = torch.rand(1, 2048, 8, 8, generator=torch.Generator().manual_seed(1))
    seen = []
    branch = network.get_submodule("Mixed_7c.branch_pool")
    branch.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    network.get_submodule("Mixed_7c")(x)
    assert torch.equal(seen[0], F.max_pool2d(x, 3, 1, 1))


def test_only_the_pooled_branches_differ_from_torchvision(weights):
    state = torch.load(weights, weights_only=True)
    theirs = Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("side", [64, 512])
def test_pictures_are_scaled_as_pillow_does_on_float_channels(side):
    generator = torch.Generator().manual_seed(side)
    pixels = torch.randint(0, 256, (1, 3, side, side), generator=generator, dtype=torch.uint8)
    ours = _prepare(pixels.float() / 255)[0] * 128 + 128
    for channel in range(3):
        plane = Image.fromarray(pixels[0, channel].numpy().astype(np.float32))
        theirs = np.asarray(plane.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
        assert np.abs(ours[channel].numpy() - theirs).max() < 0.01


def test_a_picture_has_the_same_features_in_any_company(features):
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    found = features.describe(images)
    assert found.shape == (2, features.dimension) == (2, 2048)
    assert found.dtype == torch.float64
    assert torch.equal(features.describe(images[1:]), found[1:])
    assert not torch.allclose(found[0], found[1])


def test_wrong_files_are_refused_with_their_reason(weights, tmp_path):
    with pytest.raises(InputError, match="cannot read the weights"):
        InceptionFeatures(tmp_path / "nothing.pth")
    with pytest.raises(InputError, match="expected 00"):
        InceptionFeatures(weights, sha256="00")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="no safetensors or torch weight file"):
        InceptionFeatures(tmp_path / "text.pth")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    for name in ("other.pth", "other.safetensors"):
        with pytest.raises(InputError, match="does not hold the weights of FID's Inception"):
            InceptionFeatures(tmp_path / name)
    with pytest.raises(InputError, match="batch"):
        InceptionFeatures(weights, batch=0)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="no safetensors or torch weight file"):
        InceptionFeatures(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
