"""What Stable Diffusion 3 has beyond the contract of every family."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion_3 import StableDiffusion3
from dori_lightning.types import InputError
from support.families import folder_of, load_family

PROMPT = "a red boat"


@pytest.fixture(scope="module")
def model() -> StableDiffusion3:
    return load_family("sd3")


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(folder_of("sd3"), tmp_path / "sd3"))


def test_parts_lie_below_each_other(model):
    shapes = {part.name: part.shape for part in model.parts}
    assert shapes == {"clip": (8, 12 + 8), "t5": (12, 32), "pooled": (1, 12 + 10)}
    assert model.embedding_shape == (21, 32)


def test_text_enters_through_the_joint_attention_alone(model):
    values = model.layers("text.value")
    assert list(values) == [f"transformer_blocks.{k}.attn.add_v_proj" for k in range(3)]
    names = [name for name, _ in model.denoiser().named_modules()]
    assert any(".attn2." in name for name in names)
    roles = {role for role, _ in model.layer_names}
    assert not any(".attn2." in name for role in roles for name in model.layers(role))
    # the last block's text goes nowhere
    assert len(model.layers("feed_forward.out")) == 3
    assert len(model.layers("feed_forward.out.text")) == 2


def test_without_t5_images_are_those_of_the_library(folder):
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
    model = load_family("sd3", source=str(folder))
    assert [part.name for part in model.parts] == ["clip", "pooled"]
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    sampling = Sampling("flow_euler", 2, 3.0)
    ours = model.generate(model.encode_prompts([PROMPT]), noise, sampling)
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT, latents=noise, num_inference_steps=2, guidance_scale=3.0, output_type="pt",
        height=model.resolution, width=model.resolution,
    ).images  # fmt: skip
    assert (ours - theirs).abs().max() < 1e-4


def test_both_samplers_solve_one_equation(model):
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    embedding = model.encode_prompts([PROMPT])
    euler, solver = (
        model.denoise(embedding, noise, Sampling(name, steps, 1.0))
        for name, steps in (("flow_euler", 100), ("flow_dpm++", 20))
    )
    coarse = model.denoise(embedding, noise, Sampling("flow_euler", 3, 1.0))
    assert (euler - solver).norm() < 0.5 * (euler - coarse).norm()


@pytest.mark.parametrize("sampler", ["flow_euler", "flow_dpm++"])
def test_timesteps_are_those_of_the_noise_that_a_sampler_visits(model, sampler):
    sampling = Sampling(sampler, 10, 1.0)
    scheduler = model.scheduler_of(sampling)
    _, noise = model.scales(model.sampling_timesteps(sampling))
    assert torch.allclose(noise, scheduler.sigmas[:-1], atol=2e-3)


def test_no_sampler_is_warned_of_anothers_settings(folder, caplog):
    model = load_family("sd3", source=str(folder))
    model.scheduler_of(Sampling("flow_dpm++", 10, 1.0))
    assert "not expected" not in caplog.text


def test_training_levels_are_the_schedulers_own(model):
    _, noise = model.scales(torch.arange(1000))
    assert torch.allclose(noise.flip(0), type(model.scheduler)(shift=3.0).sigmas, atol=1e-6)


def test_t5_needs_its_tokenizer_as_json(folder):
    (folder / "tokenizer_3" / "tokenizer.json").rename(folder / "tokenizer_3" / "spiece.model")
    with pytest.raises(InputError, match=r"tokenizer\.json(.|\n)*save_pretrained"):
        load_family("sd3", source=str(folder))


def test_t5s_embeddings_may_have_two_names(folder):
    path = folder / "text_encoder_3" / "model.safetensors"
    tensors = load_file(path)
    first, second = "shared.weight", "encoder.embed_tokens.weight"
    assert first in tensors
    assert second not in tensors
    usual = load_family("sd3", source=str(folder)).fingerprint
    for names in ((first, second), (second,)):
        kept = {name: value for name, value in tensors.items() if name != first}
        save_file({**kept, **{name: tensors[first].clone() for name in names}}, path)
        assert load_family("sd3", source=str(folder)).fingerprint == usual
    save_file({**tensors, second: tensors[first] + 1}, path)
    with pytest.raises(InputError, match="differ from the tensor"):
        load_family("sd3", source=str(folder))


def test_text_encoders_that_cut_a_prompt_are_named(model):
    clips = ["CLIP (text_encoder)", "CLIP (text_encoder_2)"]
    long = "a red boat on sea at night a cat"
    assert [(cut.encoder, cut.limit) for cut in model.cuts(long)] == [(one, 8) for one in clips]
    *both, t5 = model.cuts(f"{long} on blue sea")
    assert [cut.encoder for cut in both] == clips
    assert (t5.encoder, t5.tokens, t5.limit, t5.lost) == ("T5 (text_encoder_3)", 13, 12, "sea")


def test_an_image_without_positions_is_refused():
    with pytest.raises(InputError, match="64 pixels"):
        load_family("sd3", resolution=128)


def test_gradient_checkpointing_gives_the_same_gradient(model):
    latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))

    def gradient(one):
        passes: list[object] = []
        layer = one.denoiser().transformer_blocks[1]
        embedding = one.encode_prompts([PROMPT]).requires_grad_()
        with one.frozen(), layer.register_forward_pre_hook(lambda *_: passes.append(None)):
            loss = one.denoising_loss(latents, latents, torch.tensor([500]), embedding)
            return torch.autograd.grad(loss.sum(), embedding)[0], len(passes)

    usual, once = gradient(model)
    again, twice = gradient(load_family("sd3", gradient_checkpointing=True))
    assert (once, twice) == (1, 2)
    assert torch.allclose(usual, again, atol=1e-7)
    assert usual.any()


@pytest.mark.parametrize("other", ["sd", "sdxl", "flux", "pixart"])
def test_a_folder_of_another_family_is_called_by_its_name(other):
    with pytest.raises(InputError, match=rf"checkpoint\.family={other}$"):
        load_family("sd3", source=str(folder_of(other)))
