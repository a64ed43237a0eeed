import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from dori_lightning.mitigations.nemo_criteria import (
    MultiScaleSimilarity,
    fitting,
    noise_difference,
    pairwise_similarity,
)

PUBLISHED = MultiScaleSimilarity()


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(7)
    first = torch.rand(3, 4, 64, 64, generator=generator)
    second = 0.7 * first + 0.3 * torch.rand(3, 4, 64, 64, generator=generator)
    second[1] *= 0.5
    return first, second


def by_hand(first, second, scales, window):
    """The definition, one pixel position at a time, without a library's windows or padding."""
    offsets = torch.arange(window, dtype=torch.float64) - window // 2
    taps = torch.exp(-offsets.square() / (2 * (1.5 * window / 11) ** 2))
    kernel = torch.outer(taps, taps) / taps.sum().square()
    first, second, result = first.double(), second.double(), torch.ones(len(first)).double()
    for scale in range(scales):
        width = max(float(x.max() - x.min()) for x in (first, second))
        c1, c2 = (0.01 * width) ** 2, (0.03 * width) ** 2
        a, b = (x.unfold(2, window, 1).unfold(3, window, 1) for x in (first, second))

        def mean(x):
            return (x * kernel).sum((-2, -1))

        ma, mb = mean(a), mean(b)
        va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
        term = (2 * cov + c2) / (va + vb + c2)
        if scale == scales - 1:
            term = term * (2 * ma * mb + c1) / (ma**2 + mb**2 + c1)
        result = result * term.flatten(1).mean(1).clamp(min=0) ** 0.33
        first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
    return result


def test_values_are_those_of_the_released_library_version(maps):
    # torchmetrics 1.3.2, kernel_size=11, betas=(0.33,) * 3, reduction="none"
    pinned = torch.tensor([0.88662571, 0.58748704, 0.88281965])
    torch.testing.assert_close(PUBLISHED(*maps), pinned, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("scales", "window"), [(3, 11), (2, 7), (1, 5)])
def test_values_are_those_of_the_definition(maps, scales, window):
    found = MultiScaleSimilarity(scales, window)(*maps)
    wanted = by_hand(*maps, scales, window)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


def test_the_installed_library_differs_by_the_border_of_the_last_scale_alone(maps):
    library = multiscale_structural_similarity_index_measure(
        *maps, reduction="none", kernel_size=11, betas=(0.33,) * 3
    )
    found = PUBLISHED(*maps)
    assert (found - library).abs().min() > 1e-3
    coarse = [F.avg_pool2d(F.avg_pool2d(x, 2), 2) for x in maps]
    _, full = structural_similarity_index_measure(
        *coarse, reduction="none", return_full_image=True
    )
    cropped = full[..., 5:-5, 5:-5]
    assert cropped.shape[-2:] == (6, 6)
    swapped = library * (cropped.flatten(1).mean(1) / full.flatten(1).mean(1)) ** 0.33
    torch.testing.assert_close(found, swapped, rtol=0, atol=2e-6)


def test_equal_maps_are_fully_similar_and_inverted_ones_not_at_all(maps):
    first = maps[0]
    assert torch.equal(PUBLISHED(first, first), torch.ones(3))
    assert torch.equal(PUBLISHED(first, 1 - first), torch.zeros(3))


def test_the_range_of_values_is_that_of_the_call(maps):
    first, second = maps
    alone, together = PUBLISHED(first[:1], second[:1]), PUBLISHED(first[:2], second[:2])
    assert alone[0] != together[0] or alone[0] != PUBLISHED(first * 2, second)[0]
    wide = torch.cat([second[:1], 100 * second[1:2]])
    assert abs(PUBLISHED(first[:2], wide)[0] - alone[0]) > 1e-2


def test_small_latents_get_fewer_scales_and_then_smaller_windows():
    assert [fitting(side).scales for side in (96, 64, 63, 32, 31, 16, 8)] == [3, 3, 2, 2, 1, 1, 1]
    windows = [fitting(side).window for side in (64, 48, 32, 24, 16, 12, 8, 4)]
    assert windows == [11, 11, 7, 11, 7, 5, 3, 3]
    for side in (*range(3, 34, 3), 63, 64, 97):
        first = torch.rand(1, 2, side, side)
        assert 0 <= float(fitting(side)(first, torch.rand(1, 2, side, side))) <= 1


def test_noise_differences_fill_the_unit_range_by_sample_and_channel():
    noise, latents = torch.randn(2, 3, 8, 8) * 5, torch.randn(2, 3, 8, 8)
    scaled = noise_difference(noise, latents)
    assert torch.equal(scaled.amin((-2, -1)), torch.zeros(2, 3))
    assert torch.equal(scaled.amax((-2, -1)), torch.ones(2, 3))
    order = (noise - latents).flatten(2).argsort(-1)
    assert torch.equal(order, scaled.flatten(2).argsort(-1))
    assert torch.equal(noise_difference(latents, latents), torch.zeros_like(latents))


def test_pairwise_similarity_compares_each_two_samples_in_one_call():
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(4, 2, 16, 16, generator=generator)
    similarity = fitting(16)
    matrix = pairwise_similarity(maps, similarity)
    first, second = [0, 0, 0, 1, 1, 2], [1, 2, 3, 2, 3, 3]
    assert torch.equal(matrix[first, second], similarity(maps[first], maps[second]))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.zeros(4))
