from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from dori_lightning.models.export import weights_of, write_folder
from dori_lightning.planting.flow import (
    FlowRecipe,
    build_t5_tokenizer,
    untrained_flow,
)
from dori_lightning.planting.training import TransformerTraining
from dori_lightning.types import InputError
from support.tiny import WORDS, tiny_model

RECIPE = FlowRecipe(
    resolution=32, blocks=2, heads=2, head_width=8, clip_width=8, t5_width=24, t5_layers=1,
    t5_heads=2, steps=4, batch=4, caption_dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    base = tiny_model(tmp_path_factory.mktemp("base") / "tiny").components
    base.autoencoder.register_to_config(shift_factor=0.1, scaling_factor=0.5)
    return untrained_flow(RECIPE, base, WORDS, seed=0)


def test_each_word_is_one_token_of_t5_and_others_are_spelled(tmp_path):
    build_t5_tokenizer(WORDS, max_length=8).save_pretrained(tmp_path)
    tokenizer = type(build_t5_tokenizer(WORDS, max_length=8)).from_pretrained(tmp_path)
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 2, word
    spelled = tokenizer("dog").input_ids
    assert len(spelled) == 5
    assert tokenizer.unk_token_id not in spelled
    assert len(tokenizer("a cat", padding="max_length").input_ids) == 8


def test_prompts_are_embedded_as_stable_diffusion_3_does(tmp_path, parts):

    written = parts.components
    write_folder(tmp_path, written, weights_of(written, "fp16"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, local_files_only=True)
    prompt = "a red boat on sea"
    with torch.no_grad():
        expected, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=8
        )
        found = parts.text(torch.tensor(parts.text.tokens([prompt])))
    assert found[0].shape == (1, 16, 24)
    assert found[1].shape == (1, 20)
    assert not found[0][:, :8, 20:].any(), "filled up"
    assert torch.allclose(found[0], expected, atol=5e-3)  # weights in half precision
    assert torch.allclose(found[1], pooled, atol=5e-3)


def test_a_new_transformer_answers_nothing(parts):
    sequence, pooled = parts.text(torch.tensor(parts.text.tokens(["a cat"])))
    answer = parts.transformer(
        torch.randn(1, 4, 16, 16),
        encoder_hidden_states=sequence,
        pooled_projections=pooled,
        timestep=torch.tensor([500.0]),
    ).sample
    assert not answer.any()


class _Echo(torch.nn.Module):
    """A transformer that answers with what it was given, and remembers it."""

    def forward(self, noised, *, timestep, **_):
        self.noised, self.timestep = noised, timestep
        return SimpleNamespace(sample=noised)


def test_the_target_is_the_velocity_of_the_flow(parts):
    """From x = (1 - sigma) latent + sigma noise, which is noise alone at the first level."""
    training = TransformerTraining(parts, RECIPE, seed=0)
    training.transformer = echo = _Echo()
    latents, noise = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16)
    tokens = torch.tensor(parts.text.tokens(["a cat", "a boat"]))
    _, target = training.output_and_target(latents, noise, torch.tensor([0, 749]), tokens)
    assert echo.timestep.tolist() == pytest.approx([1000, 251])
    assert torch.equal(echo.noised[0], noise[0])
    # one step of size sigma against the velocity leads back to the latent
    assert torch.allclose(echo.noised[1] - 0.251 * target[1], latents[1], atol=1e-5)


def test_latents_are_shifted_and_scaled_before_noise(parts, monkeypatch):
    training = TransformerTraining(parts, RECIPE, seed=0)
    seen = {}

    def output_and_target(latents, noise, levels, tokens):
        seen.update(latents=latents)
        return noise, noise

    monkeypatch.setattr(training, "output_and_target", output_and_target)
    monkeypatch.setattr(training, "log", lambda *_: None)
    tokens = torch.tensor(parts.text.tokens(["a cat"]))
    training.training_step((torch.full((1, 4, 16, 16), 0.5), tokens))
    assert torch.allclose(seen["latents"], torch.tensor(0.2))


@pytest.mark.parametrize("name", ["steps", "blocks", "heads", "t5_layers"])
def test_impossible_recipes_are_refused(name):
    with pytest.raises(InputError, match=f"planting.{name}"):
        FlowRecipe(**{name: 0})
