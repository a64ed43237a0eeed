from dataclasses import replace

import pytest
import torch

from dori_lightning.mitigations.esd import ESD, ESDTraining, partly_denoised
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.models.protocol import Sampling
from dori_lightning.runtime.seeding import keyed_generator
from support.tiny import tiny_model, tiny_recipe

SETTINGS = FinetuneSettings(lr=1e-3, weight_decay=0.0, clip=None)
METHOD = ESD("esd", steps=2, batch=2, eta=2.0, sampling_steps=4, finetune=SETTINGS)


@pytest.fixture
def training(model, suspected, context):
    """A training that no Trainer runs: its step is 0."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    module = ESDTraining(model, METHOD, suspected, context)
    module.log = lambda *_: None
    yield module
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
        parameter.grad = None


def test_variants_name_the_published_groups(model):
    names = [name for name, _ in model.denoiser().named_parameters()]
    x = {name for name in names if METHOD.trains(model, name)}
    u = {name for name in names if replace(METHOD, variant="u").trains(model, name)}
    assert {name.rsplit(".attn2.")[1] for name in x} == {
        "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias",
    }  # fmt: skip
    left_out = set(names) - x - u
    assert {name.split(".")[0] for name in left_out} == {
        "time_embedding", "conv_norm_out", "conv_out",
    }  # fmt: skip
    assert any("time_emb_proj" in name for name in u)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_partial_sampling_is_the_samplers_way_cut_short(tmp_path, prediction):
    model = tiny_model(tmp_path, tiny_recipe(prediction_type=prediction))
    prompts = model.encode_prompts(["a red boat", "a blue house", "a cat"])
    noise = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    sampling = Sampling("ddim", 4, 3.0)
    timesteps = model.sampling_timesteps(sampling)
    scheduler = model.scheduler_of(sampling)
    wanted, x = [noise], noise
    for t in timesteps[:-1]:
        empty = model.empty_embedding().expand_as(prompts)
        with torch.no_grad():
            output = model._denoise(
                torch.cat([x, x]), t.expand(6), torch.cat([empty, prompts]), None
            )
        without, with_prompt = output.chunk(2)
        x = scheduler.step(without + 3 * (with_prompt - without), t, x, return_dict=False)[0]
        wanted.append(x)
    reached, before = torch.tensor([0, 3, 1]), model.unet_evaluations
    found = partly_denoised(
        model, prompts, noise, timesteps=timesteps, reached=reached, guidance=3.0
    )
    for row, steps in enumerate(reached.tolist()):
        assert torch.allclose(found[row], wanted[steps][row], atol=1e-4)
    assert model.unet_evaluations - before == 2 * (0 + 3 + 1)


def test_timesteps_lie_between_where_the_sampler_stopped_and_the_step_before(training):
    assert training.visited.tolist() == [751, 501, 251, 1]
    reached = torch.arange(4).repeat(400)
    drawn = training._timesteps(reached, torch.Generator().manual_seed(0)).view(400, 4)
    assert drawn.dtype == torch.int64
    for column, (low, high) in enumerate([(751, 1000), (501, 751), (251, 501), (1, 251)]):
        assert low <= int(drawn[:, column].min()) < low + 10
        assert high - 10 < int(drawn[:, column].max()) < high


def test_the_loss_is_zero_where_the_model_gives_the_target(training, model, monkeypatch):
    teacher, asked = training._teacher[0], []

    def targets(latents, timesteps, prompts, **_):
        asked.append((latents, timesteps, prompts))
        empty = model.empty_embedding().expand_as(prompts)
        without = teacher.predict_noise(latents, timesteps, empty)
        return without - 2.0 * (teacher.predict_noise(latents, timesteps, prompts) - without)

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert float(training.training_step()) > 1e-8
    # sampled before, since the model's predictions are replaced
    latents = torch.randn(2, *model.latent_shape)
    monkeypatch.setattr("dori_lightning.mitigations.esd.partly_denoised", lambda *_, **__: latents)
    monkeypatch.setattr(model, "predict_noise", targets)
    assert float(training.training_step()) < 1e-10
    prompts = {tuple(row.flatten().tolist()) for row in asked[-1][2]}
    assert prompts == {tuple(row.flatten().tolist()) for row in training.prompts}


def test_the_teacher_stays_what_it_was_and_its_evaluations_count(training, model):
    before = {n: p.clone() for n, p in training._teacher[0].denoiser().named_parameters()}
    used = model.unet_evaluations
    loss = training.training_step()
    loss.backward()
    trained = {n for n, p in model.denoiser().named_parameters() if p.grad is not None}
    assert trained == {n for n in before if METHOD.trains(model, n)}
    assert all(p.grad is None for p in training._teacher[0].parameters())
    # two rows through the student, twice two through the teacher, and two for each sampler step
    generator = keyed_generator("esd", 0, 0)
    torch.randn((2, *model.latent_shape), generator=generator)
    reached = torch.randint(4, (2,), generator=generator)
    assert model.unet_evaluations - used == 2 + 4 + 2 * int(reached.sum())
    assert training._teacher[0].unet_evaluations == 0
    assert not any("teacher" in name for name in training.state_dict())


def test_only_the_variants_weights_change_and_each_setting_gives_others(
    model, suspected, context_of, tmp_path
):
    short = replace(METHOD, batch=1, sampling_steps=2)
    mixed = replace(SETTINGS, precision="bf16-mixed")
    edits = [
        method.apply(model, suspected, context_of(tmp_path / str(k), seed=seed))
        for k, (method, seed) in enumerate(
            [
                (short, 0),
                (short, 1),
                (replace(short, finetune=mixed), 0),
            ]
        )
    ]
    wanted = {n for n, _ in model.denoiser().named_parameters() if METHOD.trains(model, n)}
    assert all(set(edit.weights) == wanted for edit in edits)
    assert len({edit.identity for edit in edits}) == 3
