"""Searches for embeddings over ranges of timesteps and through sampling."""

from dataclasses import replace

import pytest
import torch

from dori_lightning.attacks.budget import AttackSettings, BudgetSettings
from dori_lightning.certify.base import deterministic, timesteps
from dori_lightning.certify.embeddings import EmbeddingSearch
from dori_lightning.certify.strong_embeddings import Search, StrongSearch, search_through
from dori_lightning.mitigations.edits import Origin, PairMaskEdit
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import InputError
from support.attempts import make_subject, plan_of, try_on
from support.families import load_family
from support.unchanged import unchanged

SAMPLING = {
    "sd": Sampling("ddim", 2, 2.0, 4),
    "sd3": Sampling("flow_euler", 2, 2.0, 4),
}
RANGES = Search(init="random", steps=2, embeddings=2, noise_batch=2)
THROUGH = Search(init="prompt", steps=1, embeddings=2, noise_batch=2, through=2)
SEARCHES = {
    "noisy": Search(
        init="random", steps=1, embeddings=1, noise_batch=2, between=(0.3, 1), lr=0.3, scale=2
    ),
    "ranges": RANGES,
    "through": THROUGH,
}
STRONG = StrongSearch(searches=SEARCHES, images=4, drawing_steps=2)


@pytest.fixture(scope="module", params=list(SAMPLING))
def subject(request, tmp_path_factory):
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    made = make_subject(folder, load_family(family), sampling=SAMPLING[family])
    vars(made)["scale"] = 1.0  # measuring it takes a second
    return made


@pytest.fixture(scope="module")
def found(subject):
    with unchanged(subject.model):
        return try_on(STRONG, subject)


def test_every_search_is_a_level_and_its_rows_are_those_that_are_counted(found, subject):
    kept, taken = found
    assert kept.levels == [
        "1 step from random, noise 0.3 to 1, rate 0.3, 2 noise samples, starts times 2",
        "2 steps from random, 2 embeddings over time, rate 0.1, 2 noise samples",
        "1 step from prompt, 2 embeddings over time, through 2 sampling steps, rate 0.1, "
        "2 noise samples",
    ]
    # two rows a step, times two where the loss goes through two steps; 4 images of 2 guided steps
    assert kept.each == taken == (2 + 16) + (4 + 16) + (4 + 16)
    plan = plan_of(family=subject.model.family.name, sampling=subject.sampling)
    STRONG.check(plan)
    assert STRONG.rows(plan) == taken
    for images in kept.images.values():
        assert {image.shape[0] for image in images.values()} == {4}


def test_a_pair_has_the_same_images_in_any_company(found, subject):
    together, _ = found
    alone, _ = try_on(STRONG, subject, [1])
    for level, images in alone.images.items():
        for name, own in images.items():
            assert torch.equal(own, together.images[level][name])


def test_ranges_share_the_schedule():
    search = Search(embeddings=3, noise_batch=3, between=(0.1, 1.0))
    assert search.ranges(1000) == [(100, 400), (400, 700), (700, 1000)]
    times = torch.tensor([999, 700, 699, 400, 399, 0])
    assert search.of(times, 1000) == [2, 2, 1, 1, 0, 0]


def test_each_embedding_is_searched_and_drawn_in_its_range(subject, monkeypatch):
    model, seen = subject.model, {"loss": [], "drawn": []}
    loss, predict = model.denoising_loss, model.predict_clean_and_noise

    def denoising_loss(latents, noise, times, embeddings, **more):
        seen["loss"] += zip(times.tolist(), embeddings.detach(), strict=True)
        return loss(latents, noise, times, embeddings, **more)

    def predict_clean_and_noise(x, times, embeddings, **more):
        seen["drawn"] += zip(times.tolist(), embeddings, strict=True)
        return predict(x, times, embeddings, **more)

    monkeypatch.setattr(model, "denoising_loss", denoising_loss)
    monkeypatch.setattr(model, "predict_clean_and_noise", predict_clean_and_noise)
    search = replace(RANGES, init="prompt", steps=1, noise_batch=4)
    attack = StrongSearch(searches={"one": search}, images=4, drawing_steps=4, guidance=1.0)
    try_on(attack, subject)
    searched = [time for time, _ in seen["loss"]]
    assert len(searched) == 16
    assert sum(time < 500 for time in searched) == 8
    drawn = dict(seen["drawn"][::16])
    assert torch.equal(drawn[999], drawn[749])
    assert torch.equal(drawn[499], drawn[249])
    assert not torch.equal(drawn[749], drawn[499])


def test_a_search_through_sampling_comes_nearer_to_the_image(subject):
    search = Search(embeddings=2, noise_batch=2, through=2, steps=8, lr=0.3)
    pairs = list(subject.context.pairs[:2])
    found = search_through(subject, search, pairs, 1)
    prompts = subject.prompts(pairs)
    model = subject.model
    noise = torch.randn(8, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    times = timesteps(model, 2)

    def distance(pair, embeddings):
        rows = embeddings[search.of(times, model.num_train_timesteps)][:, None]
        with torch.no_grad():
            clean = deterministic(model, noise, times, rows.expand(-1, 8, -1, -1), guidance=1.0)
        return float((clean - subject.latents([pair])).square().mean())

    for pair in pairs:
        start = prompts[pair.id].expand(2, -1, -1)
        assert not torch.equal(found[pair.id], start)
        assert distance(pair, found[pair.id]) < distance(pair, start)


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"init": "caption"}, "init must be among"),
        ({"steps": 0}, ">= 1"),
        ({"lr": 0.0}, "lr and scale"),
        ({"scale": 0.0}, "lr and scale"),
        ({"between": (0.5, 0.5)}, "between must rise"),
        ({"embeddings": 3, "noise_batch": 8}, "multiple"),
        ({"through": 2, "embeddings": 4}, "no more than"),
        ({"through": 4, "between": (0.2, 1.0)}, "no between"),
    ],
)
def test_searches_that_make_no_sense_are_refused(search, words):
    with pytest.raises(InputError, match=words) as refused:
        StrongSearch(searches={"mine": Search(**search)})
    assert "searches.mine" in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"searches": {}},
        {"searches": {"one": None}},
        {"searches": {"one": RANGES, "two": RANGES}},
        {"searches": {"one": RANGES}, "images": 0},
    ],
)
def test_attacks_that_make_no_sense_are_refused(settings):
    with pytest.raises(InputError, match="dori_strong"):
        StrongSearch(**settings)


def test_searches_begin_under_an_edit_that_differs_by_pair(tmp_path):
    """Such an edit can be on the model once only."""
    model = load_family("sd")
    name, layer = next(iter(model.layers("text.value").items()))
    mask = torch.zeros(layer.weight.shape[0], dtype=torch.bool)
    mask[:2] = True
    origin = Origin(model.fingerprint, "test", "test")
    edit = PairMaskEdit(origin, {"pair0": {f"{name}.weight": mask}})
    subject = make_subject(tmp_path, model, edit, sampling=SAMPLING["sd"])
    own = AttackSettings(inits=("random",), budget=BudgetSettings(steps=1), noise_batch=1)
    strong = StrongSearch(searches={"one": THROUGH}, images=1, drawing_steps=1)
    with unchanged(model):
        for attack in (EmbeddingSearch(settings=own), strong):
            found, _ = try_on(attack, subject, [0])
            assert list(found.images) == found.levels
