"""The structural descriptors on real photographs and drawn scenes."""

import pytest
import torch
from torch.nn import functional as F

from dori_lightning.metrics.descriptors import (
    GradientOrientation,
    LocalCorrelation,
    NormalizedCorrelation,
    StructuralSimilarity,
    TiledCorrelation,
    all_pairs_dot,
    blur,
    gaussian_taps,
    thumbnails,
)

CORRELATIONS = [
    NormalizedCorrelation(),
    LocalCorrelation(),
    TiledCorrelation(),
    GradientOrientation(),
]


def _blurred(images, sigma=1.5):
    return blur(images.double(), gaussian_taps(9, sigma)).float().clamp(0, 1)


def _shifted(images):
    return F.pad(images, (1, 0, 0, 0), mode="replicate")[..., :-1]


def test_a_picture_resembles_itself_most(descriptor, photographs):
    similarity = descriptor.similarity(photographs, photographs)
    assert similarity.shape == (8, 8)
    assert similarity.dtype == torch.float32
    assert torch.allclose(similarity.diagonal(), torch.ones(8), atol=1e-5)
    assert (similarity.argmax(1) == torch.arange(8)).all()
    assert similarity.abs().max() <= 1


def test_similarity_is_the_same_in_any_batch_bit_for_bit(descriptor, photographs):
    generated = _blurred(photographs)
    together = descriptor.similarity(generated, photographs)
    for i in range(8):
        assert torch.equal(
            descriptor.similarity(generated[i : i + 1], photographs)[0], together[i]
        )
    many = generated.repeat(9, 1, 1, 1)
    assert torch.equal(
        descriptor.similarity(many, photographs[2:5]), together[:, 2:5].repeat(9, 1)
    )
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    assert torch.equal(
        descriptor.similarity(generated[order], photographs[order]), together[order][:, order]
    )


def test_features_can_be_kept_and_compared_later(descriptor, photographs):
    features = descriptor.describe(photographs)
    assert features.dtype == torch.float32
    assert torch.equal(
        descriptor.compare(features[:3], features),
        descriptor.similarity(photographs[:3], photographs),
    )


@pytest.mark.parametrize("change", [_blurred, _shifted], ids=["blur", "shift"])
def test_a_worn_copy_beats_every_unrelated_picture(descriptor, photographs, change):
    similarity = descriptor.similarity(change(photographs), photographs)
    others = similarity.masked_fill(torch.eye(8, dtype=torch.bool), -1)
    assert (similarity.diagonal() > others.amax(1) + 0.05).all()


@pytest.mark.parametrize("descriptor", CORRELATIONS, ids=lambda d: d.name)
def test_brightness_and_contrast_do_not_count(descriptor, photographs):
    """Almost: what falls under a noise floor is lost."""
    changed = 0.6 * photographs + 0.2
    assert descriptor.similarity(changed, photographs).diagonal().min() > 0.95


def test_normalized_correlation_ignores_contrast_exactly(photographs):
    similarity = NormalizedCorrelation().similarity(0.5 * photographs + 0.25, photographs)
    assert torch.allclose(similarity.diagonal(), torch.ones(8), atol=1e-6)


def _sky_over_ground(horizon, *, seed):
    """A smooth sky over a darker ground with a hint of noise, (1, 3, 64, 64)."""
    rows = torch.linspace(0.9, 0.7, 64).where(torch.arange(64) < horizon, torch.tensor(0.3))
    noise = 0.01 * torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    return (rows[:, None] + noise).clamp(0, 1).expand(1, 3, 64, 64)


def test_a_sky_over_a_ground_is_no_copy_of_another_one():
    """The reason local correlation exists: low frequencies alone make all landscapes alike."""
    a, b = _sky_over_ground(28, seed=0), _sky_over_ground(35, seed=1)
    assert NormalizedCorrelation().similarity(a, b).item() > 0.75
    assert LocalCorrelation().similarity(a, b).item() < 0.3


def test_a_shifted_gradient_is_no_copy():
    """Also not by its borders, which every gradient has."""
    ramp = torch.linspace(0, 1, 72).expand(1, 3, 64, 72)
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(2, 3, 64, 64, generator=generator)
    a, b = (
        (x + n).clamp(0, 1)[None]
        for x, n in zip((ramp[0, ..., :64], ramp[0, ..., 8:]), noise, strict=True)
    )
    assert NormalizedCorrelation().similarity(a, b).item() > 0.95
    assert LocalCorrelation().similarity(a, b).item() < 0.3
    assert LocalCorrelation().similarity(ramp[..., :64], ramp[..., 8:]).item() < 0.3


def test_flat_pictures_resemble_nothing(photographs):
    flat = torch.full((1, 3, 64, 64), 0.5)
    for descriptor in CORRELATIONS:
        assert descriptor.similarity(flat, photographs).abs().max() < 1e-2
        assert descriptor.similarity(photographs, flat).abs().max() < 1e-2
        assert descriptor.similarity(flat, flat).abs().item() < 1e-2


def test_flat_tiles_of_the_original_do_not_count(photographs):
    original = photographs[:1].clone()
    original[..., :32, :] = 0.5
    generated = original.clone()
    generated[..., :32, :] = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(0))
    tiled = TiledCorrelation()
    assert tiled.similarity(generated, original).item() > 0.999
    assert tiled.similarity(original, generated).item() < 0.8


def test_nan_spoils_its_own_row_only(descriptor, photographs):
    broken = photographs.clone()
    broken[3, 0, 5, 5] = torch.nan
    similarity = descriptor.similarity(broken, photographs)
    assert similarity[3].isnan().all()
    keep = [k for k in range(8) if k != 3]
    assert torch.equal(similarity[keep], descriptor.similarity(photographs[keep], photographs))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), "floating"),
        (torch.zeros(1, 1, 8, 8), "floating"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 8, 8), -1.0), r"\[0, 1\]"),
        (torch.full((1, 3, 8, 8), 255.0), "255"),
    ],
)
def test_what_is_no_picture_is_refused(descriptor, images, message):
    with pytest.raises(ValueError, match=message):
        descriptor.describe(images)


def test_thumbnails_average_exactly():
    image = torch.arange(16.0).reshape(1, 1, 4, 4).expand(1, 3, 4, 4) / 16
    small = thumbnails(image, 2)
    expected = torch.tensor([[2.5, 4.5], [10.5, 12.5]]).double() / 16
    assert torch.allclose(small[0, 0], expected, atol=1e-7)


def test_thumbnails_split_shared_pixels():
    image = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8]).expand(1, 3, 5, 5)
    row = thumbnails(image, 2)[0, 0, 0]
    assert torch.allclose(row, torch.tensor([0.16, 0.64]).double(), atol=1e-7)


def test_blur_keeps_the_mean_of_a_constant_and_spreads_a_point():
    taps = gaussian_taps(3, 1.0)
    assert torch.allclose(
        blur(torch.ones(1, 1, 5, 5).double(), taps), torch.ones(1, 1, 5, 5).double()
    )
    point = torch.zeros(1, 1, 5, 5).double()
    point[..., 2, 2] = 1
    assert torch.allclose(blur(point, taps)[0, 0, 1:4, 1:4], taps[:, None] * taps[None])


def test_blur_mirrors_or_continues_at_the_border():
    ramp = torch.arange(6.0).double().expand(1, 1, 6, 6)
    taps = gaussian_taps(5, 1.0)
    assert torch.allclose(blur(ramp, taps, border="continue"), ramp)
    padded = F.pad(ramp, (2,) * 4, mode="reflect")
    kernel = (taps[:, None] * taps[None])[None, None]
    assert torch.allclose(blur(ramp, taps), F.conv2d(padded, kernel))


def test_all_pairs_dot_agrees_with_a_matrix_product():
    generator = torch.Generator().manual_seed(0)
    a = F.normalize(torch.randn(70, 3000, generator=generator), dim=1)
    b = F.normalize(torch.randn(30, 3000, generator=generator), dim=1)
    assert torch.allclose(all_pairs_dot(a, b), a @ b.T, atol=1e-6)


def test_ssim_is_torchmetrics_ssim(photographs):
    from torchmetrics.functional.image import structural_similarity_index_measure

    grey = thumbnails(photographs, 64).float()
    expected = structural_similarity_index_measure(grey[:1], grey[1:2], data_range=1.0)
    found = StructuralSimilarity().similarity(photographs[:1], photographs[1:2])
    assert found.item() == pytest.approx(float(expected), abs=1e-6)
