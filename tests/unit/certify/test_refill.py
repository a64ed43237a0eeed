from dataclasses import replace
from typing import Any

import pytest
import torch

from dori_lightning.certify.refill import Refill, complete, fill, fill_means
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import MaskEdit, Origin, PairMaskEdit
from dori_lightning.mitigations.esd import ESD
from dori_lightning.mitigations.prompt_adjustment import PromptAdjustment
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.types import InputError
from support.attempts import Kept, make_subject, plan_of
from support.edits import value_masks
from support.unchanged import unchanged


def test_a_matrix_of_low_rank_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, 3, generator=generator) for size in (40, 60))
    weight = left @ right.T
    missing = torch.rand(40, 60, generator=generator) < 0.1
    guess = fill_means(weight.masked_fill(missing, 0), missing)
    found = complete(guess, missing, rank=3, iterations=100)
    assert found[~missing].equal(weight[~missing])
    error = (found - weight)[missing].norm() / weight[missing].norm()
    assert error < 0.01 < 0.5 < (guess - weight)[missing].norm() / weight[missing].norm()


def test_means_are_those_of_the_row_or_of_the_column() -> None:
    weight = torch.tensor([[1.0, 3.0, 9.0], [5.0, 7.0, 9.0], [0.0, 0.0, 0.0]])
    missing = torch.tensor([[False, False, True], [False] * 3, [True] * 3])
    filled = fill_means(weight, missing)
    assert filled.tolist() == [[1, 3, 2], [5, 7, 9], [3, 5, 9]]


def test_only_zeros_are_filled_and_what_they_were_is_not_read(model) -> None:
    name = f"{next(iter(model.layers('feed_forward.out')))}.weight"
    weight = dict(model.denoiser().named_parameters())[name]
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    edit = MaskEdit(Origin(model.fingerprint), {name: mask})
    known = weight.detach().clone()
    filled = fill(model, edit, rank=2, iterations=3).top.weights[name]
    assert filled[~mask].equal(known[~mask])
    assert filled[mask].count_nonzero() == mask.sum()
    with torch.no_grad():
        weight[mask] = 5.0
        again = fill(model, edit, rank=2, iterations=3).top.weights[name]
        weight.copy_(known)
    assert again.equal(filled)


def test_a_blocked_rows_bias_is_filled_too(model) -> None:
    name = next(n for n, _ in model.denoiser().named_parameters() if n.endswith(".bias"))
    weight, bias = (
        dict(model.denoiser().named_parameters())[n] for n in (name[:-4] + "weight", name)
    )
    mask = torch.arange(len(weight)) == 1
    edit = MaskEdit(Origin(model.fingerprint), {name[:-4] + "weight": mask})
    filled = fill(model, edit, rank=None, iterations=1)
    torch.testing.assert_close(filled.top.weights[name][1], bias[~mask].mean())


@pytest.mark.parametrize("scope", ["everybody", "each pair"])
def test_each_filling_is_drawn_and_searched_and_leaves_nothing(tmp_path, model, scope) -> None:
    subject = make_subject(tmp_path, model)
    pairs = subject.context.pairs[:1]
    edit = value_masks(model)
    if scope == "each pair":
        edit = PairMaskEdit(edit.origin, {pairs[0].id: edit.masks})
    attack = Refill(rank=2, iterations=2, search=1)
    with unchanged(model):
        attack.run(subject.with_edit(edit), pairs, attempt := Kept(pairs))
    ways = ("its prompt", "1 steps from prompt")
    fillings = ("zeros filled with means", "zeros filled at rank 2")
    assert list(attempt.images) == [f"{f}, then {way}" for way in ways for f in fillings]
    assert set(attempt.rows.values()) == {attack.rows(plan_of(Wanda()))}


def test_only_the_pruned_model_itself_is_filled(tmp_path, model) -> None:
    subject = make_subject(tmp_path, model, value_masks(model))
    assert Refill().applies(subject)
    for role in ("reference", "planted"):
        assert not Refill().applies(replace(subject, role=role))


@pytest.mark.parametrize("mitigation", [NoMitigation(), PromptAdjustment(), ESD("esd_x", "x")])
def test_without_zeros_it_is_refused_before_anything_is_loaded(mitigation) -> None:
    with pytest.raises(InputError, match=r"attack=refill without a mask edit[\s\S]*wanda_10"):
        Refill().check(plan_of(mitigation))
    Refill().check(plan_of(Wanda()))


def test_other_edits_are_refused_where_only_the_edit_tells(tmp_path, model) -> None:
    subject = make_subject(tmp_path, model)
    with pytest.raises(InputError, match="attack=refill without a mask edit"):
        Refill().run(subject, subject.context.pairs[:1], Kept(subject.context.pairs[:1]))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"iterations": 0}, {"search": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Refill(**wrong)
