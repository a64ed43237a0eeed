import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dori_lightning.metrics.calibration import (
    Measures,
    ReferenceImages,
    calibrate_measures,
)
from dori_lightning.metrics.descriptors import Descriptor
from dori_lightning.types import Condition, InputError, Outcome, Pair, Reference


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
    names = ("one", "two")
    prompted = [outcome(p, [0.5, 0.5], names) for p in PAIRS]
    arguments = {"ordinary": [flat(0.3, 0.3)], "reconstructions": flat(0.9, 0.1, 0.5)}
    calibration = calibrate_measures(references(blind, sees), prompted, **arguments)
    assert calibration.descriptor == "two"
    assert "one cannot tell copies" in caplog.text
    assert [calibration.threshold_of(name) for name in "vab"] == pytest.approx([0.7, 0.9, 0.9])
    chosen = calibrate_measures(references(blind, sees, decider="two"), prompted, **arguments)
    assert chosen.descriptor == "two"
    with pytest.raises(InputError, match="cannot decide"):
        calibrate_measures(references(blind), prompted, **arguments)


def test_an_unknown_decider_is_refused():
    with pytest.raises(InputError, match=r"metrics\.decider must be one of .*one"):
        Measures({"one": Brightness("one")}, "two")


class TestSeveralReferences:
    TWO = replace(PAIRS[0], others=(Reference(Path("w.png"), "w"),))

    def references(self, others=(0.2,), pairs=(TWO, *PAIRS[1:])):
        measures = Measures({"one": Brightness("one")}, "one")
        images = flat(0.9, 0.1, 0.5)
        return ReferenceImages(
            pairs, images, measures, others=[flat(level)[0] for level in others]
        )

    def test_the_closest_counts_and_is_named(self):
        found = self.references().measure(self.TWO, flat(0.9, 0.2, 0.3))
        assert found.similarity["one"].tolist() == pytest.approx([1.0, 1.0, 0.9])
        assert [own.sha256 for own in found.closest["one"]] == ["v", "w", "w"]
        failed = self.references().measure(self.TWO, flat(0.9), failed=True)
        assert failed.closest == {}

    def test_one_reference_is_measured_as_before(self):
        with_others, alone = self.references(), references(Brightness("one"))
        images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1))
        for own in PAIRS[1:]:
            a, b = with_others.measure(own, images), alone.measure(own, images)
            assert a.similarity["one"].tolist() == b.similarity["one"].tolist()
            assert a.closest == b.closest == {}

    def test_similarity_with_many_pairs_is_the_largest_of_each(self):
        both = self.references()
        rows = both.similarities(flat(0.2, 0.9), both.pairs)
        assert rows.tolist() == [
            pytest.approx([1.0, 0.9, 0.7]), pytest.approx([1.0, 0.2, 0.6]),
        ]  # fmt: skip

    def test_ordinary_images_reach_the_largest_of_its_references(self):
        calibration = calibrate_measures(
            self.references(), [], ordinary=[flat(0.3)], reconstructions=flat(0.9, 0.1, 0.5)
        )
        assert calibration.scales["v"].null == pytest.approx(0.9)  # 0.2 is closer than 0.9
        assert calibration.not_auditable == ("v",)

    def test_distance_is_to_the_closest(self):
        def distance(images, originals):
            return (images - originals).abs().mean((1, 2, 3))

        both = self.references()
        lpips = SimpleNamespace(distance=distance)
        both.measures = replace(both.measures, lpips=lpips)
        found = both.measure(self.TWO, flat(0.9, 0.2))
        assert found.lpips.tolist() == pytest.approx([0, 0], abs=0.005)

    def test_others_must_be_those_of_the_pairs(self):
        with pytest.raises(ValueError):
            self.references(others=())
        both = self.references()
        assert [float(o.mean()) for o in both.others_of(both.pairs)] == pytest.approx(
            [0.2], abs=0.01
        )
