import math
import warnings

import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from dori_lightning.metrics.image_distances import (
    LatentFeatures,
    frechet_distance,
    frechet_images,
    kernel_distance,
)


def normal(count, seed, *, shift=0.0, width=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) + shift


def names(count):
    return [str(k) for k in range(count)]


def torchmetrics_kid(x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=len(x))
    metric.update(x, real=True)
    metric.update(y, real=False)
    return float(metric.compute()[0])


def test_equal_sets_are_exactly_zero_apart():
    x = normal(12, 0)
    found = kernel_distance(x, x.clone(), names(12))
    assert (found.mean, found.std) == (0.0, 0.0)
    assert (found.pictures, found.groups, found.subset) == (12, 12, 6)


def test_it_is_torchmetrics_value_without_the_couples_of_one_prompt():
    """On all prompts at once the two differ by what couples (i, i) add to the cross term."""
    x = normal(8, 0)
    y = x + 0.3
    theirs = torchmetrics_kid(x, y)
    cross = (x @ y.T / 6 + 1) ** 3
    couples = float(cross.diagonal().mean())
    others = float((cross.sum() - cross.diagonal().sum()) / 56)
    # halves of 8 prompts, averaged over very many draws, are the value over all couples (i, j)
    ours = [kernel_distance(x, y, names(8), seed=seed) for seed in range(60)]
    mean = sum(found.mean for found in ours if found) / 60
    assert mean == pytest.approx(theirs + 2 / 8 * (couples - others), abs=0.02)
    assert mean - theirs > 0.5, "the correction is no rounding"


def test_independent_sets_of_one_distribution_are_zero_apart_on_average():
    values = []
    for seed in range(40):
        found = kernel_distance(normal(30, 2 * seed), normal(30, 2 * seed + 1), names(30))
        values.append(found.mean)
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) / len(values))
    assert abs(mean) < 3 * error
    assert min(values) < 0 < max(values), "unbiased, so it goes below zero too"


def test_a_mild_change_of_paired_pictures_is_seen_where_torchmetrics_goes_below_zero():
    x = normal(20, 0)
    y = x + 0.1
    found = kernel_distance(x, y, names(20))
    assert found.mean > 0
    assert torchmetrics_kid(x, y) < 0


def test_a_larger_shift_is_further_away():
    x = normal(40, 0)
    near, far = (kernel_distance(x, normal(40, 1, shift=s), names(40)) for s in (0.5, 1.5))
    assert 0 < near.mean < far.mean


def test_pictures_of_one_group_are_not_compared_with_each_other():
    x, y = normal(6, 0), normal(6, 1)
    groups = [name for name in names(6) for _ in range(2)]
    once = kernel_distance(x, y, names(6), seed=3)
    twice = kernel_distance(x.repeat_interleave(2, 0), y.repeat_interleave(2, 0), groups, seed=3)
    assert twice.mean == pytest.approx(once.mean, abs=1e-9)
    assert (twice.pictures, twice.groups) == (12, 6)


def test_too_few_groups_give_nothing():
    assert kernel_distance(normal(6, 0), normal(6, 1), ["a", "a", "b", "b", "c", "c"]) is None


def test_it_depends_on_its_seed_alone():
    x, y = normal(9, 0), normal(9, 1)
    torch.manual_seed(0)
    first = kernel_distance(x, y, names(9), seed=1)
    torch.manual_seed(5)
    assert kernel_distance(x, y, names(9), seed=1) == first
    assert kernel_distance(x, y, names(9), seed=2) != first


def test_frechet_distance_by_hand():
    """Equal covariances: the squared distance of the means."""
    x = normal(40, 0, width=4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x, x + 0.5) == pytest.approx(4 * 0.25, rel=1e-4)


def test_frechet_distance_needs_twice_as_many_pictures_as_features():
    assert frechet_images(4) == 8
    assert frechet_distance(normal(7, 0, width=4), normal(7, 1, width=4)) is None
    assert frechet_distance(normal(8, 0, width=4), normal(8, 1, width=4)) is not None


def test_latent_features_are_means_and_deviations_of_whole_and_quarters():
    features = LatentFeatures(lambda images: images[:, :2], channels=2)
    images = torch.zeros(1, 3, 4, 4)
    images[0, 0, :2, 2:] = 1.0  # channel 0: upper right quarter
    found = features.describe(images)
    assert found.shape == (1, features.dimension) == (1, 20)
    assert found.dtype == torch.float64
    cells = found.reshape(5, 2, 2)  # cell, statistic, channel
    assert cells[:, 0, 0].tolist() == [0.25, 0, 1, 0, 0]
    assert cells[0, 1, 0] == pytest.approx(math.sqrt(0.25 * 0.75))
    assert cells[1:, 1].abs().max() == 0
    assert cells[:, :, 1].abs().max() == 0


def test_a_flipped_picture_has_other_latent_features():
    features = LatentFeatures(lambda images: images, channels=3)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(features.describe(image), features.describe(image.flip(-1)))
