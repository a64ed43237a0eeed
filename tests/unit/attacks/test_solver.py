from dataclasses import replace
from typing import Any

import pytest
import torch

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.solver import (
    AttackProblem,
    AttackResult,
    BrokenAttackError,
    RowAdam,
    concat,
    refuse_broken,
    solve,
)
from dori_lightning.mitigations.edits import Origin, PairMaskEdit
from dori_lightning.models.memory import PARALLEL_PAIRS, pairs_at_once
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import Budget, InputError
from support.threads import threads
from support.unchanged import unchanged

FIVE = Budget("none", None, 5)
NOISE = 2


def rows(problem: AttackProblem, *chosen: int) -> AttackProblem:
    index = list(chosen)
    return AttackProblem(
        tuple(problem.ids[k] for k in index),
        problem.restarts[: len(index)],
        problem.latents[index],
        problem.initial[index],
    )


def attack(model: StableDiffusion, problem: AttackProblem, **options: Any) -> AttackResult:
    settings = {"noise_batch": NOISE, "snapshots": (0, 2)}
    for name in ("noise_batch", "snapshots"):
        if name in options:
            settings[name] = options.pop(name)
    options = {"budget": FIVE, **options}
    return solve(model, problem, settings=AttackSettings(**settings), **options)


@pytest.fixture(scope="module")
def whole(model, problem):
    """The attack on all five with everything as usual; it leaves the model alone."""
    with unchanged(model):
        return attack(model, problem)


def test_gradients_that_fp16_would_round_to_zero_are_followed(model, problem, monkeypatch):
    def loss(latents, noise, timesteps, embeddings, *, pair_ids):
        return 1e-6 * embeddings.half().float().flatten(1).mean(1)

    monkeypatch.setattr(model, "denoising_loss", loss)
    found = attack(model, rows(problem, 0))
    assert not found.no_gradient.any()
    assert (found.embeddings[:, -1] < problem.initial[:1]).all()


def test_a_pair_gets_the_same_bits_alone_and_in_company(model, problem, whole):
    for chosen in ([0], [1], [4, 2, 0]):
        some = attack(model, rows(problem, *chosen))
        assert torch.equal(some.embeddings, whole.embeddings[chosen])
        assert torch.equal(some.losses, whole.losses[chosen])


def test_each_row_steps_in_its_own_unit(model, problem, whole):
    scaled = replace(problem, scales=(1.0, 0.25, 1.0, 8.0, 1.0))
    found = attack(model, scaled)
    unscaled = torch.tensor([True, False, True, False, True])
    assert torch.equal(found.embeddings[unscaled], whole.embeddings[unscaled])
    # Adam's first step is the learning rate in every number, whatever the gradient's length
    one = attack(model, scaled, budget=Budget("none", None, 1), snapshots=(1,))
    first = (one.embeddings[:, 0] - problem.initial).abs().flatten(1).median(1).values
    assert first.tolist() == pytest.approx([0.1, 0.025, 0.1, 0.8, 0.1], rel=1e-2)


def test_parallel_batches_give_the_same_bits_and_keep_pairs_apart(model, problem, whole):
    name = next(iter(model.layers("cross_attention.value"))) + ".weight"
    rows_of = len(dict(model.denoiser().named_parameters())[name])
    generator = torch.Generator().manual_seed(1)
    masks = {i: {name: torch.rand(rows_of, generator=generator) < 0.5} for i in problem.ids}
    before = model.unet_evaluations
    with PairMaskEdit(Origin(model.fingerprint), masks).applied(model):
        one_by_one = attack(model, problem)
        middle = model.unet_evaluations
        with threads(2):
            assert pairs_at_once(model) == 2 * PARALLEL_PAIRS
            parallel = attack(model, problem)
    assert torch.equal(parallel.embeddings, one_by_one.embeddings)
    assert torch.equal(parallel.losses, one_by_one.losses)
    assert model.unet_evaluations - middle == middle - before > 0
    assert not torch.allclose(whole.losses, parallel.losses, atol=1e-4)


def test_the_attack_lowers_the_loss_and_moves_the_embedding(model, problem):
    few = rows(problem, 0, 1)
    result = attack(model, few, budget=Budget("none", None, 40), noise_batch=8, snapshots=())
    assert (result.losses[:, -5:].mean(1) < result.losses[:, :5].mean(1)).all()
    assert not torch.equal(result.embeddings[:, -1], few.initial)
    assert not result.diverged.any()


def test_snapshots_lie_on_one_trajectory(model, problem, whole):
    short = attack(model, problem, budget=Budget("none", None, 2), snapshots=())
    assert whole.snapshots == (0, 2, 5)
    assert torch.equal(whole.embeddings[:, 0], problem.initial)
    assert torch.equal(whole.embeddings[:, 1], short.embeddings[:, 0])


def test_rows_go_on_in_other_company_to_the_same_bits(model, problem):
    budget = Budget("l2", 1.5, 5)
    whole = attack(model, problem, budget=budget)
    begun = {
        name: result.row(k)
        for chosen in ((0, 1, 2), (3, 4))
        for result in [attack(model, rows(problem, *chosen), budget=budget, stop_at=2)]
        for k, name in enumerate(result.ids)
    }
    assert {(result.steps, result.snapshots) for result in begun.values()} == {(2, (0, 2))}
    left = [4, 1, 2]  # from both, in another order; the others came back
    so_far = concat([begun[problem.ids[k]] for k in left])
    ended = attack(model, rows(problem, *left), budget=budget, resume_from=so_far)
    assert ended.snapshots == whole.snapshots
    assert torch.equal(ended.embeddings, whole.embeddings[left])
    assert torch.equal(ended.losses, whole.losses[left])
    assert ended.state is None


def test_the_offset_is_kept_and_not_what_rounding_left_of_it(model, problem):
    begun = attack(model, problem, stop_at=2)
    assert begun.state is not None
    difference = begun.embeddings[:, -1] - problem.initial
    assert torch.allclose(difference, begun.state.delta, atol=1e-5)
    assert not torch.equal(difference, begun.state.delta)
    assert begun.state.count.tolist() == [2.0] * 5


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_radius_zero_gives_the_prompt_itself(model, problem, norm):
    result = attack(model, problem, budget=Budget(norm, 0.0, 2), snapshots=())
    assert torch.equal(result.embeddings[:, -1], problem.initial)


def test_the_ball_is_kept(model, problem):
    result = attack(model, problem, budget=Budget("l2", 0.3, 2), snapshots=())
    length = (result.embeddings[:, -1] - problem.initial).flatten(1).norm(dim=1)
    assert (length <= 0.3 * (1 + 1e-5)).all()
    assert (length > 0.2).all(), "lr 0.1 on every number leaves a ball of 0.3 at once"


def test_restarts_and_seeds_draw_other_noise(model, problem, whole):
    few = rows(problem, 0, 1)
    for other in (
        attack(model, replace(few, restarts=(1, 1)), stop_at=2),
        attack(model, few, seed=1, stop_at=2),
    ):
        assert not torch.isclose(other.losses[:, :2], whole.losses[:2, :2]).any()


def test_no_gradient_is_an_error_and_not_a_safe_model(model, problem, monkeypatch):
    def deaf(latents, noise, timesteps, emb, **_):
        return (noise**2).flatten(1).mean(1) + 0.0 * emb.flatten(1).sum(1)

    monkeypatch.setattr(model, "denoising_loss", deaf)
    result = attack(model, problem)
    assert result.no_gradient.all()
    assert not result.diverged.any()
    assert result.losses.shape == (5, 5)
    assert result.losses.isnan().all(), "no loss to take for that of an attack"
    assert result.snapshots == (0, 2, 5)
    assert torch.equal(result.embeddings, problem.initial[:, None].expand(-1, 3, -1, -1))
    with pytest.raises(BrokenAttackError, match="exactly zero for boat, house, cat, night, sea"):
        refuse_broken(result)
    begun, steps = attack(model, problem, stop_at=2), list[int]()
    ended = attack(model, problem, resume_from=begun, on_step=steps.append)
    assert steps == [], "to go on costs nothing"
    assert ended.no_gradient.all()
    assert not ended.diverged.any()
    assert ended.losses.isnan().all()
    assert torch.equal(ended.embeddings, result.embeddings)


def test_one_row_without_a_gradient_stands_still_and_leaves_the_others_alone(
    model, problem, whole, monkeypatch
):
    real = model.denoising_loss

    def deaf_to_one(*args, pair_ids, **_):
        loss = real(*args, pair_ids=pair_ids)
        own = torch.tensor([name == "house" for name in pair_ids])
        return torch.where(own, loss.detach(), loss)

    monkeypatch.setattr(model, "denoising_loss", deaf_to_one)
    result = attack(model, problem)
    assert result.no_gradient.tolist() == [False, True, False, False, False]
    assert not result.diverged.any()
    assert torch.equal(result.embeddings[1, -1], problem.initial[1])
    others = [0, 2, 3, 4]
    assert torch.equal(result.embeddings[others], whole.embeddings[others])


def test_nothing_finite_ends_after_the_first_step_and_says_what_to_try(
    model, problem, monkeypatch, caplog
):
    real, calls = model.denoising_loss, []

    def broken(*args, **options):
        calls.append(1)
        return real(*args, **options) * torch.nan

    monkeypatch.setattr(model, "denoising_loss", broken)
    result = attack(model, problem)
    assert len(calls) == 2, "five rows take two passes a step"
    assert result.diverged.all()
    assert not result.no_gradient.any()
    assert result.embeddings.isfinite().all()
    for part in (
        "not finite for any of boat, house, cat, night, sea",
        "float32",
        "timesteps",
        "precision",
    ):
        assert part in caplog.text
    with pytest.raises(BrokenAttackError, match="not finite for any"):
        refuse_broken(result)


def test_out_of_memory_takes_fewer_pairs_and_all_their_noise_and_finds_the_same(
    model, problem, whole, monkeypatch, caplog
):
    real, widths = model.denoising_loss, []

    def small_memory(latents, *args, **options):
        widths.append(len(latents))
        if len(latents) > 1 * NOISE:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return real(latents, *args, **options)

    monkeypatch.setattr(model, "denoising_loss", small_memory)
    monkeypatch.setattr(model, "max_batch_sizes", {})
    result = attack(model, problem)
    assert widths[:3] == [4 * NOISE, 2 * NOISE, 1 * NOISE], "pairs of a pass times noise samples"
    assert set(widths[2:]) == {1 * NOISE}, "memory runs out once, not at every step"
    assert caplog.text.count("attack: out of memory") == 2
    # the same draws in passes of another shape: equal but for the rounding of kernels
    torch.testing.assert_close(result.embeddings, whole.embeddings, atol=1e-4, rtol=0)
    torch.testing.assert_close(result.losses, whole.losses, atol=1e-5, rtol=1e-5)
    attack(model, rows(problem, 0), stop_at=1)
    assert widths.count(4 * NOISE) == 1, "what was found is remembered"


def test_passes_of_any_width_give_the_same_bits_where_kernels_do(model, problem, monkeypatch):
    """With a loss whose arithmetic does not depend on the shape, smaller batches change no bit."""
    room = [99]

    def by_rows(latents, noise, times, emb, **_):
        if len(latents) > room[0]:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        scale = 1 + latents.flatten(1)[:, 0] + noise.flatten(1)[:, 1] + times / 1000
        return scale * emb[:, 0, 0] ** 2 + emb[:, 1, 1]

    monkeypatch.setattr(model, "denoising_loss", by_rows)
    monkeypatch.setattr(model, "max_batch_sizes", {})
    wide = attack(model, problem)
    room[0] = NOISE
    halved = attack(model, problem)
    assert torch.equal(halved.embeddings, wide.embeddings)
    assert torch.equal(halved.losses, wide.losses)
    room[0] = NOISE - 1
    with pytest.raises(
        InputError, match=r"single pair(.|\n)*noise_batch\) are part of the method"
    ):
        attack(model, problem)


def test_a_row_that_diverges_stops_and_leaves_the_others_alone(model, problem, whole, monkeypatch):
    real, calls = model.denoising_loss, []

    def breaks(*args, **options):
        calls.append(1)
        loss = real(*args, **options)
        if len(calls) == 5:  # five rows take two passes a step: third step
            row = torch.arange(len(loss)) // NOISE
            loss = loss * torch.where(row == 1, torch.nan, 1.0)
        return loss

    monkeypatch.setattr(model, "denoising_loss", breaks)
    result = attack(model, problem)
    assert result.diverged.tolist() == [False, True, False, False, False]
    assert torch.equal(result.embeddings[1, -1], whole.embeddings[1, 1]), "last finite point"
    assert result.losses[1].isnan().tolist() == [False, False, True, True, True]
    others = [0, 2, 3, 4]
    assert torch.equal(result.embeddings[others], whole.embeddings[others])


def test_row_adam_is_adam_and_standing_rows_keep_their_state():
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 4, 5), torch.randn(6, 3, 4, 5)
    reference = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([reference], lr=0.1)
    ours, optimizer = start.clone(), RowAdam(start, lr=0.1)
    for gradient in gradients:
        reference.grad = gradient.clone()
        adam.step()
        ours = optimizer.step(ours, gradient, torch.ones(3, dtype=torch.bool))
    assert torch.allclose(ours, reference, atol=1e-6)

    paused, partly = start.clone(), RowAdam(start, lr=0.1)
    for k, gradient in enumerate(gradients):
        active = torch.tensor([True, k not in (1, 3), True])
        paused = partly.step(paused, gradient, active)
    alone, single = start[1:2].clone(), RowAdam(start[1:2], lr=0.1)
    for k in (0, 2, 4, 5):
        alone = single.step(alone, gradients[k, 1:2], torch.ones(1, dtype=torch.bool))
    assert torch.equal(paused[1:2], alone)


def test_losses_are_drawn_in_the_range_of_each_row(model, problem, whole, monkeypatch):
    """The whole schedule as a range gives the bits of no range."""
    count = model.num_train_timesteps
    everywhere = replace(problem, ranges=((0, count),) * len(problem.ids))
    assert torch.equal(attack(model, everywhere).embeddings, whole.embeddings)

    seen: dict[str, list[int]] = {name: [] for name in problem.ids[:2]}
    loss = model.denoising_loss

    def denoising_loss(latents, noise, timesteps, embeddings, *, pair_ids):
        for name, time in zip(pair_ids, timesteps.tolist(), strict=True):
            seen[name].append(time)
        return loss(latents, noise, timesteps, embeddings, pair_ids=pair_ids)

    monkeypatch.setattr(model, "denoising_loss", denoising_loss)
    attack(model, replace(rows(problem, 0, 1), ranges=((0, 30), (700, 710))))
    low, high = seen.values()
    assert max(low) < 30
    assert 700 <= min(high) <= max(high) < 710
