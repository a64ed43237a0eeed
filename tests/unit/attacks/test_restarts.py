"""Attacks of one pair side by side are the same attacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from dori_lightning.attacks import embedding_attack as module
from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.embedding_attack import (
    Conditioning,
    ControlPrompts,
    attack_restarts,
    run_attacks,
)
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.types import Budget, Pair
from support.context import read_pairs

SETTINGS = AttackSettings(
    inits=("random", "prompt", "control_prompt"),
    other_inits=("random",),
    noise_batch=2,
    restarts=3,
    snapshots=(0, 1),
    pairs_per_forward=4,
)
BUDGET = Budget(steps=2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, ...]:
    return read_pairs(tmp_path_factory.mktemp("pairs"))


def arguments(model: StableDiffusion, pairs: tuple[Pair, ...], folder: Path) -> dict[str, Any]:
    data = PairsDataModule(pairs, model, pairs_per_batch=2)
    controls = [pair for pair in pairs if pair.kind == "control"]
    prompts = ControlPrompts(tuple(p.id for p in controls), data.batch(controls).embeddings)
    return {
        "data": data,
        "settings": SETTINGS,
        "budget": BUDGET,
        "controls": prompts,
        "folder": folder,
        "seed": 5,
        "edit": "none",
    }


def by_key(triggers: list[Conditioning]) -> dict[tuple[object, ...], torch.Tensor]:
    return {
        (t.pair.id, t.condition.init, t.restart, t.condition.budget.steps): t.embedding
        for t in triggers
    }


def test_side_by_side_or_one_restart_at_a_time_gives_the_same_bits(
    model: StableDiffusion, pairs: tuple[Pair, ...], tmp_path: Path
) -> None:
    few = pairs[:3]  # two suspected images and a control
    ours = by_key(attack_restarts(model, few, **arguments(model, pairs, tmp_path / "a")))
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, inference_mode=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    theirs = by_key(
        run_attacks(model, few, trainer=trainer, **arguments(model, pairs, tmp_path / "b"))
    )
    assert ours.keys() == theirs.keys()
    assert len(ours) == (2 * 3 + 1) * 3 * 3
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_the_ledger_holds_is_not_solved_again(
    model: StableDiffusion,
    pairs: tuple[Pair, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = arguments(model, pairs, tmp_path)
    whole = by_key(attack_restarts(model, pairs[:2], **given))
    (tmp_path / "random" / "pair0.r2.safetensors").unlink()
    solved: list[tuple[str, ...]] = []
    solve: Callable[..., Any] = module.solve

    def counted(model: Any, problem: Any, **options: Any) -> Any:
        solved.append(problem.ids)
        return solve(model, problem, **options)

    monkeypatch.setattr(module, "solve", counted)
    assert all(
        torch.equal(value, whole[key])
        for key, value in by_key(attack_restarts(model, pairs[:2], **given)).items()
    )
    assert solved == [("pair0",)]


def test_restarts_differ(model: StableDiffusion, pairs: tuple[Pair, ...], tmp_path: Path) -> None:
    found = by_key(attack_restarts(model, pairs[:1], **arguments(model, pairs, tmp_path)))
    ends = [found["pair0", init, r, 2] for init in ("random", "prompt") for r in range(3)]
    assert all(not torch.equal(a, b) for k, a in enumerate(ends) for b in ends[k + 1 :]), (
        "starts or at least noise are drawn anew"
    )
