"""Other ways from noise to image, from each image's own prompt."""

from dataclasses import replace

import pytest
import torch

from dori_lightning.certify.base import deterministic, renewed
from dori_lightning.certify.trajectory import Trajectory
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import InputError
from support.attempts import attacked, make_subject, plan_of
from support.families import load_family
from support.tiny import tiny_model

QUICK = Trajectory(guidance=(1.0, 3.0), fresh=(1.5,), intervals=(3.0,), scales=(1.2,), images=8)
FEW = replace(QUICK, guidance=(3.0,), samplers=False, intervals=(), images=1)
LEVELS = [
    "guidance 1",
    "guidance 3",
    "fresh noise times 1.5 at each step",
    "guidance 3 in the noisy half alone",
    "guidance 3 in the clean half alone",
    "starting noise times 1.2",
]


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    place = tmp_path_factory.mktemp("trajectory")
    return make_subject(place, tiny_model(place / "checkpoint"), sampling=Sampling("ddim", 2, 2.0))


def test_levels_in_order_and_rows_that_were_taken(subject):
    pairs, model = subject.context.pairs[:2], subject.model
    before = model.unet_evaluations
    # sixteen images are a full batch, so that no row is padding
    attempt = attacked(QUICK, subject, pairs)
    others = [f"sampler {name}" for name in model.samplers if name != "ddim"]
    assert others
    assert attempt.levels == [*LEVELS[:2], *others, *LEVELS[2:]]
    assert attempt.total == model.unet_evaluations - before
    assert attempt.total == 2 * QUICK.rows(plan_of(sampling=subject.sampling))
    assert all(drawn.shape[0] == 8 for own in attempt.images.values() for drawn in own.values())


def test_each_level_draws_other_images(subject):
    pairs = subject.context.pairs[:1]
    attempt = attacked(FEW, subject, pairs)
    drawn = [own[pairs[0].id] for own in attempt.images.values()]
    assert all(
        not torch.equal(one, other) for k, one in enumerate(drawn) for other in drawn[k + 1 :]
    )


def test_images_are_the_same_in_any_company_and_only_who_is_left_is_drawn(subject):
    pairs = subject.context.pairs[:3]
    every = attacked(FEW, subject, pairs, back=lambda level, pair: pair == pairs[1].id)
    first, *others = every.levels
    alone = attacked(FEW, subject, pairs[2:], closed=[first])
    assert set(every.images[first]) == {pair.id for pair in pairs}
    assert alone.levels == others
    for level in others:
        assert set(every.images[level]) == {pairs[0].id, pairs[2].id}
        own = pairs[2].id
        assert torch.equal(every.images[level][own], alone.images[level][own])


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_renewed_noise_is_the_posterior_of_the_forward_process(family):
    """Held against Bayes' rule for two Gaussians, in either kind of schedule."""
    model = load_family(family)
    now, then = torch.tensor(700), torch.tensor(400)
    (a, s), (later_a, later_s) = (
        tuple(factor.double() for factor in model.scales(t[None])) for t in (now, then)
    )
    # from the cleaner x' to x: x = ratio x' + added noise
    ratio = a / later_a
    added = s**2 - ratio**2 * later_s**2
    variance = later_s**2 * added / s**2
    clean, noise = torch.full((1, 1, 1, 1), 0.3).double(), torch.full((1, 1, 1, 1), -0.7).double()
    x = a * clean + s * noise
    mean = later_a * clean + ratio * later_s**2 / s**2 * (x - a * clean)
    for fresh in (0.0, 1.0):
        found = renewed(model, noise, torch.full_like(noise, fresh), now, then)
        step = later_a * clean + later_s * found
        torch.testing.assert_close(
            step, mean + fresh * variance.sqrt(), rtol=1e-5, atol=1e-6, check_dtype=False
        )


def test_guidance_of_each_step_and_fresh_noise_are_the_sampler_s(subject):
    model, calls = subject.model, []
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    where, times = model.empty_embedding(), torch.tensor([900, 500, 100])
    same = deterministic(model, x, times, where, guidance=2.0)
    assert torch.equal(same, deterministic(model, x, times, where, guidance=[2.0] * 3))
    other = deterministic(model, x, times, where, guidance=[2.0, 1.0, 1.0])
    # guidance by the empty prompt changes nothing of the empty prompt
    torch.testing.assert_close(other, same, rtol=1e-4, atol=1e-4)

    def fresh(step):
        calls.append(step)
        return torch.zeros_like(x)

    moved = deterministic(model, x, times, where, guidance=1.0, fresh=fresh)
    assert calls == [0, 1]
    assert not torch.equal(moved, same)


def test_a_defence_of_the_prompt_is_before_every_level(subject, monkeypatch):
    model, seen = subject.model, []

    def empty(embeddings, noise, sampling):
        seen.append((len(embeddings), sampling.guidance))
        return model.empty_embedding().expand_as(embeddings)

    pairs = subject.context.pairs[:1]
    open_ = attacked(FEW, subject, pairs)
    monkeypatch.setattr(model, "embedding_filter", empty)
    attempt = attacked(FEW, subject, pairs)
    assert len(seen) == len(attempt.levels)
    for level, own in attempt.images.items():
        assert not torch.equal(own[pairs[0].id], open_.images[level][pairs[0].id])


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_flow_families_draw_in_every_way(tmp_path, family):
    model = load_family(family)
    distilled = 1.5 if model.takes_distilled_guidance else None
    sampling = Sampling("flow_euler", 2, 2.0, distilled_guidance=distilled)
    subject = make_subject(tmp_path, model, sampling=sampling)
    few = replace(FEW, samplers=True, intervals=(3.0,))
    attempt = attacked(few, subject, subject.context.pairs[:1])
    assert ("sampler flow_dpm++" in attempt.levels) == (len(model.samplers) > 1)
    assert len(attempt.levels) == len(LEVELS) + len(model.samplers) - 2
    assert few.rows(plan_of(sampling=sampling, family=family)) == attempt.total


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"guidance": [-1.0]}, "guidance must be numbers >= 0"),
        ({"scales": [0.0]}, "scales must be positive"),
        ({"fresh": [1.0, 1.0]}, "fresh must not repeat"),
        ({"images": 0}, "images must be >= 1"),
    ],
)
def test_bad_settings_are_refused(settings, rule):
    with pytest.raises(InputError, match=rule):
        Trajectory(**settings)


def test_no_level_is_refused_before_anything_is_loaded():
    none = Trajectory(guidance=(), samplers=False, fresh=(), intervals=(), scales=())
    with pytest.raises(InputError, match="no level"):
        none.check(plan_of(sampling=Sampling()))
    # one sampler is left, but the usual one is not another way
    replace(none, samplers=True).check(plan_of(sampling=Sampling()))
