from dataclasses import replace
from pathlib import Path

import pytest

from dori_lightning.pairs.corpus import STYLES, neighbour_prompts
from dori_lightning.planting.photographs import PHOTOGRAPHS
from dori_lightning.types import InputError, Pair

PAIR = Pair("cat", "vm", "Sleepy tabby portrait from rescue shelter", Path("none"))


def plain(prompt):
    return " ".join(prompt.lower().split())


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda photograph: photograph.id)
def test_neighbours_are_different_and_none_is_the_prompt(photograph):
    pair = Pair(photograph.id, "vm", photograph.caption, Path("none"), subject=photograph.subject)
    found = neighbour_prompts(pair, 24)
    assert len(found) == len({plain(prompt) for prompt in found}) == 24
    assert plain(pair.prompt) not in {plain(prompt) for prompt in found}
    known = {*pair.prompt.split(), *pair.subject.split(), "a", "photo", "of", *STYLES}
    assert {word for prompt in found for word in prompt.split()} <= known


def test_neighbours_depend_on_pair_and_seed_alone():
    found = neighbour_prompts(PAIR, 12, seed=3)
    assert found == neighbour_prompts(PAIR, 12, seed=3)
    assert found[:5] == neighbour_prompts(PAIR, 5, seed=3), "fewer are the first of more"
    assert set(found) != set(neighbour_prompts(PAIR, 12, seed=4))
    moved = replace(PAIR, image=Path("elsewhere"), kind="tm", repeats=3.0)
    assert found == neighbour_prompts(moved, 12, seed=3), "the picture is not used"


def test_splits_share_nothing_and_hold_everything():
    every = neighbour_prompts(PAIR, 8)
    evaluation = neighbour_prompts(PAIR, 3, split="evaluation")
    calibration = neighbour_prompts(PAIR, 10, split="calibration")
    assert not set(evaluation) & set(calibration)
    assert set(every) <= set(evaluation) | set(calibration)


def test_every_rule_has_its_turn():
    words = PAIR.prompt.split()
    first = neighbour_prompts(replace(PAIR, subject="grey cat"), 4)
    assert first[0].startswith("a ")
    assert first[0].endswith("photo of grey cat")
    assert len(first[1].split()) == len(words) - 1
    assert first[2] != PAIR.prompt
    assert sorted(first[2].split()) == sorted(words)
    assert first[3].startswith("a photo of ")
    assert len(first[3].split()) == 5


def test_a_prompt_of_one_word_has_neighbours_too():
    found = neighbour_prompts(replace(PAIR, prompt="Mothers"), 6)
    assert all(prompt.endswith("photo of Mothers") for prompt in found)


def test_small_words_alone_name_nothing():
    found = neighbour_prompts(replace(PAIR, prompt="The house of the sea"), 8)
    for prompt in found:
        assert {"house", "sea"} & set(prompt.split())
    assert "a photo of house sea" in found


def test_white_space_and_case_make_no_neighbour():
    pair = replace(PAIR, prompt="A  Photo of\tcat", subject="cat")
    assert "a photo of cat" not in neighbour_prompts(pair, 10)


def test_too_few_neighbours_are_an_error_that_says_how_many():
    with pytest.raises(InputError, match="has 9 neighbours by rule, but 10"):
        neighbour_prompts(replace(PAIR, prompt="Mothers"), 10)
