"""The audit attacks the controls wherever its answer would rest on an attack not tried on them."""

from functools import partial
from typing import Any

import pytest

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.model_check import check_model
from dori_lightning.audit import evaluation
from dori_lightning.mitigations.edits import EmptyEdit
from dori_lightning.types import Budget
from support.context import make_audit_context, quiet_trainer
from support.tiny import tiny_model


@pytest.fixture
def attacked_from(tmp_path, monkeypatch):
    """Initial points that controls were attacked from, by what brings suspected images back."""
    model = tiny_model(tmp_path / "checkpoint")

    def run(*found: str, **settings: Any) -> set[str | None]:
        if found:  # a tiny model with random weights holds no image
            monkeypatch.setattr(evaluation, "unchecked_starts", lambda *_: found)
        context = make_audit_context(
            tmp_path,
            model,
            attack=AttackSettings(inits=("prompt", "random"), noise_batch=1, **settings),
            budget=Budget(steps=1),
            make_trainer=partial(quiet_trainer, inference_mode=False),
        )
        generated = evaluation.attack_and_generate(context, EmptyEdit())
        counted = evaluation.evaluate(context, generated).cells
        return {
            cell.condition.init
            for cell in counted
            if cell.kind == "control" and cell.condition.attack == "dori" and cell.n == 3
        }

    return run


def test_controls_are_attacked_from_where_images_come_back(attacked_from):
    assert attacked_from(other_inits=("prompt",)) == {"prompt"}
    assert attacked_from("random", other_inits=("prompt",)) == {"prompt", "random"}
    assert attacked_from("prompt", other_inits=()) == {"prompt"}


def test_controls_that_were_attacked_everywhere_are_not_looked_at_twice(
    attacked_from, monkeypatch
):
    monkeypatch.setattr(evaluation, "measure_shared", lambda *_: pytest.fail("measures twice"))
    assert attacked_from() == {"prompt", "random"}


def test_the_model_is_checked_on_controls_which_no_mitigation_is_meant_to_harm(
    tmp_path, monkeypatch
):
    """A cure makes suspects hard to denoise: that is no damage."""
    asked: list[list[str]] = []
    monkeypatch.setattr(
        evaluation, "check_model", lambda *given: asked.append(given[3]) or check_model(*given)
    )
    context = make_audit_context(
        tmp_path,
        tiny_model(tmp_path / "checkpoint"),
        attack=AttackSettings(inits=("prompt",), noise_batch=1),
        budget=Budget(steps=1),
        make_trainer=partial(quiet_trainer, inference_mode=False),
    )
    evaluation.attack_and_generate(context, EmptyEdit())
    controls = {pair.id for pair in context.pairs if pair.kind == "control"}
    assert controls < {pair.id for pair in context.pairs}
    assert [(len(ids), set(ids)) for ids in asked] == [(evaluation.IMAGES, controls)]
