from dataclasses import replace
from typing import Any

import pytest
import torch

from dori_lightning.certify.interpolation import Interpolation, moved_back
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import (
    EmptyEdit,
    LayeredEdit,
    Origin,
    PairMaskEdit,
    WeightEdit,
)
from dori_lightning.mitigations.prompt_adjustment import PromptAdjustment
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.types import InputError
from support.attempts import Kept, make_subject, plan_of
from support.edits import value_masks
from support.unchanged import unchanged


def weights_of(model, edit=None) -> dict[str, torch.Tensor]:
    with (edit or EmptyEdit()).applied(model):
        return {n: value.detach().clone() for n, value in model.denoiser().named_parameters()}


def trained(model, *, by: float, count: int = 2) -> WeightEdit:
    first = list(weights_of(model).items())[:count]
    return WeightEdit(Origin(model.fingerprint), {name: value + by for name, value in first})


@pytest.mark.parametrize("kind", ["trained", "masks"])
def test_a_share_of_what_the_edit_did_is_undone(model, kind) -> None:
    edit = trained(model, by=0.4) if kind == "trained" else value_masks(model)
    before, under = weights_of(model), weights_of(model, edit)
    with unchanged(model):
        moved = moved_back(model, edit, 0.25)
    after = weights_of(model, moved)
    for name, value in before.items():
        torch.testing.assert_close(after[name], under[name] + 0.25 * (value - under[name]))
    assert set(moved.top.weights) == {n for n in before if not before[n].equal(under[n])}


def test_what_was_trained_on_top_stays(model) -> None:
    below, planted = trained(model, by=0.4), trained(model, by=-3.0, count=1)
    both = LayeredEdit.over(below, planted)
    name, other = below.weights
    after, before = weights_of(model, moved_back(model, both, 0.5)), weights_of(model)
    torch.testing.assert_close(after[name], before[name] - 3.0 - 0.2)
    torch.testing.assert_close(after[other], before[other] + 0.2)


def test_under_an_edit_that_differs_by_pair_each_moves_back_its_own(tmp_path, model) -> None:
    subject = make_subject(tmp_path, model)
    one, other = subject.context.pairs[:2]
    masks = {pair.id: value_masks(model, k).masks for k, pair in enumerate((one, other))}
    subject = subject.with_edit(PairMaskEdit(Origin(model.fingerprint), masks))
    attack, attempts = Interpolation(shares=(0.5,), search=1), []
    for group in ([one, other], [one]):
        attempts.append(attempt := Kept(group))
        with unchanged(model):
            attack.run(subject, group, attempt)
    both, alone = attempts
    assert list(both.images) == [
        "50% of the way back, then its prompt",
        "50% of the way back, then 1 steps from prompt",
    ]
    for level, images in alone.images.items():
        assert images[one.id].equal(both.images[level][one.id])
    assert both.rows[one.id] == attack.rows(plan_of(Wanda()))


def test_rows_are_those_that_were_taken(tmp_path, model) -> None:
    subject = make_subject(tmp_path, model, trained(model, by=0.1))
    pairs = subject.context.pairs[:4]
    attempt, before = Kept(pairs), model.unet_evaluations
    Interpolation(shares=(0.2, 0.7)).run(subject, pairs, attempt)
    assert sum(attempt.rows.values()) == model.unet_evaluations - before


def test_a_reference_has_no_way_back(tmp_path, model) -> None:
    subject = make_subject(tmp_path, model)
    assert Interpolation().applies(subject)
    assert not Interpolation().applies(replace(subject, role="reference"))


@pytest.mark.parametrize("mitigation", [NoMitigation(), PromptAdjustment()])
def test_without_weights_to_move_it_is_refused_before_anything_is_loaded(mitigation) -> None:
    with pytest.raises(InputError, match=r"certify\.paths[\s\S]*leave interpolation out"):
        Interpolation().check(plan_of(mitigation))
    Interpolation().check(plan_of(Wanda()))


@pytest.mark.parametrize(
    "wrong", [{"shares": [0.5, 0.25]}, {"shares": [0.5, 1]}, {"shares": []}, {"search": -1}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Interpolation(**wrong)
