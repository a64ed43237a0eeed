"""A search for the starting noise, which stays white."""

import math
from dataclasses import replace

import pytest
import torch

from dori_lightning.certify.base import deterministic
from dori_lightning.certify.initial_noise import (
    InitialNoise,
    frequency_bands,
    on_sphere,
    project,
)
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import InputError
from support.attempts import attacked, make_subject, plan_of
from support.families import load_family
from support.tiny import tiny_model

ATTACK = InitialNoise(radii=(0.1, 0.3), steps=3, images=4)
LEVELS = ["3 steps within 0.1 of drawn noise", "6 steps within 0.3 of drawn noise"]


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    place = tmp_path_factory.mktemp("initial-noise")
    return make_subject(place, tiny_model(place / "checkpoint"), sampling=Sampling("ddim", 2, 2.0))


def normal(seed, shape=(4, 16, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def energies(noise, bands):
    spectrum = torch.fft.fft2(noise, norm="ortho").abs().square()
    return torch.stack([(spectrum * band).sum() for band in bands])


@pytest.mark.parametrize(("sides", "count"), [((16, 16), 3), ((64, 64), 5), ((24, 32), 3)])
def test_bands_are_octaves_that_hold_every_frequency_once(sides, count):
    bands = frequency_bands(sides)
    assert bands.shape == (count, *sides)
    assert bool((bands.sum(0) == 1).all())
    assert bool(bands[0, 0, 0])
    # both of a wave's two halves lie in one band, so that what is left of noise is real
    assert torch.equal(bands[:, 1:, 1:], bands[:, 1:, 1:].flip(1, 2))


@pytest.mark.parametrize("radius", [0.1, 0.3, 2.0])
def test_projected_noise_keeps_norm_and_spectrum_and_stays_near(radius):
    bands, start = frequency_bands((16, 16)), on_sphere(normal(0))
    # a slow wave, as an image has it, and far more of it than there may be
    wave = torch.linspace(-30, 30, 16)[:, None].expand(4, 16, 16)
    found = project(start + wave, start, radius, bands)
    assert float(found.norm()) == pytest.approx(math.sqrt(4 * 16 * 16), rel=1e-5)
    torch.testing.assert_close(energies(found, bands), energies(start, bands), rtol=1e-4, atol=0)
    for band in bands:
        moved = energies(found - start, band[None]).sqrt() / energies(start, band[None]).sqrt()
        assert float(moved) <= radius + 1e-4
    assert float((found * wave).sum()) > float((start * wave).sum())


def test_noise_inside_of_the_ball_stays():
    bands, start = frequency_bands((16, 16)), on_sphere(normal(0))
    near = project(start + 0.05 * normal(1), start, 0.3, bands)
    torch.testing.assert_close(project(near, start, 0.3, bands), near, rtol=1e-4, atol=1e-4)


def first_loss(subject, pair, noise):
    """Distance to the image after the sampling steps that are looked at."""
    model = subject.model
    times = model.sampling_timesteps(subject.sampling)[: ATTACK.through]
    where = subject.prompts([pair])[pair.id][None]
    with torch.no_grad():
        clean = deterministic(model, noise[None], times, where, guidance=2.0)
    return float((clean[0] - subject.latents([pair])[0]).square().mean())


def test_the_image_comes_closer_in_a_larger_ball(subject, monkeypatch):
    pair, drawn = subject.context.pairs[0], []
    draw = type(subject).draw

    def remembered(self, where, *, noise, **given):
        drawn.append(noise[pair.id])
        return draw(self, where, noise=noise, **given)

    monkeypatch.setattr(type(subject), "draw", remembered)
    exact = replace(ATTACK, perturbation=0.0, images=2)
    attempt = attacked(exact, subject, [pair])
    start = on_sphere(subject.noise_of([pair], 1, "initial_noise")[pair.id][0])
    assert attempt.levels == LEVELS
    near, further = (noise[0] for noise in drawn)
    assert torch.equal(drawn[0][0], drawn[0][1]), "nothing was added"
    losses = [first_loss(subject, pair, noise) for noise in (start, near, further)]
    assert losses == sorted(losses, reverse=True)
    for noise, radius in ((near, 0.1), (further, 0.3)):
        assert float((noise - start).norm() / start.norm()) <= radius + 1e-4


def test_images_are_drawn_around_what_was_found(subject, monkeypatch):
    pair, drawn = subject.context.pairs[0], []
    draw = type(subject).draw

    def remembered(self, where, *, noise, **given):
        drawn.append(noise[pair.id])
        return draw(self, where, noise=noise, **given)

    monkeypatch.setattr(type(subject), "draw", remembered)
    for perturbation in (0.0, 0.1):
        attacked(replace(ATTACK, radii=(0.1,), perturbation=perturbation), subject, [pair])
    exact, around = drawn
    for own in around:
        assert float((own - exact[0]).norm() / exact[0].norm()) == pytest.approx(0.1, rel=0.15)
        assert float(own.norm()) == pytest.approx(float(exact[0].norm()), rel=1e-4)


def test_rows_and_results_in_any_company(subject):
    pairs, model = subject.context.pairs[:4], subject.model
    before = model.unet_evaluations
    # four pairs and sixteen images are full batches, so that no row is padding
    every = attacked(ATTACK, subject, pairs)
    assert every.total == model.unet_evaluations - before
    assert every.total == 4 * ATTACK.rows(plan_of(sampling=subject.sampling))
    own = pairs[2].id
    fewer = attacked(ATTACK, subject, pairs[2:], back=lambda level, pair: pair != own)
    assert set(fewer.images[LEVELS[1]]) == {own}
    for level in LEVELS:
        assert torch.equal(fewer.images[level][own], every.images[level][own])


def test_a_level_that_does_not_count_ends_it(subject):
    attempt = attacked(ATTACK, subject, subject.context.pairs[:1], closed=LEVELS)
    assert attempt.levels == []
    assert attempt.total == 0


def test_flow_matching(tmp_path):
    sampling = Sampling("flow_euler", 2, 2.0)
    subject = make_subject(tmp_path, load_family("sd3"), sampling=sampling)
    few = replace(ATTACK, radii=(0.2,), steps=1, images=1)
    attempt = attacked(few, subject, subject.context.pairs[:1])
    assert attempt.total == few.rows(plan_of(sampling=sampling, family="sd3"))


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"radii": [0.3, 0.1]}, "radii must rise"),
        ({"radii": []}, "radii must rise"),
        ({"radii": [2.5]}, "radii must rise"),
        ({"steps": 0}, "steps must be >= 1"),
        ({"through": 0}, "through must be >= 1"),
        ({"perturbation": 1.0}, "perturbation must lie"),
        ({"lr": 0.0}, "lr must be a positive"),
    ],
)
def test_bad_settings_are_refused(settings, rule):
    with pytest.raises(InputError, match=rule):
        InitialNoise(**settings)
