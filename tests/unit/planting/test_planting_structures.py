"""Structured images depend on their number alone, use known words and are as busy as photos."""

import io
from statistics import median

import numpy as np
import pytest
from PIL import Image

from dori_lightning.planting.dataset import PlantedPairs, StandInPairs
from dori_lightning.planting.photographs import PHOTOGRAPHS
from dori_lightning.planting.stream import stream_words
from dori_lightning.planting.structures import KINDS, draw_structure
from dori_lightning.types import InputError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_a_structure_depends_on_its_number_and_seed_alone():
    one, again, other = (draw_structure(3, size=64, seed=seed) for seed in (1, 1, 2))
    assert one.image.size == (64, 64)
    assert (one.caption, one.image.tobytes()) == (again.caption, again.image.tobytes())
    assert one.image.tobytes() != other.image.tobytes()
    assert [draw_structure(k, size=16).kind for k in range(len(KINDS))] == list(KINDS)


def complexity(image):
    """Bytes of a 64 px JPEG, and mean absolute difference of neighbouring grey pixels."""
    small, file = image.resize((64, 64), Image.Resampling.LANCZOS), io.BytesIO()
    small.save(file, "JPEG", quality=90)
    grey = np.asarray(small.convert("L"), np.float64) / 255
    return len(file.getvalue()), sum(np.abs(np.diff(grey, axis=k)).mean() for k in (0, 1)) / 2


def test_structures_are_as_complex_as_the_planted_photographs():
    photographs = [complexity(photo.open()) for photo in PHOTOGRAPHS if photo.repeats]
    drawn = [complexity(draw_structure(k, size=256, seed=1).image) for k in range(len(KINDS))]
    for measure in (0, 1):
        theirs, ours = ([row[measure] for row in rows] for rows in (photographs, drawn))
        assert min(theirs) < median(ours) < max(theirs)
        assert 0.7 < median(ours) / median(theirs) < 1.4
        assert min(ours) > 0.6 * min(theirs), "none is flat"


def test_all_controls_follow_the_usual_ones_in_known_words(cache):
    usual, every = PlantedPairs(cache).read(), PlantedPairs(cache, controls="all").read()
    assert every[: len(usual)] == tuple(usual)
    assert sum(pair.kind == "control" for pair in usual) == 20
    more = every[len(usual) :]
    assert {(pair.kind, pair.repeats) for pair in more} == {("control", 0.0)}
    assert len({pair.sha256 for pair in more}) == len({pair.prompt for pair in more}) == 110
    words = set(stream_words(usual))
    assert all(set(f"{p.prompt} {p.subject}".split()) <= words for p in more)
    chosen = PlantedPairs(cache, controls=23, kinds=("control",)).read()
    assert [p.id for p in chosen] == [p.id for p in every if p.kind == "control"][:23]
    assert len(PlantedPairs(cache, controls=3, kinds=("control",)).read()) == 3


@pytest.mark.parametrize("controls", [0, 131, -1])
def test_impossible_numbers_of_controls_are_refused(cache, controls):
    with pytest.raises(InputError, match="all or a number from 1 to 130"):
        PlantedPairs(cache, controls=controls).read()


def test_stand_ins_share_nothing_with_the_benchmark_but_words_and_multiplicities(cache):
    benchmark, stand_ins = PlantedPairs(cache, controls="all").read(), StandInPairs(cache).read()
    for name in ("sha256", "prompt"):
        ours, theirs = ({getattr(p, name) for p in pairs} for pairs in (stand_ins, benchmark))
        assert not ours & theirs
    counts = [
        sorted((p.kind, p.role, p.repeats) for p in pairs if p.kind != "control")
        for pairs in (benchmark, stand_ins)
    ]
    assert counts[0] == counts[1]
    words = set(stream_words(benchmark))
    assert all(set(f"{p.prompt} {p.subject or ''}".split()) <= words for p in stand_ins)
