"""An edit that leaves every weight as it is must not pass for a mitigation."""

import logging

import pytest
import torch

from dori_lightning.mitigations.edits import (
    EmptyEdit,
    MaskEdit,
    Origin,
    PairMaskEdit,
    WeightEdit,
    changed_weights,
)
from dori_lightning.mitigations.prompt_adjustment import PromptAdjustmentEdit
from dori_lightning.models.stable_diffusion import StableDiffusion


def test_weights_are_counted_where_they_differ(
    model: StableDiffusion, caplog: pytest.LogCaptureFixture
) -> None:
    origin, weights = Origin(model.fingerprint), dict(model.unet.named_parameters())
    name = next(f"{n}.weight" for n in model.layers("cross_attention.value"))
    value = weights[name]
    rows = torch.zeros(len(value), dtype=torch.bool)
    rows[:2] = True
    width = value.shape[1]
    single = torch.zeros_like(value, dtype=torch.bool)
    single[0, 0] = True
    trained = value.detach().clone()
    trained[3, 1] += 1
    with caplog.at_level(logging.INFO):
        assert changed_weights(MaskEdit(origin, {name: rows}), model) == 2 * width
        assert changed_weights(MaskEdit(origin, {name: single}), model) == 1
        pairs = {"a": {name: rows}, "b": {name: rows}, "c": {}}
        assert changed_weights(PairMaskEdit(origin, pairs), model) == 2 * width
        assert changed_weights(WeightEdit(origin, {name: trained}), model) == 1
    assert f"the edit changes {2 * width} of " in caplog.text


def test_masks_of_zeros_and_weights_as_they_were_change_nothing(
    model: StableDiffusion, caplog: pytest.LogCaptureFixture
) -> None:
    origin, weights = Origin(model.fingerprint), dict(model.unet.named_parameters())
    name = next(f"{n}.weight" for n in model.layers("cross_attention.value"))
    nothing = torch.zeros(len(weights[name]), dtype=torch.bool)
    everything = ~nothing
    assert changed_weights(EmptyEdit(), model) == 0
    assert changed_weights(MaskEdit(origin, {name: nothing}), model) == 0
    assert changed_weights(PairMaskEdit(origin, {"a": {}}), model) == 0
    assert changed_weights(WeightEdit(origin, {name: weights[name].detach().clone()}), model) == 0
    with torch.no_grad():
        before = weights[name].clone()
        weights[name].zero_()
    try:
        assert changed_weights(MaskEdit(origin, {name: everything}), model) == 0
    finally:
        with torch.no_grad():
            weights[name].copy_(before)
    assert caplog.text.count("the edit changes 0 of") == 4


def test_a_defence_at_inference_changes_no_weight_and_is_none_the_less(
    model: StableDiffusion,
) -> None:
    assert changed_weights(PromptAdjustmentEdit(Origin(model.fingerprint), 1.0), model) is None
