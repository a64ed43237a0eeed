from typing import Any

import pytest
import torch
from torch import nn

from dori_lightning.certify.quantization import Quantization, round_weights, rounded
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import InputError
from support.attempts import Kept, make_subject, plan_of
from support.edits import value_masks
from support.families import load_family
from support.unchanged import unchanged


def test_half_precision_rounds_to_its_numbers() -> None:
    weight = torch.randn(3, 4)
    assert rounded(weight, "fp16", group=64).equal(weight.half().float())


@pytest.mark.parametrize(("form", "levels"), [("int8", 255), ("int4", 15), ("int2", 3)])
def test_integers_have_so_many_levels_and_keep_zero_and_the_largest(form, levels) -> None:
    weight = torch.randn(2, 5, 200, generator=torch.Generator().manual_seed(0))
    weight[0, 0, :7] = 0
    coarse = rounded(weight, form, group=64)
    assert coarse.shape == weight.shape
    assert not coarse[0, 0, :7].any()
    rows, known = coarse.flatten(1), weight.flatten(1)
    parts = [slice(None)] if form == "int8" else [slice(k, k + 64) for k in range(0, 1000, 64)]
    for part in parts:
        step = known[:, part].abs().amax(1, keepdim=True) / (levels // 2)
        whole = rows[:, part] / step
        torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
        assert (rows[:, part] - known[:, part]).abs().le(step / 2 + 1e-6).all()
        torch.testing.assert_close(rows[:, part].abs().amax(1), known[:, part].abs().amax(1))


def test_a_row_of_zeros_stays_one() -> None:
    assert rounded(torch.zeros(2, 3), "int8", group=64).equal(torch.zeros(2, 3))


def test_every_linear_and_convolution_layer_is_rounded_and_pruned_rows_stay_zero(model) -> None:
    masks = value_masks(model)
    with masks.applied(model):
        edit = round_weights(model, "int4", group=64)
    layers = [m for m in model.denoiser().modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(edit.weights) == len(layers)
    ((name, mask),) = masks.masks.items()
    assert not edit.weights[name][mask].any()


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_each_format_is_drawn_and_leaves_nothing(tmp_path, model, family) -> None:
    attack = Quantization(formats=("int8", "int2"))
    one = model if family == "sd" else load_family(family)
    sampler = "ddim" if family == "sd" else "flow_euler"
    sampling = Sampling(sampler, 2, 2.0, images_per_pair=4)
    subject = make_subject(tmp_path, one, sampling=sampling)
    pairs = subject.context.pairs[:4]
    attempt, before = Kept(pairs), one.unet_evaluations
    with unchanged(one):
        attack.run(subject, pairs, attempt)
    first, second = attempt.images.values()
    assert list(attempt.images) == [f"rounded to {f}, then its prompt" for f in attack.formats]
    assert not first["pair0"].equal(second["pair0"])
    assert attempt.rows == dict.fromkeys(first, attack.rows(plan_of(NoMitigation())))
    assert sum(attempt.rows.values()) == one.unet_evaluations - before


@pytest.mark.parametrize(
    "wrong", [{"formats": ["int9"]}, {"formats": []}, {"formats": ["int4", "int4"]}, {"group": 0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Quantization(**wrong)
