import pytest
import torch

from dori_lightning.models.protocol import Sampling
from dori_lightning.types import CoderRows
from support.tiny import tiny_model, tiny_recipe


def test_it_is_described_by_its_own_configuration(model):
    assert model.resolution == 32
    assert model.latent_shape == (4, 16, 16)
    assert model.embedding_shape == (8, 12)
    assert model.num_train_timesteps == 1000


def test_layers_have_the_names_and_order_of_stable_diffusion_v1(model):
    values = list(model.layers("cross_attention.value"))
    assert len(values) == 16
    assert values[:7] == [
        f"{block}.attentions.{k}.transformer_blocks.0.attn2.to_v"
        for block, count in (
            ("down_blocks.0", 2),
            ("down_blocks.1", 2),
            ("down_blocks.2", 2),
            ("mid_block", 1),
        )
        for k in range(count)
    ]
    assert values[7] == "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    assert len(model.layers("feed_forward.out")) == 16
    assert len(model.layers("cross_attention.key")) == 16


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_error_of_the_predicted_noise_or_velocity(tmp_path, prediction_type):
    model = tiny_model(tmp_path, tiny_recipe(prediction_type=prediction_type))
    assert model.prediction_type == prediction_type
    torch.manual_seed(0)
    latents, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    timesteps, context = torch.tensor([10, 700]), model.encode_prompts(["a cat", "a boat"])
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = torch.cumprod(1 - beta, 0)[timesteps][:, None, None, None]
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    wanted = noise if prediction_type == "epsilon" else velocity
    with torch.no_grad():
        loss = model.denoising_loss(latents, noise, timesteps, context)
        output = model.denoiser()(noised, timesteps, encoder_hidden_states=context).sample
    assert torch.allclose(loss, ((output - wanted) ** 2).mean((1, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sampling_recovers_the_image_that_an_oracle_predicts(
    tmp_path, prediction_type, monkeypatch
):
    """With a denoiser that knows x0, sampling must end at x0: checks the v conversion."""
    model = tiny_model(tmp_path, tiny_recipe(prediction_type=prediction_type))
    truth = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def oracle(noised, timesteps, *_):
        alpha = model.variances(timesteps)[0][:, None, None, None]
        noise = (noised - alpha.sqrt() * truth) / (1 - alpha).sqrt()
        return (
            noise
            if prediction_type == "epsilon"
            else alpha.sqrt() * noise - (1 - alpha).sqrt() * truth
        )

    ended: list[torch.Tensor] = []

    def keep(latents):
        ended.append(latents)
        return torch.zeros(1, 3, 32, 32)

    monkeypatch.setattr(model, "_denoise", oracle)
    monkeypatch.setattr(model, "decode_latents", keep)
    context = model.encode_prompts(["a cat"])
    for sampler in ("ddim", "dpm++"):
        model.generate(context, torch.randn(1, 4, 16, 16), Sampling(sampler, 20, 3.0, 1))
        assert (ended[-1] - truth).abs().max() < 0.15, sampler


def test_images_depend_on_their_neighbours_by_rounding_only(model):
    torch.manual_seed(0)
    context = model.encode_prompts(["a cat", "a boat", "a red house"])
    noise, sampling = torch.randn(3, 4, 16, 16), Sampling("ddim", 3, 2.0, 1, batch=2)
    together = model.generate(context, noise, sampling)
    alone = torch.cat(
        [model.generate(context[k : k + 1], noise[k : k + 1], sampling) for k in range(3)]
    )
    assert torch.allclose(together, alone, atol=1e-4)
    assert together.shape == (3, 3, 32, 32)
    assert 0 <= together.min() <= together.max() <= 1


def test_guidance_one_needs_no_unconditional_branch(model):
    context, noise = model.encode_prompts(["a cat"]), torch.randn(1, 4, 16, 16)
    before = model.unet_evaluations
    model.generate(context, noise, Sampling("ddim", 4, 1.0, 1))
    assert model.unet_evaluations - before == 4
    model.generate(context, noise, Sampling("ddim", 4, 2.0, 1))
    assert model.unet_evaluations - before == 4 + 8


def test_frozen_puts_everything_back(model):
    weights = list(model.parameters())
    weights[0].requires_grad_(False)
    model.denoiser().train()
    with model.frozen():
        assert not any(p.requires_grad for p in weights)
        training = model.denoiser().training
    assert not training
    assert [p.requires_grad for p in weights] == [False] + [True] * (len(weights) - 1)
    assert model.denoiser().training
    model.denoiser().eval()
    weights[0].requires_grad_(True)


def test_tokens_are_counted_before_truncation(model):
    assert model.cuts("a red boat") == ()
    (cut,) = model.cuts("a red boat on sea at night a cat")
    assert (cut.encoder, cut.tokens, cut.limit) == ("CLIP (text_encoder)", 11, 8)
    assert cut.lost == "night a cat"


def test_rows_through_text_encoder_and_autoencoder_are_counted(tmp_path):
    model = tiny_model(tmp_path)
    assert model.coder_rows == CoderRows(), "questions on loading are no work"
    context = model.encode_prompts(["a cat", "a boat"])
    model.encode_images(torch.rand(3, 3, 32, 32))
    model.generate(context, torch.randn(2, 4, 16, 16), Sampling("ddim", 2, 1.0, 1))
    assert model.frozen_copy().coder_rows == model.coder_rows == CoderRows(2, 3, 2)
