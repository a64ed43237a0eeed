"""From similarities to rates: restarts, failed pairs, images without a number, and kinds."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dori_lightning.metrics.replication import (
    cells,
    diversity,
    pair_results,
    per_pair,
    unchecked_starts,
)
from dori_lightning.metrics.statistics import wilson_interval
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


def _cells(outcomes):
    return cells(outcomes, CALIBRATION, checkpoint="tiny", mitigation="none")


def test_per_pair_by_hand():
    assert per_pair([0.1, 0.9, 0.4, 0.2]) == pytest.approx(0.9)
    assert np.allclose(per_pair([[0.1, 0.2], [0.4, 0.3]]), [0.2, 0.4])


def test_a_picture_that_was_not_seen_is_not_safe():
    assert math.isnan(per_pair([0.1, math.nan]))


@pytest.mark.parametrize("values", [[], 0.5])
def test_per_pair_refuses(values):
    with pytest.raises(ValueError):
        per_pair(values)


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


def test_one_image_is_enough():
    assert _cells([_outcome("a", [0.1, 0.9, 0.1])])[0].hits == 1


@pytest.mark.parametrize(
    ("restarts", "reproduced"),
    [
        ([[0.1, 0.2]], False),
        ([[0.1, math.nan]], None),
        ([[0.9, math.nan]], None),
        ([[0.1, 0.2], [0.1, math.nan]], None),
        ([[0.1, math.nan], [0.1, 0.2]], None),
        ([[0.8, 0.9], [0.1, math.nan]], True),
    ],
)
def test_an_image_without_a_number_is_never_evidence_of_safety(restarts, reproduced):
    """Page (``pair_results``) and tables (``cells``) follow one rule."""
    outcomes = [_outcome("a", values, restart=k) for k, values in enumerate(restarts)]
    (result,) = pair_results(outcomes, CALIBRATION)
    (row,) = _cells(outcomes)
    assert result.reproduced is reproduced
    assert (result.status == "ok") is (reproduced is not None)
    assert (row.n, row.failed, row.hits) == {
        True: (1, 0, 1), False: (1, 0, 0), None: (0, 1, 0)
    }[reproduced]  # fmt: skip


def test_restarts_reduce_to_the_best_and_divergence_is_kept():
    weak = _outcome("a", [0.1, 0.2, 0.3])
    strong = _outcome("a", [0.1, 0.95, 0.3], restart=1)
    lost = _outcome("a", [math.nan] * 3, restart=2, status="diverged")

    def result(*outcomes):
        (one,) = pair_results(outcomes, CALIBRATION)
        return one

    best = result(weak, strong, lost)
    assert (best.statistic, best.seed, best.reproduced) == (pytest.approx(0.95), 1, True)
    assert (result(lost).status, result(lost).reproduced) == ("diverged", None)


def test_order_does_not_matter():
    rows = [("a", 0.9, 0), ("a", 0.3, 1), ("b", 0.5, 0), ("c", 0.8, 0)]
    outcomes = [_outcome(name, [value, 0.0], restart=restart) for name, value, restart in rows]
    assert _cells(outcomes) == _cells(outcomes[::-1])


def test_a_restart_that_comes_twice_is_a_mistake():
    with pytest.raises(ValueError, match="two outcomes"):
        _cells([_outcome("a", [0.1]), _outcome("a", [0.2])])


def test_a_missing_descriptor_is_a_mistake():
    with pytest.raises(ValueError, match="only by local"):
        pair_results([_outcome("a", [0.1])], replace(CALIBRATION, descriptor="sscd"))


def test_diversity_by_hand():
    matrix = [[1.0, 9.0, 9.0], [0.2, 1.0, 9.0], [0.4, 0.6, 1.0]]
    assert diversity(matrix) == pytest.approx(0.4)
    assert math.isnan(diversity([[1.0]]))
    with pytest.raises(ValueError):
        diversity([[1.0, 2.0]])


RANDOM = Condition("dori", "random", Budget(steps=50))


@pytest.mark.parametrize(
    ("known", "controls", "starts"),
    [
        ({}, {}, ("random",)),
        ({PROMPT: 0.9}, {}, ()),  # its prompt shows it anyway
        ({DORI: 0.9}, {DORI: 0.1}, ()),  # so does a sound attack
        ({DORI: 0.9}, {DORI: 0.9}, ("random",)),  # one that paints shows nothing
        ({DORI: 0.9}, {}, ("prompt", "random")),
        ({}, {RANDOM: 0.9}, ()),  # it was checked, whatever came out
    ],
)
def test_where_an_answer_would_rest_on_an_attack_that_was_not_checked(known, controls, starts):
    """One suspected image that the attack from random embeddings brings back."""
    outcomes = [
        _outcome("a", [0.9], condition=RANDOM),
        *(_outcome("a", [value], condition=condition) for condition, value in known.items()),
        *(_outcome("c", [value], kind="control", condition=condition)
          for condition, value in controls.items()),
    ]  # fmt: skip
    assert unchecked_starts(outcomes, CALIBRATION) == starts
    lost = [_outcome("a", [0.1], condition=RANDOM), *outcomes[1:]]
    assert "random" not in unchecked_starts(lost, CALIBRATION)
