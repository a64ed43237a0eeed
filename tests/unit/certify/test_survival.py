"""Survival over work."""

import math

import numpy as np
import pytest

from dori_lightning.certify.survival import logrank_p, survival


def test_the_share_falls_where_images_come_back_and_censored_ones_leave_the_rest():
    work = {"a": (10, True), "b": (20, False), "c": (30, True), "d": (30, False)}
    found = survival("suspects", work)
    assert (found.n, found.back, found.first, found.censored) == (4, 2, 10, 30)
    assert found.work == (10, 30)
    # by hand: 3/4, then one of the two that are left
    np.testing.assert_allclose(found.share, [3 / 4, 3 / 8])
    assert all(
        low < share < high
        for low, share, high in zip(found.low, found.share, found.high, strict=True)
    )


@pytest.mark.parametrize("work", [{"a": (7, False)}, {"a": (7, False), "b": (9, False)}])
def test_where_nothing_comes_back_there_is_no_step(work):
    found = survival("controls", work)
    assert found.first is None
    assert found.work == found.share == ()
    assert found.censored == max(rows for rows, _ in work.values())


def test_all_back_at_once_has_no_interval():
    found = survival("suspects", {"a": (5, True), "b": (5, True)})
    assert found.share == (0.0,)
    assert found.censored == 0


def test_groups_that_differ_have_a_small_p_and_equal_ones_a_large_one():
    early = {f"s{k}": (10 + k, True) for k in range(16)}
    never = {f"c{k}": (500, False) for k in range(16)}
    assert logrank_p(early, never) < 1e-4
    assert logrank_p(early, dict(early)) > 0.9
    assert math.isnan(logrank_p(never, never))
    assert math.isnan(logrank_p({}, early))
