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
    null_similarities,
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

    def test_a_control_with_several_references_sets_the_null_by_the_largest(self):
        pairs = (PAIRS[0], replace(PAIRS[1], others=self.TWO.others), PAIRS[2])
        both = self.references(others=(0.6,), pairs=pairs)
        images = {"v": flat(0.6), "a": flat(0.9), "b": flat(0.9)}
        null = null_similarities(both, "one", images)
        assert null[:2] == pytest.approx([1.0, 0.9])
        shared = replace(PAIRS[0], others=(Reference(Path("x"), "b"),))
        both = self.references(pairs=(shared, *PAIRS[1:]))
        assert len(null_similarities(both, "one", images)) == 5

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
