"""Numbers that can be checked by hand or against another library."""

import math

import numpy as np
import pytest

from dori_lightning.metrics.statistics import (
    cluster_bootstrap,
    mcnemar_exact,
    median_mad,
    roc_curve,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (111, 112, 0.951, 0.998),
        (81, 112, 0.634, 0.798),
        (2, 112, 0.005, 0.063),
        (0, 112, 0.0, 0.033),
        (0, 50, 0.0, 0.071),
        (50, 50, 0.929, 1.0),
        (1, 2, 0.095, 0.905),
    ],
)
def test_wilson_gives_the_published_numbers(hits, n, low, high):
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=5e-4)


def test_wilson_of_nothing_knows_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_at_the_ends_is_exact():
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize("arguments", [(3, 2), (-1, 2)])
def test_wilson_refuses_impossible_counts(arguments):
    with pytest.raises(ValueError):
        wilson_interval(*arguments)


def test_median_mad_by_hand():
    assert median_mad([1.0, 2.0, math.nan, 4.0, 8.0]) == (3.0, 1.5)


def test_median_mad_of_nothing():
    assert all(math.isnan(value) for value in median_mad([math.nan]))


def test_roc_by_hand():
    roc = roc_curve([0.9, 0.5], [0.5, 0.1])
    assert roc.points[:3] == ((0.0, 0.0, 0.9), (0.0, 0.5, 0.5), (0.5, 1.0, 0.1))
    assert roc.points[3][:2] == (1.0, 1.0)
    assert roc.points[3][2] < 0.1
    assert roc.auc == 0.875  # 3 wins and a tie out of 4


def test_a_point_of_the_roc_holds_the_rates_above_its_threshold():
    rng = np.random.default_rng(0)
    high, low = rng.integers(3, 12, 40) / 10, rng.integers(0, 9, 60) / 10
    roc = roc_curve(high, low)
    wins = np.mean([(h > low).mean() + (h == low).mean() / 2 for h in high])
    assert roc.auc == pytest.approx(wins)
    assert len(roc.points) == len(np.unique(np.r_[high, low])) + 1
    for f, t, threshold in roc.points:
        assert f == pytest.approx((low > threshold).mean())
        assert t == pytest.approx((high > threshold).mean())
        assert math.isfinite(threshold)  # a report is JSON


def test_roc_without_one_side_is_nan():
    assert roc_curve([], [0.1]).points == ()
    assert math.isnan(roc_curve([0.1], []).auc)


def test_roc_refuses_nan():
    with pytest.raises(ValueError, match="finite"):
        roc_curve([0.1, math.nan], [0.0])


@pytest.mark.parametrize(
    ("b", "c", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (0, 6, 0.03125), (3, 3, 1.0), (1, 7, 0.0703125)]
)
def test_mcnemar_by_hand(b, c, p):
    assert mcnemar_exact(b, c) == pytest.approx(p, abs=1e-12)


def test_bootstrap_resamples_pairs_and_not_pictures():
    """Eight equal pictures a pair are one piece of evidence: the interval is that of the pairs."""
    verdicts = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    once = cluster_bootstrap([[v] for v in verdicts])
    often = cluster_bootstrap([[v] * 8 for v in verdicts])
    assert once == often
    assert once[0] < 4 / 6 < once[1]
    assert once == cluster_bootstrap([[v] for v in verdicts])


def test_bootstrap_edges():
    assert all(math.isnan(x) for x in cluster_bootstrap([]))
    with pytest.raises(ValueError, match="finite"):
        cluster_bootstrap([[1.0], []])
    with pytest.raises(ValueError, match="finite"):
        cluster_bootstrap([[math.nan]])
