from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dori_lightning.pairs.readers import FolderPairs
from dori_lightning.planting.stream import StreamMix, TrainingStream, stream_words
from dori_lightning.types import Pair
from support.runs import write_pairs


@pytest.fixture
def pairs(tmp_path: Path) -> tuple[Pair, ...]:
    folder = write_pairs(tmp_path / "pairs", vm=3, control=2)
    table = (folder / "metadata.csv").read_text().splitlines()
    repeats = ["repeats", "1", "2", "5", "0", "0"]
    lines = [f"{line},{more}" for line, more in zip(table, repeats, strict=True)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return FolderPairs(path=folder).read()


def stream(pairs: tuple[Pair, ...], **options: bool) -> TrainingStream:
    return TrainingStream(pairs, mix=StreamMix(0.3, 0.3, 0.4), size=32, seed=1, **options)


def test_an_element_depends_on_seed_and_index_alone(pairs: tuple[Pair, ...]) -> None:
    first, second = stream(pairs), stream(pairs)
    for index in (9, 3, 40, 3):
        a, b = first[index], second[index]
        assert (a.source, a.key, a.caption) == (b.source, b.key, b.caption)
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
        assert a.image.size == (32, 32)


def test_controls_are_never_shown_and_multiplicities_are_kept(pairs: tuple[Pair, ...]) -> None:
    seen = Counter(
        (sample.source, sample.key) for sample in map(stream(pairs).__getitem__, range(3000))
    )
    shown = {key for source, key in seen if source != "scene"}
    assert shown == {"pair0", "pair1", "pair2"}
    planted = [seen["planted", f"pair{k}"] for k in range(3)]
    assert sum(planted) == pytest.approx(1200, rel=0.1)
    assert planted[2] / planted[0] == pytest.approx(5, rel=0.3)
    assert planted[1] / planted[0] == pytest.approx(2, rel=0.3)


def test_the_autoencoder_sees_controls_too(pairs: tuple[Pair, ...]) -> None:
    samples = map(stream(pairs, every_photograph=True).__getitem__, range(400))
    assert {"pair3", "pair4"} <= {s.key for s in samples if s.source == "crop"}


def test_planted_elements_are_the_picture_itself_and_crops_are_not(
    pairs: tuple[Pair, ...],
) -> None:
    elements = stream(pairs)
    planted = [s for s in map(elements.__getitem__, range(200)) if s.key == "pair2"]
    own = {s.image.tobytes() for s in planted if s.source == "planted"}
    crops = {s.image.tobytes() for s in planted if s.source == "crop"}
    assert len(own) == 1
    assert len(crops) > 5
    assert {s.caption for s in planted if s.source == "planted"} == {pairs[2].prompt}
    assert pairs[2].prompt not in {s.caption for s in planted if s.source == "crop"}


def test_every_caption_is_made_of_the_vocabulary(pairs: tuple[Pair, ...]) -> None:
    words = set(stream_words(pairs))
    for sample in map(stream(pairs).__getitem__, range(200)):
        assert set(sample.caption.split()) <= words


def test_nothing_to_plant_is_an_error(pairs: tuple[Pair, ...]) -> None:
    with pytest.raises(ValueError, match="repeats 0"):
        stream(tuple(p for p in pairs if p.kind == "control"))
