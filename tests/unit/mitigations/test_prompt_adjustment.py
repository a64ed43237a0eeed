import logging
from dataclasses import replace

import pytest
import torch

from dori_lightning.mitigations.edits import Origin
from dori_lightning.mitigations.prompt_adjustment import (
    AdjustmentSettings,
    PromptAdjustment,
    PromptAdjustmentEdit,
    memorization_score,
)
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import InputError
from support.unchanged import unchanged

SAMPLING = Sampling("ddim", 2, 2.0, 2)


def edit_of(model: StableDiffusion, target: float, **how: float) -> PromptAdjustmentEdit:
    return PromptAdjustmentEdit(Origin(model.fingerprint), target, AdjustmentSettings(**how))


@pytest.fixture(scope="module")
def rows(model):
    return model.encode_prompts(["a red boat on sea", "a blue house", "a photo of a cat"])


@pytest.fixture(scope="module")
def noise(model):
    return torch.randn((3, *model.latent_shape), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def scores(model, rows, noise):
    return memorization_score(model, rows, noise, SAMPLING)


# -- score ---------------------------------------------------------------------------------------


def test_score_is_the_norm_of_the_difference_from_the_empty_prompt(model, rows, noise, scores):
    t = model.sampling_timesteps(SAMPLING)[0].expand(3)
    with torch.no_grad():
        own = model.predict_noise(noise, t, rows)
        none = model.predict_noise(noise, t, model.empty_embedding().expand(3, -1, -1))
    wanted = torch.stack([(a - b).norm() for a, b in zip(own, none, strict=True)])
    assert scores.shape == (3,)
    assert torch.allclose(scores, wanted, rtol=1e-4)
    assert (scores > 0).all()


def test_score_of_the_empty_prompt_is_zero(model, noise):
    empty = model.empty_embedding().expand(3, -1, -1)
    assert memorization_score(model, empty, noise, SAMPLING).tolist() == [0, 0, 0]


def test_score_does_not_depend_on_company(model, rows, noise, scores):
    alone = memorization_score(model, rows[2:], noise[2:], SAMPLING)
    assert torch.equal(alone, scores[2:])
    many = memorization_score(model, rows.repeat(4, 1, 1), noise.repeat(4, 1, 1, 1), SAMPLING)
    assert torch.equal(many, scores.repeat(4))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_samplers_start_from_unscaled_noise(model, sampler):
    """What the score takes for granted."""
    scheduler = model.scheduler_of(replace(SAMPLING, sampler=sampler))
    assert scheduler.init_noise_sigma == 1
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(scheduler.scale_model_input(x, scheduler.timesteps[0]), x)


# -- adjustment ----------------------------------------------------------------------------------


def test_adjustment_lowers_the_score_and_leaves_the_first_token(model, rows, noise, scores):
    adjusted = edit_of(model, 0.0, iterations=3).adjusted(model, rows, noise, SAMPLING)
    after = memorization_score(model, adjusted, noise, SAMPLING)
    assert (after < scores).all()
    assert torch.equal(adjusted[:, 0], rows[:, 0])
    assert not torch.equal(adjusted[:, 1:], rows[:, 1:])
    assert not adjusted.requires_grad


def test_a_row_at_the_target_is_left_and_the_others_move(model, rows, noise, scores):
    low = int(scores.argmin())
    edit = edit_of(model, float(scores.min()), iterations=1)
    adjusted = edit.adjusted(model, rows, noise, SAMPLING)
    for k in range(3):
        assert torch.equal(adjusted[k], rows[k]) == (k == low)


def test_adjustment_ends_with_the_first_step_that_reaches_the_target(model, rows, noise, scores):
    edit = edit_of(model, float(scores[0]) * 0.95, iterations=30, lr=0.02)
    before = model.unet_evaluations
    done = edit.adjusted(model, rows[:1], noise[:1], SAMPLING)
    # passes of 8: the empty prompt once, then one before every step and one that sees the target
    steps = (model.unet_evaluations - before) // 8 - 2
    assert 1 < steps < 30

    short = replace(edit, adjusting=replace(edit.adjusting, iterations=steps - 1))
    earlier = short.adjusted(model, rows[:1], noise[:1], SAMPLING)
    assert float(memorization_score(model, earlier, noise[:1], SAMPLING)) > edit.target
    assert float(memorization_score(model, done, noise[:1], SAMPLING)) <= edit.target


def test_adjustment_is_that_of_adamw(model, rows, noise):
    edit = edit_of(model, 0.0, iterations=2, weight_decay=0.5)
    found = edit.adjusted(model, rows[:1], noise[:1], SAMPLING)
    # eight copies: passes of one shape give one gradient, and Adam blows up what rounding adds
    t = model.sampling_timesteps(SAMPLING)[0].expand(8)
    x, empty = noise[:1].expand(8, -1, -1, -1), model.empty_embedding().expand(8, -1, -1)
    point = rows[:1].repeat(8, 1, 1).requires_grad_(True)
    optimizer = torch.optim.AdamW([point], lr=0.05, weight_decay=0.5)
    with model.frozen():
        none = model.predict_noise(x, t, empty)
        for _ in range(2):
            optimizer.zero_grad()
            (model.predict_noise(x, t, point) - none).flatten(1).norm(dim=1).sum().backward()
            optimizer.step()
            with torch.no_grad():
                point[:, 0] = rows[0, 0]
    assert torch.allclose(found[0], point.detach()[0], rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_its_company(model, rows, noise, scores):
    # one row stops at once, so that the others change places in the passes
    edit = edit_of(model, float(scores.min()), iterations=2)
    together = edit.adjusted(model, rows, noise, SAMPLING)
    many = edit.adjusted(model, rows.repeat(3, 1, 1), noise.repeat(3, 1, 1, 1), SAMPLING)
    assert torch.equal(many, together.repeat(3, 1, 1))
    for k in (1, 2):
        alone = edit.adjusted(model, rows[k : k + 1], noise[k : k + 1], SAMPLING)
        assert torch.equal(alone, together[k : k + 1])


def test_what_is_not_finite_is_left_with_a_warning(model, rows, noise, caplog):
    broken = rows.clone()
    broken[1, 3] = torch.nan
    edit = edit_of(model, 0.0, iterations=2)
    with caplog.at_level(logging.WARNING):
        adjusted = edit.adjusted(model, broken, noise, SAMPLING)
    assert "1 embeddings are left" in caplog.text
    assert torch.equal(adjusted[1].nan_to_num(7.0), broken[1].nan_to_num(7.0))
    assert torch.equal(adjusted[0], edit.adjusted(model, rows, noise, SAMPLING)[0])


# -- edit ----------------------------------------------------------------------------------------


def test_images_are_made_from_adjusted_embeddings_while_applied(model, rows, noise):
    edit = edit_of(model, 0.0, iterations=1)
    before = model.generate(rows, noise, SAMPLING)
    with edit.applied(model):
        under = model.generate(rows, noise, SAMPLING)
    wanted = model.generate(edit.adjusted(model, rows, noise, SAMPLING), noise, SAMPLING)
    assert torch.equal(under, wanted)
    assert not torch.equal(under, before)
    assert torch.equal(model.generate(rows, noise, SAMPLING), before)


def test_model_is_as_before_and_an_earlier_filter_works_on(model, rows, noise):
    edit = edit_of(model, 0.0, iterations=1)

    def earlier(embeddings, noise, sampling):
        return embeddings * 0.5

    model.embedding_filter = earlier
    try:
        with unchanged(model), edit.applied(model):
            assert model.embedding_filter is not earlier
            found = model.embedding_filter(rows, noise, SAMPLING)
        with unchanged(model), pytest.raises(OSError, match="inside"), edit.applied(model):
            raise OSError("inside")
    finally:
        model.embedding_filter = None
    assert torch.equal(found, edit.adjusted(model, rows * 0.5, noise, SAMPLING))


def test_identity_follows_from_what_decides_the_images(model):
    edit = edit_of(model, 1.0)
    assert edit.identity == replace(edit, origin=replace(edit.origin, notes={"a": 1})).identity
    others = [
        edit_of(model, 1.5),
        edit_of(model, 1.0, lr=0.1),
        edit_of(model, 1.0, iterations=3),
        edit_of(model, 1.0, weight_decay=0.0),
        PromptAdjustmentEdit(Origin("another"), 1.0),
    ]
    assert len({e.identity for e in [edit, *others]}) == len(others) + 1
    assert edit.counts() == {}


def test_another_checkpoint_is_refused(model):
    edit = PromptAdjustmentEdit(Origin("another"), 1.0)
    with pytest.raises(InputError, match="another"), edit.applied(model):
        pytest.fail("applied")
    assert model.embedding_filter is None


# -- mitigation ----------------------------------------------------------------------------------


def test_target_is_a_quantile_of_ordinary_scores(model, context, suspected):
    settings = PromptAdjustment(calibration_prompts=5)
    before = model.unet_evaluations
    middle = settings.apply(model, suspected, context)
    scores = middle.origin.notes["ordinary_scores"]
    assert len(scores) == len(set(scores)) == 5
    assert middle.target == pytest.approx(sorted(scores)[2])
    assert middle.origin.notes["target"] == middle.target
    # one filled pass with the prompts, one with the empty prompt
    assert model.unet_evaluations - before == 16
    highest = replace(settings, quantile=1.0).apply(model, suspected, context)
    assert highest.target == pytest.approx(max(scores))
    assert highest.identity != middle.identity
    assert settings.apply(model, suspected, context).identity == middle.identity


def test_target_depends_on_the_run_seed_alone(model, context_of, tmp_path, pairs, suspected):
    settings = PromptAdjustment(calibration_prompts=3)
    first = settings.apply(model, suspected, context_of(tmp_path))
    fewer = settings.apply(model, suspected[:1], context_of(tmp_path))
    other = settings.apply(model, suspected, context_of(tmp_path, seed=1))
    assert first.identity == fewer.identity != other.identity


def test_given_target_needs_no_prompts(model, context, suspected):
    before = model.unet_evaluations
    found = context.find(PromptAdjustment(target=1.5), model, suspected)
    assert model.unet_evaluations == before
    assert isinstance(found.edit, PromptAdjustmentEdit)
    assert found.edit.target == 1.5
    assert found.path is None
    assert found.edit.origin.mitigation == "prompt_adjustment"
    assert found.edit.origin.settings["adjusting"]["iterations"] == 10


def test_scores_that_are_not_finite_give_no_target(model, context, suspected, monkeypatch):
    monkeypatch.setattr(model, "predict_noise", lambda x, t, y: torch.full_like(x, torch.nan))
    with pytest.raises(RuntimeError, match="not finite"):
        PromptAdjustment(calibration_prompts=2).apply(model, suspected, context)
