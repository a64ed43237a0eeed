"""From similarities to rates: restarts, failed pairs, kinds and the torchmetrics classes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dori_lightning.metrics.replication import (
    MemorizationRate,
    ReplicationSimilarity,
    cells,
    diversity,
    pair_scores,
    per_pair,
    repeated_pictures,
)
from dori_lightning.metrics.statistics import median_mad, wilson_interval
from dori_lightning.types import Budget, Calibration, Condition, Outcome, Pair

PROMPT = Condition("prompt")
DORI = Condition("dori", "prompt", Budget(steps=50))
CALIBRATION = Calibration("local", 0.7, "fixed", (), (), math.nan, ())


def _outcome(name, values, *, kind="vm", condition=DORI, restart=0, status="ok", **pair):
    return Outcome(
        pair=Pair(name, kind, "a caption", Path("picture.png"), **pair),
        condition=condition,
        restart=restart,
        status=status,
        seeds=tuple(range(len(values))),
        similarity={"local": np.array(values, np.float32)},
        diversity=0.5,
    )


def _cells(outcomes, **options):
    return cells(outcomes, CALIBRATION, checkpoint="tiny", mitigation="none", **options)


def test_per_pair_by_hand():
    assert per_pair([0.1, 0.9, 0.4, 0.2]) == pytest.approx(0.9)
    assert per_pair([0.1, 0.9, 0.4, 0.2], "median") == pytest.approx(0.3)
    assert np.allclose(per_pair([[0.1, 0.2], [0.4, 0.3]]), [0.2, 0.4])


def test_a_picture_that_was_not_seen_is_not_safe():
    assert math.isnan(per_pair([0.1, math.nan]))
    assert math.isnan(per_pair([0.1, math.nan], "median"))


@pytest.mark.parametrize(("values", "aggregation"), [([], "max"), ([0.1], "mean"), (0.5, "max")])
def test_per_pair_refuses(values, aggregation):
    with pytest.raises(ValueError):
        per_pair(values, aggregation)


def test_one_row_per_condition_and_kind():
    rows = _cells(
        [
            _outcome("a", [0.2, 0.9]),
            _outcome("b", [0.2, 0.7]),
            _outcome("c", [0.1, 0.3], kind="control"),
            _outcome("a", [0.1, 0.2], condition=PROMPT),
        ]
    )
    assert [(r.condition.attack, r.kind, r.hits, r.n) for r in rows] == [
        ("dori", "vm", 1, 2),  # 0.7 is not above 0.7
        ("dori", "control", 0, 1),
        ("prompt", "vm", 0, 1),
    ]
    assert rows[0].mr == 0.5
    assert rows[0].mr_ci95 == wilson_interval(1, 2)
    assert rows[0].similarity_median == pytest.approx(0.8)
    assert rows[0].similarity_mad == pytest.approx(0.1)


def test_a_pair_is_reproduced_if_any_restart_reproduces_it():
    rows = _cells([_outcome("a", [0.2, 0.1]), _outcome("a", [0.8, 0.1], restart=1)])
    assert [(r.hits, r.n) for r in rows] == [(1, 1)]
    assert rows[0].similarity_median == pytest.approx(0.8)


def test_a_pair_fails_only_if_every_restart_diverged():
    broken = [math.nan, math.nan]
    (row,) = _cells(
        [
            _outcome("a", broken, status="diverged"),
            _outcome("a", broken, restart=1, status="diverged"),
            _outcome("b", broken, status="diverged"),
            _outcome("b", [0.9, 0.1], restart=1),
            _outcome("c", [0.1, 0.1]),
            _outcome("d", [0.1, math.nan]),
        ]
    )
    assert (row.n, row.failed, row.hits, row.mr) == (2, 2, 1, 0.5)


def test_nothing_but_failures_has_no_rate():
    (row,) = _cells([_outcome("a", [math.nan], status="diverged")])
    assert (row.n, row.failed, row.hits) == (0, 1, 0)
    assert math.isnan(row.mr)
    assert row.mr_ci95 == (0.0, 1.0)
    assert math.isnan(row.similarity_median)


def test_the_median_asks_for_more_than_one_lucky_picture():
    outcomes = [_outcome("a", [0.1, 0.9, 0.1])]
    assert _cells(outcomes)[0].hits == 1
    assert _cells(outcomes, aggregation="median")[0].hits == 0


def test_repeated_pictures_count_but_are_derivable():
    outcomes = [
        _outcome("a", [0.9]),
        _outcome("b", [0.9], duplicate_of="a"),
        _outcome("b", [0.9], duplicate_of="a", restart=1),
    ]
    assert _cells(outcomes)[0].n == 2
    assert repeated_pictures(outcomes) == 1


def test_order_does_not_matter():
    rows = [("a", 0.9, 0), ("a", 0.3, 1), ("b", 0.5, 0), ("c", 0.8, 0)]
    outcomes = [_outcome(name, [value, 0.0], restart=restart) for name, value, restart in rows]
    assert _cells(outcomes) == _cells(outcomes[::-1])


def test_a_restart_that_comes_twice_is_a_mistake():
    with pytest.raises(ValueError, match="two outcomes"):
        _cells([_outcome("a", [0.1]), _outcome("a", [0.2])])


def test_a_missing_descriptor_is_a_mistake():
    with pytest.raises(ValueError, match="only by local"):
        pair_scores([_outcome("a", [0.1])], "sscd")


def test_diversity_by_hand():
    matrix = [[1.0, 9.0, 9.0], [0.2, 1.0, 9.0], [0.4, 0.6, 1.0]]
    assert diversity(matrix) == pytest.approx(0.4)
    assert math.isnan(diversity([[1.0]]))
    with pytest.raises(ValueError):
        diversity([[1.0, 2.0]])


@pytest.fixture
def similarities():
    return torch.rand(13, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("aggregation", ["max", "median"])
def test_metrics_agree_with_the_functions_whatever_the_batches(similarities, aggregation):
    scores = per_pair(similarities.numpy(), aggregation)
    hits, spread = int((scores > 0.7).sum()), median_mad(scores)
    for size in (1, 5, 13):
        rate = MemorizationRate(0.7, aggregation)
        replication = ReplicationSimilarity(aggregation)
        for batch in similarities.split(size):
            rate.update(batch)
            replication.update(batch)
        expected = (hits / 13, *wilson_interval(hits, 13))
        assert [x.item() for x in rate.compute()] == pytest.approx(expected)
        assert [x.item() for x in replication.compute()] == pytest.approx(
            (spread.median, spread.mad)
        )


def test_metric_state_is_one_vector_that_ranks_can_join(similarities):
    """Between ranks torchmetrics concatenates, with an empty vector for a rank without data."""
    whole, first, second = (MemorizationRate(0.7) for _ in range(3))
    whole.update(similarities)
    first.update(similarities[:4])
    second.update(similarities[4:])
    first.scores = torch.cat([*first.scores, torch.tensor([]), *second.scores])
    assert [x.item() for x in first.compute()] == [x.item() for x in whole.compute()]


def test_metric_starts_and_resets_empty(similarities):
    metric = MemorizationRate(0.7)
    metric.update(similarities)
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        rate, low, high = metric.compute()
    assert math.isnan(rate)
    assert (low, high) == (0, 1)


def test_metric_refuses_failed_pairs(similarities):
    similarities[2, 1] = math.nan
    with pytest.raises(ValueError, match="1 NaN"):
        MemorizationRate(0.7).update(similarities)
    with pytest.raises(ValueError, match="aggregation"):
        MemorizationRate(0.7, "mean")
