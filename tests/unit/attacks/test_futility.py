"""Searches that do no better than controls are given up, and no error bound is lost by it."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.embedding_attack import (
    AttackContext,
    Conditioning,
    ControlPrompts,
    Job,
    run_attacks,
)
from dori_lightning.attacks.futility import (
    FutilityTest,
    futile,
    judged_steps,
    log_ratios,
)
from dori_lightning.attacks.solver import noise_and_timesteps
from dori_lightning.metrics.evidence import conformal_p_values
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.types import Budget, Condition, Init, Pair
from support.context import read_pairs

CONTROLS = [f"control{k:02d}" for k in range(20)]


def searches(names, steps, *, init: Init = "random", restart=0):
    return [
        Conditioning(
            Pair(name, "control" if "control" in name else "vm", "", Path()),
            Condition("dori", init, Budget(steps=steps)),
            restart,
            torch.zeros(1),
        )
        for name in names
    ]


def test_a_search_goes_on_where_it_does_better_than_enough_controls():
    ratios = {name: -0.1 * k for k, name in enumerate(CONTROLS)}  # the last one is lowest
    ratios |= {"held": -5.0, "between": -1.85, "failed": math.nan}
    assert futile(ratios, CONTROLS, 0.05) == {*CONTROLS[:-2]}, "one that does as well is no reason"
    assert futile(ratios, CONTROLS, 4 / 21) == {*CONTROLS[:-4]}, "four of 21 may go on"
    assert futile({"a": -1.75} | ratios, CONTROLS, 0.05) == {"a", *CONTROLS[:-2]}
    failed = ratios | dict.fromkeys(CONTROLS[-2:], math.nan)
    assert "between" not in futile(failed, CONTROLS, 0.05), "a failed control is no better"


def measure(values, measured):
    def ratios(asked):
        measured.append([one.pair.id for one in asked])
        return {one.pair.id: values[one.spent][one.pair.id] for one in asked}

    return ratios


def test_shares_are_halved_and_what_has_ended_counts_with_its_last_ratio():
    measured: list[list[str]] = []
    first = {name: -0.01 * k for k, name in enumerate(CONTROLS)}
    values = {1: first | {"a": -1.0, "b": 0.5}, 2: first | {"a": -0.115}, 32: first}
    test = FutilityTest(0.05, set(CONTROLS), 32, measure(values, measured))
    ended = test.futile(searches([*CONTROLS, "a", "b", "copy"], 1), {"copy"})
    assert ended == {*CONTROLS[:10], "b"}, "ten of 21 go on"
    assert "copy" not in measured[0], "its image has said more"
    left = [*CONTROLS[10:], "a"]
    assert test.futile(searches(left, 2), ()) == {*CONTROLS[10:15], "a"}, "five of 21"
    assert measured[1] == left
    assert test.judged == {(name, 0, 0) for name in measured[0]} | {(name, 0, 1) for name in left}
    assert test.futile(searches(CONTROLS[15:], 32), ()) == {*CONTROLS[15:18]}, "the last look"
    before = len(test.judged)
    again = test.futile(searches([*CONTROLS, "a", "b"], 1, init="prompt"), ())
    assert again == {*CONTROLS[:10], "b"}, "another start is judged by itself"
    assert len(test.judged) == before, "and shares the empty prompt's losses"


def test_nothing_is_futile_before_controls_are_near_the_empty_prompt():
    values = {k: dict.fromkeys(CONTROLS, 1.0 - k / 8) | {"a": 2.0} for k in (1, 2, 4, 8)}
    test = FutilityTest(0.05, set(CONTROLS), 32, measure(values, []))
    for steps in (1, 2, 4):
        assert not test.futile(searches([*CONTROLS, "a"], steps), ())
    assert "a" in test.futile(searches([*CONTROLS, "a"], 8), ())


@pytest.mark.parametrize("names", [["a", "b"], CONTROLS])
def test_nothing_is_futile_without_controls_or_without_suspects(names):
    test = FutilityTest(0.05, set(CONTROLS), 32, lambda _: pytest.fail("nothing to measure"))
    for steps in (1, 2):
        assert not test.futile(searches(names, steps), ())


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_the_error_rates_hold_for_images_that_the_model_does_not_hold(start):
    """Random trajectories of 20 controls and one suspect of the same kind, 1,000 times.

    Searching on and drawing another image can only raise a score.
    """
    rng, to_the_end, stood_out, runs = np.random.default_rng(0), 0, 0, 1000
    names, level = [*CONTROLS, "suspect"], 0.1
    for _ in range(runs):
        ratios = start + np.cumsum(rng.normal(-0.3, 0.3, (6, 21)), 0)
        # lower ratio, higher score: who is searched on is who gets the high scores
        scores = np.maximum.accumulate(rng.normal(0, 1, (6, 21)) - ratios, 0)
        values = {k + 1: dict(zip(names, row, strict=True)) for k, row in enumerate(ratios)}
        test = FutilityTest(level, set(CONTROLS), 6, measure(values, []))
        left, last = list(names), dict.fromkeys(names, 0)
        for look in range(6):
            last |= dict.fromkeys(left, look)
            ended = test.futile(searches(left, look + 1), ()) if left else frozenset()
            left = [name for name in left if name not in ended]
        to_the_end += "suspect" in left
        reached = [scores[last[name], k] for k, name in enumerate(names)]
        stood_out += conformal_p_values(reached[-1:], reached[:-1])[0] <= level
    noise = 3 * math.sqrt(level * (1 - level) / runs)
    assert 0 < to_the_end / runs <= level + noise
    assert 0 < stood_out / runs <= level + noise


@pytest.mark.parametrize(("taken", "steps"), [(1, [0]), (2, [1]), (4, [2, 3]), (50, [48, 49])])
def test_the_last_steps_judge(taken, steps):
    assert list(judged_steps(taken)) == steps


@pytest.fixture
def context(model, tmp_path):
    pairs = read_pairs(tmp_path)
    return AttackContext(
        model=model,
        data=PairsDataModule(pairs, model),
        settings=AttackSettings(noise_batch=3, snapshots=(1, 2, 4)),
        budget=Budget(steps=5),
        controls=ControlPrompts((), None),
        folder=tmp_path / "attacks",
        seed=5,
        edit="none",
    )


def test_ratios_are_to_the_empty_prompt_at_the_attacks_own_draws(context, monkeypatch):
    pairs, model = context.data.pairs, context.model
    jobs = [Job(pair, "random", 0) for pair in pairs]
    found = [c for c in run_attacks(context, [jobs]) if c.spent == 4]
    before = model.unet_evaluations
    ratios = log_ratios(context, found)
    assert model.unet_evaluations - before >= 2 * 3 * len(pairs)
    pair, losses = pairs[1], []
    latent = context.data.encoded(pair).latent
    for step in (2, 3):
        noise, timesteps = noise_and_timesteps(
            5, pair.id, 0, step, shape=(3, *latent.shape), timesteps=model.num_train_timesteps
        )
        with torch.no_grad():
            empty = model.empty_embedding().expand(3, -1, -1)
            losses.append(float(model.denoising_loss(
                latent.expand(3, -1, -1, -1), noise, timesteps, empty).mean()))  # fmt: skip
    assert found[1].losses is not None
    own = float(found[1].losses[2:4].mean())
    assert ratios[pair.id] == pytest.approx(math.log(own / (sum(losses) / 2)), abs=1e-5)

    monkeypatch.setattr(model, "denoising_loss", lambda *_, **__: pytest.fail("it is stored"))
    assert log_ratios(context, found[:3]) == {p.id: ratios[p.id] for p in pairs[:3]}
    failed = replace(found[0], losses=torch.full((4,), math.nan))
    assert math.isnan(log_ratios(context, [failed])[pairs[0].id])
