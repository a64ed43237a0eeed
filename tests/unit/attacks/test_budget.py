import math

import pytest
import torch

from dori_lightning.attacks.budget import AttackSettings, BudgetSettings, median_distance, project
from dori_lightning.mitigations.adversarial_finetuning import PoolSettings
from dori_lightning.types import Budget, InputError


def test_l2_projection_lands_on_the_ball_and_keeps_the_direction():
    delta = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]])
    inside = project(delta, Budget("l2", 1.0, 5))
    assert torch.allclose(inside[0], torch.tensor([[0.6, 0.8]]))
    assert torch.equal(inside[1], delta[1]), "a row inside the ball must not move"


def test_linf_projection_clips_each_number():
    delta = torch.tensor([[[3.0, -4.0, 0.2]]])
    assert project(delta, Budget("linf", 0.5, 5)).tolist() == [[[0.5, -0.5, pytest.approx(0.2)]]]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_ball_of_radius_zero_leaves_nothing(norm):
    delta = torch.randn(2, 3, 4)
    assert torch.equal(project(delta, Budget(norm, 0.0, 5)), torch.zeros_like(delta))


def test_no_norm_leaves_everything():
    delta = torch.randn(2, 3, 4)
    assert torch.equal(project(delta, Budget("none", None, 5)), delta)


def test_a_relative_radius_is_a_multiple_of_the_median_distance():
    embeddings = torch.zeros(3, 1, 2)
    embeddings[1, 0, 0], embeddings[2, 0, 0] = 3.0, 7.0  # distances 3, 7 and 4
    assert median_distance(embeddings, "l2") == pytest.approx(4.0)
    budget = BudgetSettings("l2", 0.5, relative=True, steps=7).resolve(embeddings)
    assert budget == Budget("l2", pytest.approx(2.0), 7)
    assert BudgetSettings("linf", 0.5, relative=False).resolve(None) == Budget("linf", 0.5, 50)


def test_a_relative_radius_without_two_controls_says_what_to_do():
    with pytest.raises(InputError, match=r"kind control or set attack\.budget\.relative=false"):
        BudgetSettings("l2", 0.5).resolve(torch.zeros(1, 1, 2))
    with pytest.raises(InputError, match="control"):
        BudgetSettings("l2", 0.5).resolve(None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"norm": "l1"}, "norm"),
        ({"steps": -1}, "steps"),
        ({"norm": "l2"}, "radius"),
        ({"norm": "l2", "radius": -1.0}, "radius"),
        ({"norm": "l2", "radius": math.nan}, "radius"),
    ],
)
def test_impossible_budgets_are_refused_by_name(settings, named):
    with pytest.raises(InputError, match=f"attack.budget.{named}"):
        BudgetSettings(**settings)


@pytest.mark.parametrize("snapshots", [(), (5,), (5, 9)])
def test_stopping_needs_a_snapshot_before_the_end(snapshots):
    with pytest.raises(InputError, match=r"none before the last step, 5\n  fix:   give some"):
        AttackSettings(budget=BudgetSettings(steps=5), snapshots=snapshots, early_stop=True)


def test_looks_are_kept_beside_snapshots_and_are_enough_to_stop_at():
    settings = AttackSettings(snapshots=(10, 1), looks=(4, 1), early_stop=True)
    assert (settings.snapshots, settings.stops) == ((1, 10), (1, 4, 10))
    assert AttackSettings(looks=(1,), early_stop=True, futility=0.05).stops == (1,)


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ({"futility": 0.1}, "attack.futility is for attacks that are looked at"),
        ({"one_image": True}, "attack.one_image is for attacks that are looked at"),
        ({"looks": (1,)}, "attack.looks is for attacks that are looked at"),
        ({"futility": 1.0, "early_stop": True, "looks": (1,)}, "between 0 and 1, got 1.0"),
        ({"looks": (-1,)}, "attack.looks must be >= 0"),
    ],
)
def test_what_only_stopping_attacks_have_is_refused_elsewhere(asked, part):
    with pytest.raises(InputError, match=part):
        AttackSettings(**asked)


def test_who_evaluates_no_images_cannot_stop():
    settings = AttackSettings(snapshots=(1,), early_stop=True)
    with pytest.raises(InputError, match=r"attack\.early_stop is for audits"):
        PoolSettings(attack=settings)
