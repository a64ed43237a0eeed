"""An attack in stretches is the attack in one go, whoever shares its passes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dori_lightning.attacks.budget import AttackSettings, BudgetSettings
from dori_lightning.attacks.embedding_attack import Conditioning, stop_at_success
from dori_lightning.attacks.solver import AttackProblem, AttackResult, joined, solve
from dori_lightning.attacks.store import AttackStore
from dori_lightning.mitigations.adversarial_finetuning import PoolSettings
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import Budget, Condition, InputError, Pair

FIVE = Budget("l2", 1.5, 5)


def attack(model: StableDiffusion, problem: AttackProblem, **options: Any) -> AttackResult:
    return solve(model, problem, budget=FIVE, noise_batch=2, snapshots=(0, 2), **options)


def rows(problem: AttackProblem, *index: int) -> AttackProblem:
    chosen = list(index)
    ids = tuple(problem.ids[k] for k in chosen)
    return replace(
        problem, ids=ids, latents=problem.latents[chosen], initial=problem.initial[chosen]
    )


def test_rows_go_on_in_other_company_to_the_same_bits(
    model: StableDiffusion, problem: AttackProblem, tmp_path: Path
) -> None:
    whole = attack(model, problem)
    store = AttackStore(tmp_path, {})
    inputs = dict.fromkeys(problem.ids, "")
    for chosen in ((0, 1, 2), (3, 4)):
        begun = attack(model, rows(problem, *chosen), stop_at=2)
        assert (begun.steps, begun.snapshots) == (2, (0, 2))
        store.write(begun, "prompt", inputs)
    left = (4, 1, 2)  # from both, in another order; the others came back
    read = [store.read(problem.ids[k], "prompt", 0, "") for k in left]
    stored = [result for result in read if result is not None]
    ended = attack(model, rows(problem, *left), resume_from=joined(stored))
    index = list(left)
    assert ended.snapshots == whole.snapshots
    assert torch.equal(ended.embeddings, whole.embeddings[index])
    assert torch.equal(ended.losses, whole.losses[index])
    assert ended.state is None


def test_the_offset_is_kept_and_not_what_rounding_left_of_it(
    model: StableDiffusion, problem: AttackProblem
) -> None:
    begun = attack(model, problem, stop_at=2)
    assert begun.state is not None
    difference = begun.embeddings[:, -1] - problem.initial
    assert torch.allclose(difference, begun.state.delta, atol=1e-5)
    assert not torch.equal(difference, begun.state.delta)
    assert begun.state.count.tolist() == [2.0] * 5


def test_rows_without_a_gradient_stay_so_and_cost_nothing_more(
    model: StableDiffusion, problem: AttackProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(latents: torch.Tensor, *args: torch.Tensor, **_: Any) -> torch.Tensor:
        return latents.flatten(1).mean(1) + 0 * args[2].flatten(1).sum(1)

    monkeypatch.setattr(model, "denoising_loss", deaf)
    begun = attack(model, problem, stop_at=2)
    steps: list[int] = []
    ended = attack(model, problem, resume_from=begun, on_step=steps.append)
    assert ended.no_gradient.all()
    assert not ended.diverged.any()
    assert torch.equal(ended.embeddings, problem.initial[:, None].expand(-1, 3, -1, -1))
    assert ended.losses.isnan().all()
    assert steps == []


def pair(name: str) -> Pair:
    return Pair(name, "vm", "", Path())


def test_who_came_back_is_left_out_and_stands_for_later_budgets() -> None:
    taken: list[tuple[tuple[str, ...], range]] = []

    def attack(pairs: Any, steps: range) -> None:
        taken.append((tuple(p.id for p in pairs), steps))

    def read(own: Pair) -> list[Conditioning]:
        return [
            Conditioning(
                own, Condition("dori", "prompt", Budget(steps=k)), 0, torch.tensor(float(k))
            )
            for k in (0, 3, 7, 9)
        ]

    def reproduced(found: Any) -> set[str]:
        step = found[0].condition.budget.steps
        return {t.pair.id for t in found} & {0: {"a"}, 3: {"c"}, 7: set[str](), 9: {"b"}}[step]

    pairs = [pair(name) for name in "abc"]
    found = stop_at_success(attack, read, pairs, ends=(0, 3, 7, 9), reproduced=reproduced)
    assert taken == [
        (("a", "b", "c"), range(0)), (("b", "c"), range(3)), (("b",), range(3, 7)),
        (("b",), range(7, 9)),
    ]  # fmt: skip
    held = [(t.pair.id, t.condition.budget.steps, t.stopped_at, float(t.embedding)) for t in found]
    assert held == [
        ("a", 0, None, 0), ("a", 3, 0, 0), ("a", 7, 0, 0), ("a", 9, 0, 0),
        ("b", 0, None, 0), ("b", 3, None, 3), ("b", 7, None, 7), ("b", 9, None, 9),
        ("c", 0, None, 0), ("c", 3, None, 3), ("c", 7, 3, 3), ("c", 9, 3, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("snapshots", [(), (5,), (5, 9)])
def test_stopping_needs_a_snapshot_before_the_end(snapshots: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"none before the last step, 5\n  fix:   give some"):
        AttackSettings(budget=BudgetSettings(steps=5), snapshots=snapshots, early_stop=True)


def test_who_does_not_look_at_pictures_cannot_stop() -> None:
    settings = AttackSettings(snapshots=(1,), early_stop=True)
    with pytest.raises(InputError, match=r"attack\.early_stop is for audits"):
        PoolSettings(attack=settings)
