"""An attack's result depends on its job, never on batches, rounds, processes or a resume."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.data import has_iterable_dataset

from dori_lightning.attacks import embedding_attack as module
from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.embedding_attack import (
    AttackContext,
    Conditioning,
    ControlPrompts,
    Job,
    JobBatches,
    attack_rounds,
    run_attacks,
    stop_when_known,
)
from dori_lightning.attacks.solver import BrokenAttackError
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.runtime import distributed
from dori_lightning.types import Budget, Condition, Pair
from support.context import quiet_trainer, read_pairs

SETTINGS = AttackSettings(
    inits=("random", "prompt", "control_prompt"),
    other_inits=("random",),
    noise_batch=1,
    restarts=2,
    snapshots=(0, 1),
    pairs_per_forward=4,
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two suspected images and three controls."""
    return read_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def context(model, pairs, tmp_path):
    data = PairsDataModule(pairs, model)
    controls = [pair for pair in pairs if pair.kind == "control"]
    return AttackContext(
        model=model,
        data=data,
        settings=SETTINGS,
        budget=Budget(steps=2),
        controls=ControlPrompts(tuple(p.id for p in controls), data.batch(controls).embeddings),
        folder=tmp_path / "attacks",
        seed=5,
        edit="none",
    )


def trainer() -> L.Trainer:
    return quiet_trainer(inference_mode=False, enable_checkpointing=False)


def by_key(found: list[Conditioning]) -> dict[tuple[object, ...], torch.Tensor]:
    return {
        (c.pair.id, c.condition.init, c.restart, c.condition.budget.steps): c.embedding
        for c in found
    }


@pytest.fixture
def solved(monkeypatch):
    """Pairs of every batch that is solved."""
    batches: list[tuple[str, ...]] = []
    solve: Callable[..., Any] = module.solve

    def spy(model, problem, **options):
        batches.append(problem.ids)
        return solve(model, problem, **options)

    monkeypatch.setattr(module, "solve", spy)
    return batches


def test_random_starts_alone_are_scaled_and_nothing_else_is_another_attack(context, pairs):
    own = replace(context, scale=0.25)
    for init in ("random", "prompt", "control_prompt"):
        job = Job(pairs[0], init, 0)
        same = init != "random"
        assert own.scale_of(job) == (1.0 if same else 0.25)
        assert torch.equal(own.initial(job), own.scale_of(job) * context.initial(job))
        assert (own.key(job) == context.key(job)) == same


def test_jobs_are_every_pair_from_every_initial_point_it_is_attacked_from(pairs):
    rounds = attack_rounds(SETTINGS, pairs[:3])
    assert [[job.name for job in jobs] for jobs in rounds] == [
        [f"{init}/{pair.id}.r{restart}" for pair in pairs[:few]]
        for init, few in (("random", 3), ("prompt", 2), ("control_prompt", 2))
        for restart in range(2)
    ]


def test_rounds_one_by_one_or_all_together_give_the_same_bits_and_are_not_solved_again(
    context, pairs, solved, tmp_path
):
    rounds, seen = attack_rounds(SETTINGS, pairs[:3]), []
    apart = run_attacks(context, rounds, trainer=trainer(), on_round=seen.append)
    assert [len(ids) for ids in solved] == [3, 3, 2, 2, 2, 2]
    assert [c for one in seen for c in one] == apart
    assert [len(one) for one in seen] == [len(jobs) * 3 for jobs in rounds]
    solved.clear()
    other = replace(context, folder=tmp_path / "other")
    jobs = [job for jobs in rounds for job in jobs]
    together = run_attacks(other, [jobs], strict=True)
    assert [len(ids) for ids in solved] == [4, 4, 4, 2]
    ours, theirs = by_key(together), by_key(apart)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ends = [ours[pairs[0].id, init, r, 2] for init in ("random", "prompt") for r in range(2)]
    assert all(not torch.equal(a, b) for k, a in enumerate(ends) for b in ends[k + 1 :])

    (tmp_path / "other" / f"{jobs[3].name}.safetensors").unlink()
    solved.clear()
    again = by_key(run_attacks(other, [jobs]))
    assert solved == [(jobs[3].pair.id,)]
    assert all(torch.equal(again[key], ours[key]) for key in ours)


def test_each_process_attacks_its_own_jobs_once_without_padding(
    context, pairs, solved, monkeypatch
):
    settings = replace(SETTINGS, pairs_per_forward=2)
    context, jobs = replace(context, settings=settings), [Job(p, "random", 0) for p in pairs]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for name in ("barrier", "check"):
        monkeypatch.setattr(distributed, name, lambda: None)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        module._attack(context, jobs, range(1), trainer=None, strict=False)
    ids = [pair.id for pair in pairs]
    assert solved == [(ids[0], ids[2]), (ids[4],), (ids[1], ids[3])]


def test_batches_are_of_jobs_at_the_same_step_and_no_sampler_is_put_in(context, pairs):
    settings = replace(SETTINGS, pairs_per_forward=2)
    context, jobs = replace(context, settings=settings), [Job(p, "random", 0) for p in pairs]
    module._attack(context, jobs[1:3], range(1), trainer=None, strict=False)
    batches = JobBatches(context, jobs, stop_at=2)
    ids = [pair.id for pair in pairs]
    found = [[job.pair.id for job in batch.jobs] for batch in batches]
    assert found == [[ids[0], ids[3]], [ids[4]], [ids[1], ids[2]]]
    assert batches.steps == 2 + 2 + 1
    last = [*batches][-1]
    assert last.resume_from is not None
    assert last.resume_from.ids == (ids[1], ids[2])
    assert has_iterable_dataset(context.data.serve(batches).predict_dataloader())
    assert len(JobBatches(context, jobs[1:3], stop_at=1).batches) == 0


def test_an_attack_without_a_gradient_is_marked_or_raises(context, pairs, monkeypatch):
    def deaf(latents, *args, **_):
        return latents.flatten(1).mean(1) + 0 * args[2].flatten(1).sum(1)

    monkeypatch.setattr(context.model, "denoising_loss", deaf)
    jobs = [Job(pairs[0], "prompt", 0)]
    with pytest.raises(BrokenAttackError, match=pairs[0].id):
        run_attacks(context, [jobs], strict=True)
    assert [c.status for c in run_attacks(context, [jobs])] == ["ok"] + 2 * ["no_gradient"]


def test_who_is_known_is_left_out_and_stands_for_later_budgets():
    taken: list[tuple[tuple[str, ...], range]] = []

    def at(pair, steps):
        return Conditioning(
            pair, Condition("dori", "prompt", Budget(steps=steps)), 0, torch.tensor(float(steps))
        )

    def attack(jobs, steps):
        taken.append((tuple(job.pair.id for job in jobs), steps))

    def look(found):
        step = found[0].condition.budget.steps
        ended = {c.pair.id for c in found} & {0: {"a"}, 3: {"c"}, 7: set[str](), 9: {"b"}}[step]
        return [replace(c, seeds=(2,)) for c in found], ended

    jobs = [Job(Pair(name, "vm", "", Path()), "prompt", 0) for name in "abcd"]
    found = stop_when_known(
        attack,
        lambda job: [at(job.pair, k) for k in (0, 3, 7, 9)],
        jobs,
        ends=(0, 3, 7, 9),
        look=look,
        known={"d": at(jobs[3].pair, 0)},
    )
    assert taken == [
        (("a", "b", "c"), range(0)), (("b", "c"), range(3)), (("b",), range(3, 7)),
        (("b",), range(7, 9)),
    ]  # fmt: skip
    shown = {"a": (2,), "b": (2,), "c": (2,), "d": None}
    assert {(c.pair.id, c.seeds) for c in found} == {*shown.items()}
    held = [(c.pair.id, c.condition.budget.steps, c.stopped_at, float(c.embedding)) for c in found]
    assert held == [
        ("a", 0, None, 0), ("a", 3, 0, 0), ("a", 7, 0, 0), ("a", 9, 0, 0),
        ("b", 0, None, 0), ("b", 3, None, 3), ("b", 7, None, 7), ("b", 9, None, 9),
        ("c", 0, None, 0), ("c", 3, None, 3), ("c", 7, 3, 3), ("c", 9, 3, 3),
        ("d", 0, None, 0), ("d", 3, 0, 0), ("d", 7, 0, 0), ("d", 9, 0, 0),
    ]  # fmt: skip
