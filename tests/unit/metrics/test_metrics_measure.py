import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dori_lightning.metrics.calibration import (
    Measures,
    ReferenceImages,
    calibrate_measures,
    null_similarities,
)
from dori_lightning.metrics.descriptors import Descriptor
from dori_lightning.types import Condition, InputError, Outcome, Pair


class Brightness(Descriptor):
    """1 minus a gain times the difference of mean brightness: can be computed by hand."""

    def __init__(self, name, gain=1.0, threshold=None):
        self.name, self.gain, self.threshold = name, gain, threshold

    def describe(self, images):
        return images.mean((1, 2, 3))[:, None]

    def compare(self, a, b):
        return 1 - self.gain * (a - b.T).abs()


def pair(name, kind, sha256=""):
    return Pair(name, kind, name, Path(f"{name}.png"), sha256=sha256 or name)


def flat(*levels):
    return torch.stack([torch.full((3, 4, 4), level) for level in levels])


PAIRS = (pair("v", "vm"), pair("a", "control"), pair("b", "control"))


def references(*descriptors, decider="one"):
    measures = Measures({d.name: d for d in descriptors}, decider)
    return ReferenceImages(PAIRS, flat(0.9, 0.1, 0.5), measures)


def test_only_control_originals_are_known_not_to_be_held():
    images = {"v": flat(0.9, 0.8), "a": flat(0.9, 0.9), "b": flat(0.2, 0.3)}
    null = null_similarities(references(Brightness("one")), "one", images)
    # v against a and b; a (which drew v's picture) against a and b; b against a and b
    assert null == pytest.approx([0.3, 0.7, 0.2, 0.6, 0.9, 0.8])


def test_the_same_file_under_another_name_is_no_null():
    measures = Measures({"one": Brightness("one")}, "one")
    twins = (PAIRS[0], PAIRS[1], replace(PAIRS[2], sha256="v"))
    both = ReferenceImages(twins, flat(0.9, 0.1, 0.9), measures)
    images = {name: flat(0.9) for name in "vab"}
    assert len(null_similarities(both, "one", images)) == 5, "v against its twin b is left out"


def test_a_failed_attack_has_no_similarity():
    found = references(Brightness("one")).measure(PAIRS[0], flat(0.9, 0.7), failed=True)
    assert np.isnan(found.similarity["one"]).all()
    ok = references(Brightness("one")).measure(PAIRS[0], flat(0.9, 0.7))
    assert ok.similarity["one"].tolist() == pytest.approx([1.0, 0.8])
    assert ok.diversity == pytest.approx(0.8)
    assert ok.lpips is None


def outcome(which, values, names):
    return Outcome(
        pair=which,
        condition=Condition("prompt"),
        restart=0,
        status="ok",
        seeds=(0, 1),
        similarity={name: np.array(values) for name in names},
        diversity=math.nan,
    )


def test_a_blind_decider_gives_way_to_one_that_sees_and_says_so(caplog):
    blind = Brightness("one", gain=0.0)
    sees = Brightness("two", gain=1.0)
    images = {"v": flat(0.9, 0.9), "a": flat(0.9, 0.9), "b": flat(0.9, 0.9)}
    names = ("one", "two")
    prompted = [outcome(p, [0.5, 0.5], names) for p in PAIRS]
    arguments = {"images": images, "reconstructions": flat(0.9, 0.1, 0.5)}
    calibration = calibrate_measures(references(blind, sees), prompted, **arguments)
    assert calibration.descriptor == "two"
    assert "one cannot tell copies" in caplog.text
    assert calibration.threshold == pytest.approx((0.6 + 1.0) / 2)
    chosen = calibrate_measures(references(blind, sees, decider="two"), prompted, **arguments)
    assert chosen.descriptor == "two"
    with pytest.raises(InputError, match="cannot decide"):
        calibrate_measures(references(blind), prompted, **arguments)


def test_an_unknown_decider_is_refused():
    with pytest.raises(InputError, match=r"metrics\.decider must be one of .*one"):
        Measures({"one": Brightness("one")}, "two")
