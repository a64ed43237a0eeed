"""How an attack's timesteps are drawn: published, in strata, where the text matters, a range."""

from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.embedding_attack import (
    AttackContext,
    ControlPrompts,
    attack_rounds,
    run_attacks,
)
from dori_lightning.attacks.model_check import text_density
from dori_lightning.attacks.solver import noise_and_timesteps, solve
from dori_lightning.attacks.timesteps import BINS, FLOOR, TimestepDraws
from dori_lightning.mitigations.adversarial_finetuning import PoolSettings
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Budget, InputError
from support.context import read_pairs
from support.runs import configuration
from support.unchanged import unchanged

#: Most of the text's effect in the fifth tenth of the schedule.
PEAKED = torch.tensor(
    [FLOOR / BINS + (1 - FLOOR) * (k in (8, 9)) / 2 for k in range(BINS)]
).double()


def drawn(schedule: TimestepDraws, samples: int = 8, steps: int = 500):
    """Timesteps and weights (steps, samples) of many steps."""
    found = [
        noise_and_timesteps(1, "a", 0, step, shape=(samples, 1), schedule=schedule)
        for step in range(steps)
    ]
    times = torch.stack([times for _, times, _ in found])
    weights = [weights for *_, weights in found if weights is not None]
    return times, torch.stack(weights) if weights else None


def test_the_published_draws_are_the_same_bits():
    generator = keyed_generator("attack", 4, "cat", 1, 7)
    noise, times, weights = noise_and_timesteps(
        4, "cat", 1, 7, shape=(8, 2, 3, 3), schedule=TimestepDraws(0, 1000)
    )
    assert torch.equal(noise, torch.randn((8, 2, 3, 3), generator=generator))
    assert torch.equal(times, torch.randint(0, 1000, (8,), generator=generator))
    assert weights is None


@pytest.mark.parametrize("chosen", ["stratified", "importance", (0.2, 0.6)])
def test_another_choice_leaves_the_noise_alone(chosen):
    schedule = TimestepDraws(0, 1000, chosen, PEAKED)
    published, own = (
        noise_and_timesteps(4, "cat", 1, 7, shape=(8, 2, 3, 3), schedule=each)[0]
        for each in (TimestepDraws(0, 1000), schedule)
    )
    assert torch.equal(published, own)


@pytest.mark.parametrize("count", [1000, 50])
def test_each_stratum_of_the_schedule_has_one_sample(count):
    times, weights = drawn(TimestepDraws(0, count, "stratified"))
    assert weights is None
    places = torch.arange(8)
    assert (times >= (places * count / 8).floor()).all()
    assert (times < ((places + 1) * count / 8).ceil()).all()
    assert set(times.flatten().tolist()) <= set(range(count))
    assert len(set(times.flatten().tolist())) > 0.9 * min(count, times.numel())


def test_a_range_keeps_to_its_part_of_the_schedule():
    times, weights = drawn(TimestepDraws(0, 1000, (0.2, 0.6)))
    assert weights is None
    assert 200 <= int(times.min()) < 205
    assert 595 <= int(times.max()) < 600
    assert float(times.double().mean()) == pytest.approx(400, abs=8)


@pytest.mark.parametrize("count", [1000, 50])
def test_importance_estimates_the_same_mean_with_less_variance(count):
    times, weights = drawn(TimestepDraws(0, count, "importance", PEAKED))
    assert float(weights.max()) <= 1 / FLOOR + 1e-6
    inside = (times >= 0.4 * count) & (times < 0.5 * count)
    assert float(inside.double().mean()) == pytest.approx(float(PEAKED[8:10].sum()), abs=0.01)

    def value(times):  # what a density of this shape is for
        return 1 + 30 * ((times >= 0.4 * count) & (times < 0.5 * count)).double()

    whole = float(value(torch.arange(count)).mean())
    published, _ = drawn(TimestepDraws(0, count))
    plain, own = value(published).mean(1), (weights * value(times)).mean(1)
    assert float(weights.mean()) == pytest.approx(1, abs=0.03)
    assert float(own.mean()) == pytest.approx(whole, rel=0.01)
    assert float(own.var()) < 0.1 * float(plain.var())


def test_a_step_weighs_its_losses(model, problem):
    settings = AttackSettings(noise_batch=4, timesteps="importance", samples_per_forward=2)
    budget = Budget(steps=1)
    found = solve(model, problem, budget=budget, settings=settings, seed=3, density=PEAKED)
    schedule = TimestepDraws(0, model.num_train_timesteps, "importance", PEAKED)
    shape = (4, *model.latent_shape)
    noise, times, weights = noise_and_timesteps(
        3, problem.ids[1], problem.restarts[1], 0, shape=shape, schedule=schedule
    )
    with torch.no_grad():
        losses = model.denoising_loss(
            problem.latents[1].expand(shape), noise, times, problem.initial[1].expand(4, -1, -1)
        )
    assert float(found.losses[1, 0]) == pytest.approx(float((weights * losses).mean()), rel=1e-5)
    even = torch.full((BINS,), 1 / BINS, dtype=torch.float64)
    flat = solve(model, problem, budget=budget, settings=settings, seed=3, density=even)
    strata = replace(settings, timesteps="stratified")
    torch.testing.assert_close(
        flat.losses, solve(model, problem, budget=budget, settings=strata, seed=3).losses
    )


def test_the_density_is_high_where_the_text_matters(model, problem, monkeypatch):
    def loss(latents, noise, timesteps, embeddings, *, pair_ids):
        factor = 1 + 9 * ((timesteps >= 400) & (timesteps < 500)).float()
        return factor * embeddings.flatten(1).square().sum(1)

    with unchanged(model):
        found = text_density(model, problem.latents, 0)
    assert torch.equal(found, text_density(model, problem.latents, 0))
    assert float(found.min()) > FLOOR / BINS
    assert float(found.sum()) == pytest.approx(1)
    monkeypatch.setattr(model, "denoising_loss", loss)
    slopes = torch.tensor([10.0 if k in (8, 9) else 1.0 for k in range(BINS)]).double()
    wanted = FLOOR / BINS + (1 - FLOOR) * slopes / slopes.sum()
    torch.testing.assert_close(
        text_density(model, problem.latents, 0), wanted, rtol=1e-4, atol=0, check_dtype=False
    )
    monkeypatch.setattr(model, "denoising_loss", lambda *given, **_: 0 * loss(*given, pair_ids=()))
    assert text_density(model, problem.latents, 0).tolist() == pytest.approx([1 / BINS] * BINS)


def test_the_density_is_measured_once_and_part_of_what_results_depend_on(model, tmp_path):
    pairs = read_pairs(tmp_path)
    settings = AttackSettings(inits=("random",), noise_batch=1, timesteps="importance")

    def context(**changes) -> AttackContext:
        return AttackContext(
            model=model, data=PairsDataModule(pairs, model),
            settings=replace(settings, **changes), budget=Budget(steps=2),
            controls=ControlPrompts((), None), folder=tmp_path / "attacks", seed=5, edit="none",
        )  # fmt: skip

    identities = [
        context(timesteps=chosen).identity["attack"]
        for chosen in ("uniform", "stratified", "importance", (0.2, 0.6))
    ]
    assert len(set(identities)) == 4
    assert context(timesteps=[0.2, 0.6]).identity["attack"] == identities[3]
    rounds = attack_rounds(settings, pairs[:1])
    (first,) = run_attacks(context(), rounds)
    density = context().density
    evaluations = model.unet_evaluations
    (again,) = run_attacks(context(), rounds)
    assert torch.equal(context().density, density)
    assert model.unet_evaluations == evaluations
    assert torch.equal(first.embedding, again.embedding)
    run_attacks(replace(context(), edit="another"), rounds)
    assert model.unet_evaluations > evaluations + BINS * len(pairs)


@pytest.mark.parametrize("chosen", ["late", None, [0.6, 0.2], [0.2, 1.5], [0.5], ["a", "b"], []])
def test_what_is_no_choice_of_timesteps_is_refused(chosen):
    with pytest.raises(InputError, match=r"attack\.timesteps must be uniform, stratified"):
        AttackSettings(timesteps=chosen)


def test_a_trigger_pool_takes_strata_but_no_density_of_another_model():
    assert PoolSettings(AttackSettings(timesteps="stratified")).attack.timesteps == "stratified"
    with pytest.raises(InputError, match="cannot be importance"):
        PoolSettings(AttackSettings(timesteps="importance"))


@pytest.mark.parametrize("chosen", ["stratified", "[0.2,0.6]"])
def test_it_is_chosen_on_the_command_line(chosen):
    settings = instantiate(configuration(f"attack.timesteps={chosen}").attack)
    assert settings.timesteps == ("stratified" if chosen == "stratified" else (0.2, 0.6))


def test_searches_with_ranges_of_their_own_take_strata_and_no_density(model, problem):
    stretches = replace(problem, ranges=((100, 400),) * 4 + ((400, 1000),))
    settings = AttackSettings(noise_batch=3, timesteps="stratified")
    found = solve(model, stretches, budget=Budget(steps=1), settings=settings)
    assert found.losses.isfinite().all()
    times, _ = drawn(TimestepDraws(100, 400, "stratified"), samples=3)
    assert ((times - 100) // 100 == torch.arange(3)).all()
    with pytest.raises(InputError, match="these searches have ranges"):
        solve(
            model, stretches, budget=Budget(steps=1),
            settings=replace(settings, timesteps="importance"), density=PEAKED,
        )  # fmt: skip
