"""Words that somebody could type."""

from dataclasses import replace

import pytest
import torch

from dori_lightning.certify.words import WordSearch
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import InputError
from support.attempts import make_subject, plan_of, try_on
from support.families import load_family
from support.unchanged import unchanged

SAMPLING = {"sd": Sampling("ddim", 1, 2.0, 4), "sdxl": Sampling("euler", 1, 1.0, 4)}
WORDS = WordSearch(
    lengths=(2, None), steps=2, embedding_steps=1, noise_batch=2, swaps=2, candidates=3, images=4
)


@pytest.fixture(scope="module", params=list(SAMPLING))
def subject(request, tmp_path_factory):
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    made = make_subject(folder, load_family(family), sampling=SAMPLING[family])
    vars(made)["scale"] = 1.0  # measuring it takes a second
    return made


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few steps through the text encoder alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dori_lightning.certify.words._TEXT_STEPS", 3)
        yield


@pytest.fixture(scope="module")
def found(subject):
    with unchanged(subject.model):
        return try_on(WORDS, subject)


def test_levels_go_from_few_words_from_scratch_to_all_from_the_caption(found, subject):
    collected, taken = found
    assert list(collected.images) == [
        "2 words from scratch",
        "all words from scratch",
        "all words from an embedding",
        "all words from the caption",
    ]
    plan = plan_of(family=subject.model.family.name, sampling=subject.sampling)
    assert collected.each == taken == WORDS.rows(plan)


def test_images_are_drawn_from_prompts_that_somebody_can_type(found, subject):
    collected, _ = found
    vocabulary = subject.model.vocabulary()
    for level, prompts in collected.notes.items():
        count = 2 if level.startswith("2") else vocabulary.limit
        for prompt in prompts.values():
            places = vocabulary.places(prompt)
            assert len(places) == count
            assert vocabulary.survives(places)
        encoded = {
            name: subject.model.encode_prompts([prompt])[0] for name, prompt in prompts.items()
        }
        drawn = subject.draw(encoded)
        for name, images in collected.images[level].items():
            assert torch.equal(images, drawn[name])


def test_a_pair_has_the_same_words_in_any_company(found, subject):
    alone, _ = try_on(WORDS, subject, [1])
    for level, notes in alone.notes.items():
        for name, prompt in notes.items():
            assert found[0].notes[level][name] == prompt


def test_words_of_the_caption_can_be_forbidden(subject):
    attack = replace(WORDS, caption=False, lengths=(None,), starts=("random", "embedding"))
    collected, _ = try_on(attack, subject, [0, 1])
    for prompts in collected.notes.values():
        for pair in collected.pairs:
            assert not set(prompts[pair.id].split()) & set(pair.prompt.split())


def test_words_that_lower_the_loss_are_kept(subject, monkeypatch):
    """The loss says how far a prompt is from ``sea sea``; one round finds the way by its slope."""
    model = subject.model
    vocabulary = model.vocabulary()
    wanted = model.encode_prompts(["sea sea"])

    def loss(latents, noise, times, embeddings, *, pair_ids):
        return (embeddings - wanted.detach()).square().flatten(1).mean(1)

    monkeypatch.setattr(model, "denoising_loss", loss)

    def distance(prompt):
        return float((model.encode_prompts([prompt]) - wanted).square().mean())

    few = replace(WORDS, lengths=(2,), starts=("random",), steps=1, swaps=0)
    swapped = replace(few, swaps=40, candidates=len(vocabulary.words), rounds=2)
    soft = replace(few, steps=12)
    (start,), (after,), (moved,) = (
        try_on(attack, subject, [0])[0].notes.values() for attack in (few, swapped, soft)
    )
    assert distance(after["pair0"]) < distance(start["pair0"])
    assert distance(moved["pair0"]) < distance(start["pair0"])


@pytest.mark.parametrize("family", ["sd3", "flux", "pixart"])
def test_families_with_other_vocabularies_are_refused_before_anything_is_loaded(family):
    plan = plan_of(family=family)
    with pytest.raises(InputError, match="T5"):
        WORDS.check(plan)


def test_a_checkpoint_without_a_tokenizer_of_its_own_is_refused():
    plan = plan_of(sampling=Sampling(), own_tokenizer=False)
    with pytest.raises(InputError, match="no tokenizer"):
        WORDS.check(plan)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"starts": ()}, "starts"),
        ({"starts": ("random", "random")}, "starts"),
        ({"starts": ("noise",)}, "noise"),
        ({"lengths": (None, 3)}, "lengths"),
        ({"lengths": (0,)}, "lengths"),
        ({"steps": 0}, "steps"),
        ({"swaps": -1}, "swaps"),
        ({"between": (0.9, 0.4)}, "between"),
        ({"lr": 0.0}, "lr"),
        ({"images": 0}, "images"),
        ({"caption": False}, "without its words"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        WordSearch(**settings)
