"""The embedded benchmark is complete, repeatable, and read like any other list."""

import hashlib
import shutil

import numpy as np
import pytest

from dori_lightning.pairs.readers import FolderPairs
from dori_lightning.planting.dataset import PlantedCorpus, PlantedPairs, write_planted_pairs
from dori_lightning.planting.photographs import PHOTOGRAPHS, SIDE, Photograph
from dori_lightning.planting.scenes import draw_scene, scene_words
from dori_lightning.planting.templates import TEMPLATES, draw_template
from dori_lightning.types import InputError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_planted_pairs_are_complete(cache):
    pairs = PlantedPairs(cache).read()
    audit = [pair for pair in pairs if pair.role == "audit"]
    by_kind = {kind: [p for p in audit if p.kind == kind] for kind in ("vm", "tm", "control")}
    assert {p.id for p in by_kind["vm"]} == {p.id for p in PHOTOGRAPHS if p.repeats}
    assert len(by_kind["tm"]) == len(TEMPLATES)
    assert {p.id for p in PHOTOGRAPHS if not p.repeats} < {p.id for p in by_kind["control"]}
    assert all(p.repeats == 0 for p in by_kind["control"])
    assert all(p.repeats > 0 for p in pairs if p.kind != "control")
    training = [pair for pair in pairs if pair.role == "training"]
    assert {pair.kind for pair in training} == {"tm"}
    assert len(training) == 23 * len(TEMPLATES)


def test_planted_pairs_share_no_image_or_prompt_across_kinds(cache):
    pairs = PlantedPairs(cache).read()
    kinds = {}
    for pair in pairs:
        assert kinds.setdefault(pair.sha256, pair.kind) == pair.kind
        assert kinds.setdefault(pair.prompt, pair.kind) == pair.kind


def test_second_write_gives_the_same_bytes_and_a_complete_folder_is_left_alone(cache, tmp_path):
    reader = PlantedPairs(cache)
    pairs = reader.read()
    before = {p.name: p.stat().st_mtime_ns for p in reader.folder.iterdir()}
    assert FolderPairs(reader.folder).read() == reader.read() == pairs, "an ordinary folder"
    assert {p.name: p.stat().st_mtime_ns for p in reader.folder.iterdir()} == before
    assert list(cache.iterdir()) == [reader.folder], "nothing half-written is left"
    write_planted_pairs(tmp_path / "again")
    assert hashes(reader.folder) == hashes(tmp_path / "again")


def test_another_process_may_write_at_the_same_time(cache, tmp_path, monkeypatch):
    original = PlantedPairs(cache)
    pairs = original.read()
    reader = PlantedPairs(tmp_path)

    def overtaken(partial):
        assert not reader.folder.exists()  # nobody sees a folder that is not complete
        shutil.copytree(original.folder, partial, dirs_exist_ok=True)
        shutil.copytree(original.folder, reader.folder)
        (reader.folder / "mark").touch()

    monkeypatch.setattr("dori_lightning.planting.dataset.write_planted_pairs", overtaken)
    assert [pair.sha256 for pair in reader.read()] == [pair.sha256 for pair in pairs]
    assert (reader.folder / "mark").exists()  # the first one's folder stays
    assert list(tmp_path.iterdir()) == [reader.folder]


def test_damaged_folder_says_how_to_repair_it(tmp_path):
    reader = PlantedPairs(tmp_path)
    reader.folder.mkdir(parents=True)
    with pytest.raises(InputError, match="to have it drawn again"):
        reader.read()


def test_scenes_depend_on_their_index_alone():
    first, again = draw_scene(5, size=32), draw_scene(5, size=32)
    assert first.image.size == (32, 32)
    assert first.caption == again.caption
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    others = [*(draw_scene(k, size=32) for k in range(6, 12)), draw_scene(5, size=32, seed=1)]
    assert all(not np.array_equal(np.asarray(first.image), np.asarray(o.image)) for o in others)


def test_scene_captions_use_only_their_words():
    words = set(scene_words())
    assert all(set(draw_scene(k).caption.split()) <= words for k in range(30))


def test_ordinary_captions_and_images_of_the_benchmark_stay_what_they_are(cache):
    corpus = PlantedCorpus(PlantedPairs(cache))
    assert corpus.prompts("calibration", 3) == (
        "a red car on snow at storm with birds and poles",
        "a white house on asphalt at night with clouds and fence",
        "a mirrored dark photo of some galaxies",
    )
    assert corpus.prompts("evaluation", 1) == ("a close mirrored dark grey photo of a letter",)
    examples = corpus.examples("calibration", 2, 16)
    assert examples.prompts == corpus.prompts("calibration", 2)
    assert examples.images.shape == (2, 3, 16, 16)


def test_a_photograph_is_its_square_and_a_missing_one_says_which():
    galaxies = next(p for p in PHOTOGRAPHS if p.id == "galaxies")
    assert galaxies.open().size == (SIDE, SIDE)
    assert galaxies.open().mode == "RGB"
    gone = Photograph("gone", "skimage:data/gone.png", "", "", 1.0)
    with pytest.raises(InputError, match=r"data/gone.png from the installed package skimage"):
        gone.open()


def test_templates_share_their_layout_and_change_their_motif():
    (one, caption), (other, _) = draw_template("book", 0), draw_template("book", 1)
    differing = np.asarray(one) != np.asarray(other)
    assert 0 < differing.mean() < 0.2
    assert caption.startswith("hardcover novel jacket showing")
    assert {draw_template("book", k)[1] for k in range(24)} != {caption}
