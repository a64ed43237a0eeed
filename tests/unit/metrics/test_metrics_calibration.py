"""Where thresholds go, and when they refuse to go anywhere."""

import logging
import math

import numpy as np
import pytest

from dori_lightning.metrics.calibration import calibrate
from dori_lightning.metrics.descriptors import (
    LocalCorrelation,
    NormalizedCorrelation,
    blur,
    gaussian_taps,
)
from dori_lightning.types import MARGIN, InputError, Scale

NULLS = {"a": [0.1, 0.3], "b": [0.2, 0.0], "plain": [0.9, 0.1]}
CEILINGS = {"a": 0.9, "b": 0.8, "plain": 0.95}
SCORES = {"vm_scores": [0.9, 0.8], "control_scores": [0.1, 0.2]}
BOTH = {"nulls": NULLS, "ceilings": CEILINGS}


def test_each_threshold_lies_midway_between_the_highest_null_and_the_ceiling():
    calibration = calibrate("local", **BOTH, **SCORES)
    assert calibration.rule == "calibrated"
    assert calibration.threshold_of("a") == pytest.approx(0.6)
    assert calibration.threshold_of("b") == pytest.approx(0.5)
    assert calibration.threshold == pytest.approx(0.55), "the median, for display"
    assert calibration.auc == 1.0
    assert calibration.roc[0][:2] == (0.0, 0.0)
    assert len(calibration.null) == 6


def test_an_image_that_anything_resembles_cannot_be_audited():
    calibration = calibrate("local", **BOTH, **SCORES)
    assert calibration.not_auditable == ("plain",)
    assert math.isnan(calibration.threshold_of("plain"))


def test_no_image_moves_the_threshold_of_another():
    rng = np.random.default_rng(0)
    for _ in range(200):
        names = [f"image_{k}" for k in range(int(rng.integers(2, 20)))]
        nulls = {name: rng.uniform(-0.1, 0.4, 20) for name in names}
        ceilings = {name: rng.uniform(0.6, 1.0) for name in names}
        alone = calibrate("local", nulls=nulls, ceilings=ceilings)
        wheel = {"wheel": rng.uniform(0.2, 0.4, 20)}
        more = calibrate("local", nulls=nulls | wheel, ceilings=ceilings | {"wheel": 0.38})
        assert "wheel" in more.not_auditable
        assert {name: more.threshold_of(name) for name in names} == {
            name: alone.threshold_of(name) for name in names
        }
        assert more.threshold == alone.threshold


def test_a_margin_is_asked_for():
    assert Scale(0.5, 0.5 + MARGIN + 1e-9).auditable
    assert not Scale(0.5, 0.5 + MARGIN - 1e-9).auditable


def test_fixed_threshold_is_taken_as_it_is():
    calibration = calibrate("sscd", **BOTH, fixed=0.7, **SCORES)
    assert (calibration.threshold, calibration.rule) == (0.7, "fixed")
    assert calibration.threshold_of("plain") == 0.7


def test_fixed_threshold_needs_no_controls():
    calibration = calibrate("sscd", nulls={}, ceilings={}, vm_scores=[0.9], fixed=0.7)
    assert math.isnan(calibration.auc)
    assert calibration.roc == ()


def test_fixed_threshold_out_of_reach_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        calibrate("sscd", **BOTH, fixed=0.95, **SCORES)
        calibrate("sscd", **BOTH, fixed=0.1, **SCORES)
    assert "miss it even as plain autoencoder" in caplog.text
    assert "no replicas pass it" in caplog.text


@pytest.mark.parametrize("fixed", [1.5, math.nan])
def test_fixed_threshold_must_be_a_similarity(fixed):
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        calibrate("sscd", **BOTH, fixed=fixed, **SCORES)


def test_a_blind_descriptor_is_refused_and_names_who_could_decide():
    blind = {"nulls": {"a": [0.9]}, "ceilings": {"a": 0.8}}
    with pytest.raises(InputError, match=r"that could: gradient_orientation \(metrics.decider"):
        calibrate("ssim", **blind, able=["gradient_orientation"])
    with pytest.raises(InputError, match="no other descriptor"):
        calibrate("ssim", **blind)


@pytest.mark.parametrize("missing", [{"nulls": {"a": []}}, {"ceilings": {"a": math.nan}}])
def test_nothing_to_calibrate_with_is_refused(missing):
    with pytest.raises(InputError, match="float32 or bfloat16"):
        calibrate("local", **{"nulls": {"a": [0.1]}, "ceilings": {"a": 0.9}} | missing)


def test_failed_scores_are_left_out_loudly(caplog):
    with caplog.at_level(logging.WARNING):
        calibration = calibrate(
            "local",
            nulls=NULLS | {"a": [0.3, math.nan]},
            ceilings=CEILINGS,
            vm_scores=[0.9, math.nan],
            control_scores=[0.1],
        )
    assert len(calibration.null) == 5
    assert calibration.threshold_of("a") == pytest.approx(0.6)
    assert calibration.auc == 1.0
    assert "1 of 2 similarities of the null of a" in caplog.text


def test_real_images_are_told_apart_by_local_and_not_by_global_correlation(photographs):
    """Two drawn scenes and photographs: worn copies against other images."""
    worn = blur(photographs.double(), gaussian_taps(7, 1.2)).float().clamp(0, 1)
    margins = {}
    for descriptor in (LocalCorrelation(), NormalizedCorrelation()):
        similarity = descriptor.similarity(worn, photographs).numpy()
        others = np.where(np.eye(8, dtype=bool), -1, similarity).max(0)
        margins[descriptor.name] = (similarity.diagonal() - others).min()
    assert margins["local_correlation"] > MARGIN
    assert margins["local_correlation"] > margins["normalized_correlation"]
