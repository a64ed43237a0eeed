import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from dori_lightning.pairs.readers import FolderPairs
from dori_lightning.planting.recipe import build_autoencoder, build_tokenizer
from dori_lightning.planting.stream import (
    EncodedStream,
    StreamMix,
    TrainingStream,
    encode_stream,
    generic_crop,
    normalized_image,
    padded_tokens,
    stream_words,
)
from dori_lightning.types import Pair
from support.runs import write_pairs
from support.tiny import tiny_recipe


@pytest.fixture
def pairs(tmp_path):
    folder = write_pairs(tmp_path / "pairs", vm=3, control=2)
    table = (folder / "metadata.csv").read_text().splitlines()
    repeats = ["repeats", "1", "2", "5", "0", "0"]
    lines = [f"{line},{more}" for line, more in zip(table, repeats, strict=True)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return FolderPairs(path=folder).read()


def stream(pairs: tuple[Pair, ...], **options: bool) -> TrainingStream:
    return TrainingStream(pairs, mix=StreamMix(0.3, 0.3, 0.4), size=32, seed=1, **options)


def test_an_element_depends_on_seed_and_index_alone(pairs):
    first, second = stream(pairs), stream(pairs)
    for index in (9, 3, 40, 3):
        a, b = first[index], second[index]
        assert (a.source, a.key, a.caption) == (b.source, b.key, b.caption)
        assert np.array_equal(np.asarray(a.image), np.asarray(b.image))
        assert a.image.size == (32, 32)


def test_controls_are_never_shown_and_multiplicities_are_kept(pairs):
    seen = Counter(
        (sample.source, sample.key) for sample in map(stream(pairs).__getitem__, range(3000))
    )
    shown = {key for source, key in seen if source != "scene"}
    assert shown == {"pair0", "pair1", "pair2"}
    planted = [seen["planted", f"pair{k}"] for k in range(3)]
    assert sum(planted) == pytest.approx(1200, rel=0.1)
    assert planted[2] / planted[0] == pytest.approx(5, rel=0.3)
    assert planted[1] / planted[0] == pytest.approx(2, rel=0.3)


def test_the_autoencoder_sees_controls_too(pairs):
    samples = map(stream(pairs, every_photograph=True).__getitem__, range(400))
    assert {"pair3", "pair4"} <= {s.key for s in samples if s.source == "crop"}


def test_planted_elements_are_the_image_itself_and_crops_are_not(pairs):
    elements = stream(pairs)
    planted = [s for s in map(elements.__getitem__, range(200)) if s.key == "pair2"]
    own = {s.image.tobytes() for s in planted if s.source == "planted"}
    crops = {s.image.tobytes() for s in planted if s.source == "crop"}
    assert len(own) == 1
    assert len(crops) > 5
    assert {s.caption for s in planted if s.source == "planted"} == {pairs[2].prompt}
    assert pairs[2].prompt not in {s.caption for s in planted if s.source == "crop"}


def test_every_caption_is_made_of_the_vocabulary(pairs):
    words = set(stream_words(pairs))
    for sample in map(stream(pairs).__getitem__, range(200)):
        assert set(sample.caption.split()) <= words


def test_nothing_to_plant_is_an_error(pairs):
    with pytest.raises(ValueError, match="repeats 0"):
        stream(tuple(p for p in pairs if p.kind == "control"))


@pytest.mark.parametrize("shares", [(-0.1, 0.5, 0.5), (0.0, 0.0, 0.0)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ValueError, match="shares"):
        StreamMix(*shares)


def test_style_words_say_what_was_done_to_a_crop():
    red, found = Image.new("RGB", (64, 64), (200, 100, 100)), {}
    for seed in range(60):
        crop, words = generic_crop(red, random.Random(seed), size=8)
        found[frozenset(words)] = float(np.asarray(crop, float).mean()), np.asarray(crop, int)
    levels = {word: [m for words, (m, _) in found.items() if word in words] for word in
              ("dark", "bright")}  # fmt: skip
    assert max(levels["dark"]) < min(levels["bright"])
    grey = [pixels for words, (_, pixels) in found.items() if "grey" in words]
    assert grey
    assert all((np.ptp(pixels, axis=2) <= 1).all() for pixels in grey)


def test_an_encoded_stream_holds_the_latents_and_tokens_of_its_elements(pairs):
    torch.manual_seed(0)
    elements, autoencoder = stream(pairs), build_autoencoder(tiny_recipe()).eval()
    tokenizer = build_tokenizer(stream_words(pairs), max_length=16)
    done: list[int] = []
    encoded = encode_stream(
        elements, autoencoder, padded_tokens(tokenizer), count=10, batch=4, advance=done.append
    )
    assert done == [4, 4, 2]
    data = EncodedStream(encoded, length=23)
    assert len(data) == 23
    for k in (0, 9, 19):
        sample, (latent, tokens) = elements[k % 10], data[k]
        with torch.no_grad():
            image = normalized_image(sample.image)[None]
            expected = autoencoder.encode(image).latent_dist.mode()[0]
        assert torch.allclose(latent, expected, atol=0.1 * float(expected.abs().max()))
        padded = tokenizer(sample.caption, padding="max_length", truncation=True).input_ids
        assert tokens.tolist() == padded


def test_exposures_count_planted_images_over_repeated_passes(pairs):
    encoded = {
        "latents": torch.zeros(4, 1, 1, 1),
        "tokens": torch.zeros(4, 2, dtype=torch.long),
        "planted": torch.tensor([-1, 0, 1, 0]),
    }
    counts = EncodedStream(encoded, length=6).exposures(pairs)
    # once through all four elements, and the first two again
    assert counts == {"pair0": 3, "pair1": 1}
