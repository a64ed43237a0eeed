"""Where the threshold goes, and when it refuses to go anywhere."""

import logging
import math

import numpy as np
import pytest

from dori_lightning.metrics.calibration import Separation, calibrate, separation_table
from dori_lightning.types import InputError

NULL = np.linspace(-0.1, 0.3, 201)
CEILING = np.linspace(0.8, 1.0, 41)
SCORES = {"vm_scores": [0.9, 0.8], "control_scores": [0.1, 0.2]}


def test_threshold_lies_midway_between_null_and_ceiling():
    calibration = calibrate("local", null=NULL, ceiling=CEILING, **SCORES)
    assert calibration.rule == "calibrated"
    assert calibration.threshold == pytest.approx((0.296 + 0.81) / 2, abs=1e-9)
    assert calibration.auc == 1.0
    assert calibration.roc[0][:2] == (0.0, 0.0)
    assert len(calibration.null) == 201


def test_short_lists_answer_with_their_extremes():
    calibration = calibrate("local", null=[0.1, 0.3], ceiling=[0.7, 0.9], **SCORES)
    assert calibration.threshold == pytest.approx(0.5)


def test_fixed_threshold_is_taken_as_it_is():
    calibration = calibrate("sscd", null=NULL, ceiling=CEILING, fixed=0.7, **SCORES)
    assert (calibration.threshold, calibration.rule) == (0.7, "fixed")


def test_fixed_threshold_needs_no_controls():
    calibration = calibrate(
        "sscd", null=[], ceiling=[], vm_scores=[0.9], control_scores=[], fixed=0.7
    )
    assert math.isnan(calibration.auc)
    assert calibration.roc == ()


def test_fixed_threshold_out_of_reach_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        calibrate("sscd", null=NULL, ceiling=CEILING, fixed=0.95, **SCORES)
        calibrate("sscd", null=NULL, ceiling=CEILING, fixed=0.1, **SCORES)
    assert "miss it even as plain autoencoder" in caplog.text
    assert "no replicas pass it" in caplog.text


@pytest.mark.parametrize("fixed", [1.5, math.nan])
def test_fixed_threshold_must_be_a_similarity(fixed):
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        calibrate("sscd", null=NULL, ceiling=CEILING, fixed=fixed, **SCORES)


def test_overlap_is_refused_and_names_who_could_decide():
    offered = [
        Separation("ssim", 0.6, -1.0, 0.2, 0.8),
        Separation("gradient_orientation", 1.0, 2.0, 0.9, 0.4),
    ]
    with pytest.raises(InputError, match=r"that could: gradient_orientation \(metrics.decider"):
        calibrate("ssim", null=CEILING, ceiling=NULL, offered=offered, **SCORES)
    with pytest.raises(InputError, match="no other descriptor"):
        calibrate("ssim", null=CEILING, ceiling=NULL, **SCORES)


def test_no_controls_is_refused():
    with pytest.raises(InputError, match="images of control pairs"):
        calibrate("local", null=NULL, ceiling=CEILING, vm_scores=[0.9], control_scores=[])


@pytest.mark.parametrize(("null", "ceiling"), [([], CEILING), (NULL, [math.nan])])
def test_nothing_to_calibrate_with_is_refused(null, ceiling):
    with pytest.raises(InputError, match="float32 or bfloat16"):
        calibrate("local", null=null, ceiling=ceiling, **SCORES)


def test_failed_scores_are_left_out_loudly(caplog):
    with caplog.at_level(logging.WARNING):
        calibration = calibrate(
            "local",
            null=[*NULL, math.nan],
            ceiling=CEILING,
            vm_scores=[0.9, math.nan],
            control_scores=[0.1],
        )
    assert len(calibration.null) == 201
    assert calibration.auc == 1.0
    assert "1 of 202 similarities of the null" in caplog.text


def test_separation_table_by_hand_sorts_by_margin():
    rng = np.random.default_rng(0)
    good = (0.9 + 0.01 * rng.standard_normal(200), 0.1 + 0.01 * rng.standard_normal(200))
    poor = (0.5 + 0.3 * rng.standard_normal(200), 0.3 + 0.3 * rng.standard_normal(200))
    table = separation_table({"poor": poor, "good": good})
    assert [row.descriptor for row in table] == ["good", "poor"]
    assert table[0].decides
    assert not table[1].decides
    assert table[0].auc == 1.0
    spread = math.sqrt((good[0].var() + good[1].var()) / 2)
    low = np.quantile(good[0], 0.05, method="lower")
    high = np.quantile(good[1], 0.99, method="higher")
    assert table[0].margin == pytest.approx((low - high) / spread)


def test_separation_table_needs_both_sides():
    with pytest.raises(ValueError, match="local needs replicas"):
        separation_table({"local": ([], [0.1])})


def test_real_pictures_choose_local_over_global_correlation(photographs):
    """Two drawn scenes and photographs: worn copies against other pictures."""
    from dori_lightning.metrics.descriptors import (
        LocalCorrelation,
        NormalizedCorrelation,
        blur,
        gaussian_taps,
    )

    worn = blur(photographs.double(), gaussian_taps(7, 1.2)).float().clamp(0, 1)
    off = ~np.eye(8, dtype=bool)
    samples = {}
    for descriptor in (LocalCorrelation(), NormalizedCorrelation()):
        similarity = descriptor.similarity(worn, photographs).numpy()
        samples[descriptor.name] = (similarity.diagonal(), similarity[off])
    table = separation_table(samples)
    assert table[0].descriptor == "local_correlation"
    assert table[0].decides
