"""Adversarial fine-tuning: surrogates are vetted, triggers kept, the model put back."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dori_lightning.attacks.budget import AttackSettings, BudgetSettings
from dori_lightning.attacks.solver import AttackProblem, solve
from dori_lightning.mitigations import adversarial_finetuning
from dori_lightning.mitigations.adversarial_finetuning import (
    FIRST_RESTART,
    AdversarialFinetuning,
    AdversarialTraining,
    LowRank,
    PoolSettings,
    TriggerPool,
    redirect_loss,
)
from dori_lightning.mitigations.base import Context
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import WeightEdit
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.mitigations.replacements import SurrogateSettings, find_surrogates
from dori_lightning.models.memory import PARALLEL_PAIRS
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.pairs.corpus import Examples
from dori_lightning.runtime.logging import listening
from dori_lightning.types import Pair
from support.context import make_context, read_pairs
from support.families import load_family
from support.fetches import Fetches
from support.unchanged import unchanged

ATTACK = AttackSettings(
    inits=("prompt", "random", "control_prompt"),
    budget=BudgetSettings(steps=2),
    noise_batch=2,
    snapshots=(1,),
)
SURROGATES = SurrogateSettings(NoMitigation(), per_pair=2, candidates=2, max_similarity=0.9)


def method(**changes: object) -> AdversarialFinetuning:
    made = AdversarialFinetuning(
        name="aft",
        surrogates=SURROGATES,
        pool=PoolSettings(attack=ATTACK),
        finetune=FinetuneSettings(lr=1e-3, checkpoint_every=1),
        epochs=2,
        updates=2,
        adversarial_batch=3,
        ordinary_batch=2,
        ordinary_examples=4,
    )
    return replace(made, **changes)


@pytest.fixture
def pool_of(model, suspected, context):
    """Make pools of triggers for the suspected pairs."""

    def call(**settings):
        ordinary = context.ordinary(model, "calibration", 4)
        chosen = PoolSettings(**{"attack": ATTACK} | settings)
        return TriggerPool(model, context.data.batch(suspected), chosen, ordinary=ordinary, seed=0)

    return call


def fit_told(
    model: StableDiffusion, suspected: tuple[Pair, ...], context: Context, **changes: object
) -> tuple[WeightEdit, list[tuple[str, int, int]]]:
    """What a fit finds, and the progress that it tells."""
    told: list[tuple[str, int, int]] = []
    with listening(lambda *what: told.append(what)):
        edit = method(**changes).apply(model, suspected, context)
    return edit, [what for what in told if what[0] == "aft"]


@pytest.fixture(scope="module")
def whole(model, pairs, tmp_path_factory):
    """An uninterrupted fit with its progress."""
    suspected = tuple(pair for pair in pairs if pair.kind != "control")
    return fit_told(model, suspected, make_context(tmp_path_factory.mktemp("whole"), model, pairs))


def test_every_weight_is_trained(model, whole):
    edit, _ = whole
    before = dict(model.denoiser().named_parameters())
    assert set(edit.weights) == set(before)
    assert not any(torch.equal(edit.weights[name], before[name]) for name in before)
    assert [r["searched"] for r in edit.origin.notes["rounds"]] == [2, 2]


@pytest.mark.parametrize("warm", [False, True])
def test_progress_counts_the_rows_of_searches_and_updates(model, suspected, context, whole, warm):
    pool = PoolSettings(attack=ATTACK, warm=True)
    _, told = fit_told(model, suspected, context, pool=pool) if warm else whole
    search, update = (2 if warm else 1) * 2 * ATTACK.budget.steps * 2, 3 + 2
    assert {total for _, _, total in told} == {2 * search + 4 * update}
    done = [count for _, count, _ in told]
    assert done[0] == 0
    assert max(b - a for a, b in pairwise(done)) == max(update, 2 * 2), "no search in one piece"
    assert done[-1] == 2 * search + 4 * update


def test_rows_of_a_cheap_fit_are_counted_and_its_updates_fetch_nothing(
    model, suspected, context, monkeypatch
):
    """Searches fill passes of one shape up; updates take their rows and no more."""
    rows, fetched = Counter[str](), list[str]()
    denoise, step = model._denoise, AdversarialTraining.training_step

    def counting(noised, *given):
        rows["with gradient" if torch.is_grad_enabled() else "forward"] += len(noised)
        return denoise(noised, *given)

    def watching(self, *given):
        if self.global_step % self.method.updates == 0:  # begins with a search
            return step(self, *given)
        with Fetches() as methods:
            loss = step(self, *given)
        fetched.extend(methods.found)
        return loss

    pool = PoolSettings(attack=ATTACK, warm=True, replay=2)
    made = method(pool=pool, redirect=0.5)
    made.apply(model, suspected, context)  # memory is measured, once for a model
    ordinary = Context.ordinary

    def encoded(self, *given):
        """Ordinary images are encoded when they are first drawn; here all are beforehand."""
        corpus = ordinary(self, *given)
        corpus.rows(range(len(corpus)))
        return corpus

    monkeypatch.setattr(Context, "ordinary", encoded)
    monkeypatch.setattr(model, "_denoise", counting)
    monkeypatch.setattr(AdversarialTraining, "training_step", watching)
    edit = made.apply(model, suspected, context)
    searched = [own["searched"] for own in edit.origin.notes["rounds"]]
    assert searched == [2, 2]
    most = made.epochs * 2 * ATTACK.budget.steps * PARALLEL_PAIRS * ATTACK.noise_batch
    updates = made.epochs * made.updates * (3 + 2)
    # a search that ends half-way at a robust trigger takes one step of the two
    assert updates + most / 2 <= rows["with gradient"] <= updates + most
    assert made.estimate_cost(context.sampling, 2).work.training == updates
    assert fetched == []


def test_an_interrupted_fit_goes_on_with_its_triggers_to_the_same_weights(
    model, suspected, context, whole, monkeypatch
):
    step = AdversarialTraining.training_step

    def cut(self, *args):
        if self.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch, unchanged(model):
        patch.setattr(AdversarialTraining, "training_step", cut)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            method().apply(model, suspected, context)
    searches: list[int] = []
    search = TriggerPool.search
    monkeypatch.setattr(
        TriggerPool, "search", lambda self, n: (searches.append(n), search(self, n))[1]
    )
    assert method().apply(model, suspected, context).identity == whole[0].identity
    assert searches == [], "the second round's triggers were in the checkpoint"


@pytest.mark.parametrize("change", ["seed", "redirect"])
def test_the_seed_and_a_redirected_loss_give_other_weights(
    model, suspected, context, whole, change
):
    given = replace(context, seed=1) if change == "seed" else context
    made = method(redirect=0.5 if change == "redirect" else 0.0)
    assert made.apply(model, suspected, given).identity != whole[0].identity


def test_the_low_rank_variant_changes_linear_layers_only_and_leaves_plain_ones(
    model, suspected, context
):
    edit = method(low_rank=2).apply(model, suspected, context)
    linear = {
        f"{name}.weight"
        for name, module in model.denoiser().named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert edit.weights
    assert set(edit.weights) <= linear
    name, value = next(iter(edit.weights.items()))
    change = value - dict(model.denoiser().named_parameters())[name]
    assert torch.linalg.matrix_rank(change, atol=1e-6) <= 2
    assert not any("parametriz" in name for name, _ in model.denoiser().named_modules())


def test_low_rank_updates_change_nothing_before_they_are_trained():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3))
    x, before = torch.randn(2, 4), layer[0].weight.detach().clone()
    expected = layer(x)
    updates = LowRank(layer, 2)
    assert torch.equal(layer(x), expected)
    updates.merge()
    updates.merge()
    assert torch.equal(layer[0].weight, before)


def test_a_surrogate_that_resembles_any_memorized_image_is_refused(
    model, suspected, context, monkeypatch
):
    """A model that draws pair 1 whatever it is asked must not give pair 0 its surrogates."""
    image = context.references.images[context.references.places[suspected[1].id]]
    monkeypatch.setattr(
        model, "generate", lambda embeddings, *_, **__: image.expand(len(embeddings), -1, -1, -1)
    )
    found = find_surrogates(model, suspected, context, SURROGATES)
    assert found.notes["kept"] == {"mitigated": 0, "neighbour": 0, "ordinary": 4}
    assert found.notes["refused"]["mitigated"] == 4
    assert all(len(found.latents[pair.id]) == 2 for pair in suspected)


def test_without_a_source_surrogates_come_from_neighbours(model, suspected, context):
    settings = replace(SURROGATES, source=None, max_similarity=0.999)
    found = find_surrogates(model, suspected, context, settings)
    assert found.notes["kept"] == {"neighbour": 2 * len(suspected)}
    assert not list(context.folder.glob("*.safetensors")), "nothing was pruned"


def test_no_more_surrogates_are_drawn_than_are_needed(model, suspected, context, monkeypatch):
    """The first image of pair 0 is refused, so it alone is asked for more."""
    settings = replace(SURROGATES, per_pair=1, candidates=3)
    known = context.references.images[context.references.places[suspected[0].id]]
    drawn: list[tuple[str, ...]] = []

    def generate(embeddings, *_, pair_ids, **__):
        drawn.append(tuple(pair_ids))
        images = torch.rand(len(embeddings), *known.shape, generator=torch.Generator())
        if len(drawn) == 1:
            images[0] = known
        return images

    monkeypatch.setattr(model, "generate", generate)
    found = find_surrogates(model, suspected, context, settings)
    assert drawn == [("pair0", "pair1"), ("pair0",)]
    assert found.notes == {"kept": {"mitigated": 2}, "refused": {"mitigated": 1}}


def test_a_search_that_is_left_half_way_leaves_the_pool_as_it_was(pool_of, monkeypatch):
    pool = pool_of(warm=True)
    pool.search(0)
    before, warm = pool.found, dict(pool.warm)
    asked: list[int] = []

    def left(*args, **settings):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return solve(*args, **settings)

    monkeypatch.setattr(adversarial_finetuning, "solve", left)
    with pytest.raises(KeyboardInterrupt):
        pool.search(1)
    assert pool.found is before
    assert all(torch.equal(pool.warm[name], row) for name, row in warm.items())


def test_no_surrogate_at_all_is_an_error_not_an_empty_training(
    model, suspected, context, monkeypatch
):
    strict = replace(SURROGATES, max_similarity=1e-9)
    image = context.references.images[:1]
    monkeypatch.setattr(
        model, "generate", lambda embeddings, *_, **__: image.repeat(len(embeddings), 1, 1, 1)
    )
    monkeypatch.setattr(
        type(context.corpus),
        "examples",
        lambda _, __, count, ___: Examples((), image.repeat(count, 1, 1, 1)),
    )
    with pytest.raises(RuntimeError, match="no surrogate for pair0, pair1"):
        find_surrogates(model, suspected, context, strict)


def test_a_pool_draws_pairs_evenly_and_holds_prompts_and_the_path_of_each_search(pool_of):
    pool = pool_of()
    pool.search(0)
    assert len(pool.found) == 2 * 2, "snapshots 1 and 2 of each search"
    names, rows = pool.draw(6, torch.Generator().manual_seed(0))
    assert sorted(names) == ["pair0"] * 3 + ["pair1"] * 3
    known = [*pool.prompts.values(), *(t.embedding for t in pool.found)]
    assert all(any(torch.equal(row, k) for k in known) for row in rows)


def test_old_rounds_leave_the_pool_unless_they_are_replayed(pool_of):
    for replay, kept in ((1, {1}), (2, {0, 1})):
        pool = pool_of(replay=replay)
        pool.search(0)
        pool.search(1)
        assert {t.round for t in pool.found} == kept


def test_a_warm_pool_goes_on_from_its_last_trigger_and_adds_a_random_one(
    pool_of, suspected, monkeypatch
):
    pool = pool_of(warm=True)
    pool.search(0)
    last = {name: row.clone() for name, row in pool.warm.items()}
    assert not torch.equal(last["pair0"], pool.prompts["pair0"])
    seen: list[torch.Tensor] = []

    def spy(model, problem, **settings):
        seen.append(problem.initial)
        assert min(problem.restarts) >= FIRST_RESTART
        return solve(model, problem, **settings)

    monkeypatch.setattr(adversarial_finetuning, "solve", spy)
    pool.search(1)
    assert torch.equal(seen[0], torch.stack([last[pair.id] for pair in suspected]))
    assert len(seen) == 2
    assert abs(float(seen[1].std()) - 1) < 0.3, "standard normal"


def test_robust_pairs_rest_for_one_round(pool_of):
    pool = pool_of(skip_robust=0.5)
    assert set(pool._limits) == {"pair0", "pair1"}
    pool._limits = {"pair0": -1.0, "pair1": 1e9}
    for number in range(3):
        pool.search(number)
    assert [r["searched"] for r in pool.rounds] == [2, 1, 2]
    assert [r["robust"] for r in pool.rounds] == [1, 0, 1]


@pytest.mark.parametrize("snapshots", [(), (1,), (1, 3)])
def test_a_search_beyond_the_limit_ends_half_way_and_leaves_its_last_point(
    pool_of, snapshots, monkeypatch
):
    attack = replace(ATTACK, budget=BudgetSettings(steps=4), snapshots=snapshots)
    whole, pool = pool_of(attack=attack), pool_of(attack=attack, skip_robust=0.5)
    pool._limits = {"pair0": -1.0, "pair1": 1e9}
    searched: list[tuple[str, ...]] = []

    def spy(model, problem, **settings):
        searched.append(problem.ids)
        return solve(model, problem, **settings)

    monkeypatch.setattr(adversarial_finetuning, "solve", spy)
    pool.search(0)
    assert searched == [("pair0", "pair1"), ("pair1",)]
    whole.search(0)
    ends = {name: [t.embedding for t in pool.found if t.pair == name] for name in pool.ids}
    reference = [t.embedding for t in whole.found if t.pair == "pair1"]
    assert all(map(torch.equal, ends["pair1"], reference))
    assert len(ends["pair0"]) == len([s for s in snapshots if s <= 2]) + 1
    assert not torch.equal(ends["pair0"][-1], pool.prompts["pair0"])
    assert pool.rounds[0]["robust"] == 1


def test_a_search_that_ends_half_way_ends_at_its_point_in_the_units_of_the_family(tmp_path):
    """Where parts have units of their own, an offset of the search is no offset of embeddings."""
    other = load_family("sdxl")
    context = make_context(tmp_path, other, read_pairs(tmp_path))
    pairs = [pair for pair in context.data.pairs if pair.kind != "control"]
    attack = AttackSettings(
        inits=("prompt",), budget=BudgetSettings(steps=4), noise_batch=1, snapshots=()
    )
    pool = TriggerPool(
        other,
        context.data.batch(pairs),
        PoolSettings(attack=attack, skip_robust=1.0),
        ordinary=context.ordinary(other, "calibration", 4),
        seed=0,
    )
    pool._limits = dict.fromkeys(pool.ids, -1.0)
    pool.search(0)
    expected = solve(
        other,
        AttackProblem(
            pool.ids,
            (FIRST_RESTART,) * len(pool.ids),
            torch.stack([*pool.latents.values()]),
            torch.stack([*pool.prompts.values()]),
        ),
        budget=pool.budget,
        settings=replace(attack, snapshots=(2,)),
        seed=0,
        stop_at=2,
    )
    assert [trigger.pair for trigger in pool.found] == list(expected.ids)
    for trigger, points in zip(pool.found, expected.embeddings, strict=True):
        assert torch.equal(trigger.embedding, points[0])


def test_a_pool_survives_a_checkpoint(pool_of, tmp_path):
    pool, other = (pool_of(warm=True, skip_robust=0.5) for _ in range(2))
    pool.search(0)
    torch.save(pool.state(), tmp_path / "pool.pt")
    other.restore(torch.load(tmp_path / "pool.pt", weights_only=True))
    first, second = (p.draw(5, torch.Generator().manual_seed(3)) for p in (pool, other))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert other.rounds == pool.rounds
    assert other.rested == pool.rested


def test_redirecting_is_no_loss_for_a_model_that_sees_the_surrogate(model, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    memorized, surrogate, noise = (torch.randn(2, 4, 16, 16, generator=draw) for _ in range(3))
    times = torch.tensor([100, 900])
    embeddings = model.encode_prompts(["a cat", "a boat"])

    def sees(what):
        def predict(noised, t, *_, **__):
            alpha = model.variances(t)[0][:, None, None, None]
            return (noised - alpha.sqrt() * what) / (1 - alpha).sqrt()

        monkeypatch.setattr(model, "predict_noise", predict)

    sees(surrogate)
    loss = redirect_loss(model, memorized, surrogate, noise, times, embeddings)
    assert loss.abs().max() < 1e-6
    sees(memorized)
    loss = redirect_loss(model, memorized, surrogate, noise, times, embeddings)
    alpha = model.variances(times)[0]
    distance = (memorized - surrogate).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, (alpha / (1 - alpha)).clamp(max=1) * distance)
