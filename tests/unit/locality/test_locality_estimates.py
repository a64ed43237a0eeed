import math
from itertools import combinations

import numpy as np
import pytest

from dori_lightning.locality.estimates import mean_estimate, pair_estimates, rate_of


def symmetric(size: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).random((size, size))
    return (values + values.T) / 2


def test_pairs_within_and_between_are_those_of_the_labels():
    matrix, labels = symmetric(5), ["a", "b", "a", "b", "b"]
    within, between = pair_estimates(matrix, labels)
    pairs = list(combinations(range(5), 2))
    by_image = [
        np.mean([matrix[i, j] for i, j in pairs if labels[i] == labels[j] == name])
        for name in ("a", "b")
    ]
    assert within.value == pytest.approx(np.mean(by_image)), "each image counts equally"
    assert between.value == pytest.approx(
        np.mean([matrix[i, j] for i, j in pairs if labels[i] != labels[j]])
    )
    assert (within.count, between.count) == (4, 6)
    assert within.low <= within.value <= within.high
    assert between.low <= between.value <= between.high


def test_the_diagonal_is_not_read():
    matrix = symmetric(4)
    other = matrix + np.diag([9.0, -9.0, math.inf, 5.0])
    assert pair_estimates(matrix, "aabb") == pair_estimates(other, "aabb")


def test_a_constant_matrix_has_no_spread_however_it_is_resampled():
    matrix = np.full((6, 6), 3.0)
    np.fill_diagonal(matrix, 0)  # a resample that counted items with themselves would see zeros
    within, between = pair_estimates(matrix, "aaabbb")
    assert (within.low, within.value, within.high) == pytest.approx((3, 3, 3))
    assert (between.low, between.value, between.high) == pytest.approx((3, 3, 3))


def test_the_interval_covers_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for k in range(60):
        points = rng.normal(size=20)
        matrix = np.abs(points[:, None] - points[None])
        within, _ = pair_estimates(matrix, ["a"] * 20, seed=k)
        covered += within.low <= 2 / math.sqrt(math.pi) <= within.high
    assert covered >= 49


def test_nothing_to_compare_is_nan_not_zero():
    within, between = pair_estimates(np.zeros((1, 1)), ["a"])
    assert math.isnan(within.value)
    assert math.isnan(between.low)
    assert (within.count, between.count) == (0, 0)
    assert pair_estimates(np.zeros((0, 0)), [])[0].count == 0
    one_each, _ = pair_estimates(symmetric(2), ["a", "b"])
    assert math.isnan(one_each.value)


def test_rates_count_triggers_and_remember_images():
    rate = rate_of([True, True, False, False], "aaab")
    assert (rate.hits, rate.n, rate.images) == (2, 4, {"a": (2, 3), "b": (0, 1)})
    assert rate.ci95[0] < 0.5 < rate.ci95[1]
    assert rate.ci95_images == pytest.approx((0.0, 2 / 3))
    alone = rate_of([True], "a")
    assert math.isnan(alone.ci95_images[0])
    nothing = rate_of([], [])
    assert math.isnan(nothing.rate)
    assert nothing.ci95 == (0.0, 1.0)


def test_means_resample_images_where_there_are_several():
    close = mean_estimate([1.0, 1.0, 1.0, 3.0, 3.0, 3.0], "aaabbb")
    assert close.value == 2.0
    assert (close.low, close.high) == (1.0, 3.0), "as few images as there are"
    assert mean_estimate([1.0, 3.0], "aa").count == 2
    assert math.isnan(mean_estimate([], []).value)
