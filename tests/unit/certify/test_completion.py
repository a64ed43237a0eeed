"""An image that is completed: noised, or with half of it given."""

from dataclasses import replace

import pytest
import torch

from dori_lightning.certify.completion import Completion, halves, timesteps
from dori_lightning.types import InputError
from support.attempts import attacked, make_subject, plan_of, try_on
from support.families import load_family

QUICK = Completion(shares=(0.75, 0.5), steps=4, images=4)
LEVELS = [
    "noised to 3 of 4 steps, without a prompt",
    "noised to 3 of 4 steps, with the prompt",
    "noised to 2 of 4 steps, without a prompt",
    "noised to 2 of 4 steps, with the prompt",
    "half of it, without a prompt",
    "half of it, with the prompt",
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory, model):
    return make_subject(tmp_path_factory.mktemp("completion"), model)


@pytest.fixture
def passes(subject, monkeypatch):
    """What the denoiser is given: latents, timesteps, embeddings, guidance, ids of each step."""
    seen, predict = [], type(subject.model).predict_clean_and_noise

    def kept(model, noised, times, embeddings, *, guidance, pair_ids):
        seen.append((noised.clone(), times.clone(), embeddings.clone(), guidance, pair_ids))
        return predict(model, noised, times, embeddings, guidance=guidance, pair_ids=pair_ids)

    monkeypatch.setattr(type(subject.model), "predict_clean_and_noise", kept)
    return seen


def test_levels_in_order_and_rows_that_were_taken(subject):
    kept, spent = try_on(QUICK, subject)
    assert kept.levels == LEVELS
    assert kept.each == spent == QUICK.rows(plan_of()) == 4 * (3 + 2 + 4) * 3
    plain = replace(QUICK, guidance=1.0, masked=False)
    kept, spent = try_on(plain, subject)
    assert kept.levels == LEVELS[:4]
    assert kept.each == spent == plain.rows(plan_of()) == 4 * (3 + 2) * 2


def test_it_begins_at_the_noised_image_with_and_without_its_prompt(subject, passes):
    pair, model = subject.context.pairs[0], subject.model
    attacked(replace(QUICK, shares=(0.5,), masked=False), subject, [pair])
    times = timesteps(model, 4)
    assert times.tolist() == [999, 749, 499, 249]
    latent = subject.latents([pair])
    noise = subject.noise_of([pair], 4, "completion")[pair.id]
    assert [seen[1][0].item() for seen in passes] == [499, 249] * 2
    for first, guidance, where in (
        (passes[0], 1.0, model.empty_embedding()[0]),
        (passes[2], 2.0, subject.prompts([pair])[pair.id]),
    ):
        noised, _, embeddings, scale, ids = first
        assert scale == guidance
        assert set(ids) == {pair.id}
        assert all(torch.equal(own, where) for own in embeddings)
        expected = model.noised(latent.expand(4, -1, -1, -1), noise, torch.full((4,), 499))
        assert torch.equal(noised[:4], expected)


def test_half_of_the_image_is_given_at_each_step_and_stays(subject, passes, monkeypatch):
    pair, model, ends = subject.context.pairs[0], subject.model, []
    decode = type(model).decode_latents
    monkeypatch.setattr(
        type(model),
        "decode_latents",
        lambda self, latents: (ends.append(latents.clone()), decode(self, latents))[1],
    )
    attacked(replace(QUICK, shares=()), subject, [pair])
    latent = subject.latents([pair]).expand(4, -1, -1, -1)
    noise = subject.noise_of([pair], 4, "completion")[pair.id]
    given = halves(latent, range(4)).expand_as(latent)
    assert torch.equal(passes[0][0][:4], noise), "nothing of the image is in the first step"
    for noised, times, *_ in passes[1:4]:
        known = model.noised(latent, noise, times[:4])
        assert torch.equal(noised[:4][given], known[given])
        assert not torch.equal(noised[:4][~given], known[~given])
    for end in ends:
        assert torch.equal(end[:4][given], latent[given])
        assert not torch.equal(end[:4][~given], latent[~given])


def test_halves_take_turns():
    left, right, upper, lower, again = halves(torch.zeros(5, 3, 4, 6), range(5))
    assert left.shape == (1, 4, 6)
    assert torch.equal(left, ~right)
    assert torch.equal(upper, ~lower)
    assert torch.equal(again, left)
    assert bool(left[0, :, :3].all())
    assert bool(upper[0, :2].all())
    assert int(left.sum()) == int(upper.sum()) == 12


def test_images_are_the_same_in_any_company_and_only_who_is_left_is_completed(subject):
    pairs, few = subject.context.pairs[:3], replace(QUICK, shares=(0.5,), images=1)
    gone, own = pairs[1].id, pairs[2].id
    every = attacked(few, subject, pairs, back=lambda level, pair: pair == gone)
    alone = attacked(few, subject, pairs[2:], closed=[every.levels[0]])
    assert gone in every.images[every.levels[0]]
    assert alone.levels == every.levels[1:]
    for level in alone.levels:
        assert set(every.images[level]) == {pairs[0].id, own}
        assert torch.equal(every.images[level][own], alone.images[level][own])


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_flow_matching(tmp_path, family):
    """From a share on it is the same interpolation, by the family's own noise levels."""
    model = load_family(family)
    subject = make_subject(tmp_path, model)
    few = replace(QUICK, images=1)
    kept = attacked(few, subject, subject.context.pairs[:1])
    assert kept.levels == LEVELS
    assert kept.total == few.rows(plan_of(family=family))
    shares = model.scales(timesteps(model, 4))[1].tolist()
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"shares": [0.5, 0.75]}, "must fall"),
        ({"shares": [1.0]}, "between 0 and 1"),
        ({"steps": 4, "shares": [0.9, 0.8]}, "two levels are the same"),
        ({"steps": 1}, "at least 2 steps"),
        ({"images": 0}, "1 image"),
    ],
)
def test_bad_settings_are_refused(settings, rule):
    with pytest.raises(InputError, match=rule):
        Completion(**settings)
