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
from dori_lightning.metrics.evidence import COPY, UnseenImage, judge
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
    held = {name: -0.01 * k for k, name in enumerate(CONTROLS)} | {"held": -1.0}
    values = {1: held | {"a": -1.0, "b": 0.5}, 2: held | {"a": -0.115}, 32: held}
    test = FutilityTest(0.05, set(CONTROLS), 32, measure(values, measured))
    ended = test.futile(searches([*CONTROLS, "a", "b", "held", "copy"], 1), {"copy"})
    assert ended == {*CONTROLS[:10], "b"}, "ten of 21 go on"
    assert "copy" not in measured[0], "its image has said more"
    left = [*CONTROLS[10:], "a", "held"]
    assert test.futile(searches(left, 2), ()) == {*CONTROLS[10:15], "a"}, "five of 21"
    assert measured[1] == left
    assert test.judged == {(name, 0, 0) for name in measured[0]} | {(name, 0, 1) for name in left}
    assert test.futile(searches([*CONTROLS[15:], "held"], 32), ()) == {*CONTROLS[15:18]}
    before = len(test.judged)
    again = test.futile(searches([*CONTROLS, "a", "b", "held"], 1, init="prompt"), ())
    assert again == {*CONTROLS[:10], "b"}, "another start is judged by itself"
    assert len(test.judged) == before, "and shares the empty prompt's losses"


def test_nothing_is_futile_before_controls_are_near_the_empty_prompt():
    values = {k: dict.fromkeys(CONTROLS, 1.0 - k / 8) | {"a": 2.0} for k in (1, 2, 4, 8)}
    test = FutilityTest(0.05, set(CONTROLS), 32, measure(values, []))
    for steps in (1, 2, 4):
        assert not test.futile(searches([*CONTROLS, "a"], steps), ())
    assert "a" in test.futile(searches([*CONTROLS, "a"], 8), ())


def test_controls_go_on_as_long_as_a_suspect_does():
    values = {1: {name: -0.01 * k for k, name in enumerate(CONTROLS)} | {"a": 0.0}}
    measured: list[list[str]] = []
    test = FutilityTest(0.05, set(CONTROLS), 32, measure(values, measured))
    assert test.futile(searches([*CONTROLS, "a"], 1, init="prompt"), ()) == {*CONTROLS, "a"}
    copies = {"a", CONTROLS[3]}
    assert test.futile(searches([*CONTROLS, "a"], 1), copies) == {*CONTROLS} - copies
    assert len(measured) == 1, "no loss is needed for that"


@pytest.mark.parametrize("names", [["a", "b"], CONTROLS])
def test_nothing_is_futile_without_controls_or_without_suspects(names):
    test = FutilityTest(0.05, set(CONTROLS), 32, lambda _: pytest.fail("nothing to measure"))
    for steps in (1, 2):
        assert not test.futile(searches(names, steps), ())


@pytest.mark.parametrize(("start", "suspects"), [(0.0, 1), (1.0, 1), (0.0, 5)])
def test_the_error_rates_hold_for_images_that_the_model_does_not_hold(start, suspects):
    """Random trajectories of suspects and 20 controls of the same kind, 1,000 suspects in all.

    Who is searched on gets the higher scores, some three in a hundred come back, and controls end
    with the last suspect: by scores alone, twice as many as asked for would be called held.
    """
    rng, level, runs = np.random.default_rng(0), 0.1, 1000 // suspects
    names = [f"suspect{k}" for k in range(suspects)] + CONTROLS
    to_the_end, held, back = 0, 0, 0
    for _ in range(runs):
        ratios = start + np.cumsum(rng.normal(-0.3, 0.3, (6, len(names))), 0)
        scores = rng.normal(0, 0.25, (7, len(names))) - 0.1 * ratios[[0, 1, 2, 3, 4, 5, 5]]
        values = {k + 1: dict(zip(names, row, strict=True)) for k, row in enumerate(ratios)}
        test = FutilityTest(level, set(CONTROLS), 6, measure(values, []))
        left, reached = set(names), dict.fromkeys(names, -math.inf)
        for look, row in enumerate(scores):
            seen = {name: float(row[names.index(name)]) for name in left}
            reached |= {name: max(score, reached[name]) for name, score in seen.items()}
            copies = {name for name, score in seen.items() if score > COPY}
            if look == 6:
                to_the_end += sum("suspect" in name for name in left)
            elif left:
                left -= copies | test.futile(searches(sorted(left), look + 1), copies)
        nulls = [UnseenImage(name, "control", reached[name]) for name in CONTROLS]
        back += sum(null.score > COPY for null in nulls)
        for name in names[:suspects]:
            (row,) = judge([reached[name]], [math.nan], nulls, rate=level, copies_tie=True)
            held += row.answer == "yes"
    noise = 3 * math.sqrt(level * (1 - level) / (runs * suspects))
    assert 0 < to_the_end / (runs * suspects) <= level + noise
    assert 0 < held / (runs * suspects) <= level + noise
    assert back > runs / 2


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
