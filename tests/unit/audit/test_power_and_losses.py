"""Positive controls and the evidence by loss, on a tiny model that is made to hold images."""

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.audit.context import AuditContext, with_self_controls
from dori_lightning.audit.evaluation import generate_ordinary, prompt_conditionings
from dori_lightning.audit.loss_evidence import loss_evidence
from dori_lightning.audit.power import (
    PowerSettings,
    check_never_seen,
    measure_power,
)
from dori_lightning.metrics.evidence import Power
from dori_lightning.metrics.statistics import wilson_interval
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import EmptyEdit
from dori_lightning.types import Budget, Condition, InputError, Pairs
from support.context import make_audit_context, quiet_trainer, read_pairs
from support.runs import grey
from support.tiny import tiny_model


@pytest.fixture
def context(tmp_path: Path) -> AuditContext:
    budget = Budget(steps=1)
    settings = AttackSettings(inits=("prompt",), noise_batch=2)
    return make_audit_context(
        tmp_path,
        tiny_model(tmp_path / "checkpoint"),
        attack=settings,
        budget=budget,
        make_trainer=partial(quiet_trainer, inference_mode=False),
    )


def hold(context: AuditContext, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model denoise one image at half the loss of all others, by its prompt as well."""
    (pair,) = (pair for pair in context.pairs if pair.id == name)
    held = context.data.encoded(pair).latent

    def denoising_loss(latents: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        same = torch.tensor([bool(torch.allclose(own, held, atol=1e-5)) for own in latents])
        return torch.where(same, 0.5, 1.0)

    monkeypatch.setattr(context.model, "denoising_loss", denoising_loss)


def test_a_held_image_is_denoised_better_than_its_copies(
    context: AuditContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(context, "pair0", monkeypatch)
    found = loss_evidence(context, prompt_conditionings(context))
    assert {name: one.ratio for name, one in found.items()} == pytest.approx(
        {pair.id: 0.5 if pair.id == "pair0" else 1.0 for pair in context.pairs}
    )
    assert found["pair0"].score == pytest.approx(math.log(2))


def test_losses_are_keyed_and_starts_that_no_control_has_do_not_count(
    context: AuditContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompt_conditionings(context)
    before = loss_evidence(context, prompts)
    attack = Condition("dori", "random", Budget(steps=1))
    suspect = replace(prompts[0], condition=attack, embedding=torch.randn(8, 12))
    assert loss_evidence(context, [*prompts, suspect]) == before
    of_all = [replace(one, condition=attack, embedding=suspect.embedding) for one in prompts]
    after = loss_evidence(context, [*prompts, *of_all])
    assert all(after[name].ratio <= before[name].ratio for name in before)
    assert after != before
    assert loss_evidence(context, [*prompts, *of_all], known=before) == after
    ended = [replace(one, stopped_at=0) for one in of_all]
    assert loss_evidence(context, [*prompts, *ended]) == after, "where copies alone end a search"
    level = replace(context.attack, early_stop=True, looks=(0,), futility=0.05)
    sequential = replace(context, attack=level, budget=Budget(steps=1))
    assert loss_evidence(sequential, [*prompts, *ended]) == before
    monkeypatch.setattr(context.model, "denoising_loss", lambda *_, **__: pytest.fail("again"))
    assert loss_evidence(sequential, [*prompts, *ended], known=before) == before


def test_a_suspects_own_copy_is_not_compared_with_the_suspect(
    context: AuditContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = with_self_controls(Pairs(context.pairs[:1]), ["mirrored"], tmp_path / "copies")
    data = context.data.with_pairs(listed)
    both = replace(context, pairs=listed, data=data)
    hold(both, listed[0].id, monkeypatch)
    found = loss_evidence(both, ())
    assert found[listed[0].id].ratio == pytest.approx(0.5)
    # compared with the suspect, at half the loss, it would be 2
    assert found[f"{listed[0].id}.mirrored"].ratio == pytest.approx(1.0)


def test_power_counts_what_the_attack_finds_of_what_was_planted(context: AuditContext) -> None:
    generate_ordinary(context)
    planted = context.pairs[:2]
    rest = replace(context, pairs=Pairs(context.pairs[2:]), mitigation=NoMitigation())
    settings = PowerSettings(count=2, steps=1, rounds=1, rows=4)
    power = measure_power(rest, EmptyEdit(), planted, settings)
    assert (power.tried, power.steps) == (2, 1)
    assert 0 <= power.found <= power.planted <= 2
    assert power.interval == wilson_interval(power.found, power.planted)
    assert len(power.scores) <= power.planted


@pytest.mark.parametrize("change", ["none", "saved anew", "flat"])
def test_a_suspects_image_is_no_positive_control(tmp_path: Path, change: str) -> None:
    suspect, other, *controls = read_pairs(tmp_path)
    if change == "flat":
        suspect = replace(suspect, image=grey(tmp_path / "grey.png"))
    path = tmp_path / f"given.{'jpg' if change == 'saved anew' else 'png'}"
    shutil.copy(suspect.image, path)
    if change == "saved anew":
        Image.open(suspect.image).resize((40, 40)).save(path, quality=60)
    given = [replace(controls[0], kind="vm"), replace(suspect, id="given", image=path)]
    with pytest.raises(InputError, match=r"is the image of pair0[\s\S]*power\.images"):
        check_never_seen(given, [other, suspect, *controls])
    check_never_seen(given, [other, *controls])  # a control may be planted: no model holds it
    check_never_seen((), [suspect])


@pytest.mark.parametrize(
    ("planted", "found", "suffices"), [(4, 4, True), (4, 3, False), (0, 0, False)]
)
def test_absence_is_claimed_only_where_the_attack_surely_finds_half(
    planted: int, found: int, suffices: bool
) -> None:
    power = Power(planted, 4, found, wilson_interval(found, planted), 100)
    assert power.suffices == suffices
    assert math.isnan(power.share) == (planted == 0)


@pytest.mark.parametrize("wrong", [{"when": "maybe"}, {"count": 0}, {"lr": 0.0}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"power\.{next(iter(wrong))}"):
        PowerSettings(**wrong)
