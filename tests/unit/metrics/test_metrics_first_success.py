"""The cumulative rate and the first success, by hand."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from dori_lightning.metrics.replication import (
    AttackEffort,
    attack_effort,
    cells,
    first_successes,
    search_of,
)
from dori_lightning.types import Budget, Calibration, Condition, FirstSuccess, Outcome, Pair

RULE = Calibration("local", 0.7, "fixed", (), (), math.nan, ())


def outcome(name, steps, value, **more):
    init, budget = more.pop("init", "prompt"), more.pop("budget", Budget(steps=steps))
    return Outcome(
        pair=Pair(name, "vm", "a caption", Path("picture.png")),
        condition=Condition("dori", init, budget),
        restart=more.pop("restart", 0),
        status="diverged" if math.isnan(value) else "ok",
        seeds=(0, 1),
        similarity={"local": np.array([value, 0.1 if value == value else value])},
        diversity=0.5,
        **more,
    )


def at(outcomes, steps):
    found = cells(outcomes, RULE, checkpoint="tiny", mitigation="none")
    (cell,) = [c for c in found if c.condition == Condition("dori", "prompt", Budget(steps=steps))]
    return cell


def test_what_came_back_and_is_lost_again_counts_up_to_the_budget_only():
    found = [outcome("a", 10, 0.9), outcome("a", 50, 0.2)]
    found += [outcome("b", 10, 0.2), outcome("b", 50, 0.8)]
    found += [outcome("c", 10, 0.2), outcome("c", 50, 0.7)]  # not above
    cell = at(found, 50)
    assert (cell.hits, cell.n, cell.counted) == (1, 3, "at_budget")
    assert cell.first_success == FirstSuccess(pairs=2, n=3, mr=2 / 3, median_steps=30.0)
    early = at(found, 10).first_success
    assert (early.pairs, early.median_steps) == (1, 10.0)


def test_the_first_of_any_restart_counts():
    found = [outcome("a", 10, 0.2), outcome("a", 50, 0.9), outcome("a", 10, 0.8, restart=1)]
    firsts = first_successes(found, RULE)
    assert firsts == {search_of(found[1]): 50, search_of(found[2]): 10}
    first = at(found, 50).first_success
    assert (first.pairs, first.median_steps) == (1, 10.0)


def test_another_start_or_ball_is_another_attack():
    found = [outcome("a", 50, 0.2), outcome("a", 10, 0.9, init="random")]
    found += [outcome("a", 10, 0.9, budget=Budget("l2", 1.0, 10))]
    first = at(found, 50).first_success
    assert first.pairs == 0
    assert math.isnan(first.median_steps)


def test_a_success_counts_also_where_the_attack_diverged_later():
    found = [outcome("a", 10, 0.9), outcome("a", 50, math.nan)]
    found += [outcome("b", 10, 0.2), outcome("b", 50, math.nan)]
    cell = at(found, 50)
    assert (cell.n, cell.failed) == (0, 2)
    assert cell.first_success == FirstSuccess(pairs=1, n=1, mr=1.0, median_steps=10.0)


def test_the_closest_picture_counts():
    assert [*first_successes([outcome("a", 10, 0.9)], RULE).values()] == [10]


def test_a_cell_with_stopped_rows_says_that_it_counts_up_to_its_budget():
    found = [outcome("a", 10, 0.9), outcome("a", 50, 0.9, stopped_at=10)]
    found += [outcome("b", 10, 0.2), outcome("b", 50, 0.2)]
    assert at(found, 10).counted == "at_budget"
    cell = at(found, 50)
    assert cell.counted == "up_to_budget"
    assert cell.first_success == FirstSuccess(pairs=1, n=2, mr=0.5, median_steps=10.0)
    assert cell.hits == 1


def test_a_prompt_that_brings_its_image_back_needs_no_step():
    found = [outcome("a", 10, 0.9, stopped_at=0), outcome("a", 50, 0.9, stopped_at=0)]
    found += [outcome("b", 10, 0.2, stopped_at=0), outcome("b", 50, 0.2, stopped_at=0)]  # futile
    assert [*first_successes(found, RULE).values()] == [0]
    cell = at(found, 50)
    assert (cell.hits, cell.n, cell.counted) == (1, 2, "up_to_budget")
    assert cell.first_success == FirstSuccess(pairs=1, n=2, mr=0.5, median_steps=0.0)


def test_effort_counts_images_on_the_way_and_those_that_were_spared():
    found = [
        outcome("a", 50, 0.9, stopped_at=0),
        outcome("b", 50, 0.2, stopped_at=4),
        replace(outcome("c", 50, 0.9), seeds=(0,), similarity={"local": np.array([0.9])}),
    ]
    assert attack_effort(
        found, noise_batch=8, picture_evaluations=20, images_per_pair=4, looked=5
    ) == AttackEffort(
        attack=8 * (4 + 50), attack_saved=8 * (50 + 46), pictures=20 * (1 + 5),
        pictures_saved=20 * (3 * 4 - 1 - 5),
    )  # fmt: skip


def test_prompts_have_no_first_success():
    prompted = Outcome(
        Pair("a", "vm", "", Path()), Condition("prompt"), 0, "ok", (0,),
        {"local": np.array([0.9])}, 0.5,
    )  # fmt: skip
    (cell,) = cells([prompted], RULE, checkpoint="tiny", mitigation="none")
    assert cell.first_success is None
