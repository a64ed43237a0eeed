from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from dori_lightning.mitigations.wanda import Tracing, _squares, input_norms, pooled
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import InputError

THINGS = ("boat", "house", "sea", "night", "photo")
SAMPLING = Sampling("ddim", 4, 2.0, 2)


def hooks(model: StableDiffusion) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.denoiser().modules()
    )


def test_norms_are_those_of_inputs_whose_tokens_have_length_one(model: StableDiffusion):
    """The first step done by hand: the layer's inputs, both guidance halves."""
    rows = model.encode_prompts(["a red boat", "a blue house at night"])
    norms = input_norms(model, rows, Tracing(SAMPLING, steps=2))
    seen: dict[str, torch.Tensor] = {}
    spies = [
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0])
        )
        for name, layer in model.layers("feed_forward.out").items()
    ]
    noise = generation_noise(0, model.latent_shape).expand(2, -1, -1, -1)
    context = torch.cat([model.empty_embedding().expand_as(rows), rows])
    first = model.sampling_timesteps(SAMPLING)[0].expand(4)
    with torch.no_grad():
        model.predict_noise(torch.cat([noise, noise]), first, context)
    for spy in spies:
        spy.remove()
    assert list(norms) == list(model.layers("feed_forward.out")) == list(seen)
    for name, x in seen.items():
        assert norms[name].shape == (2, 2, x.shape[-1])
        unit = x / x.norm(dim=-1, keepdim=True)
        for k in range(2):
            wanted = torch.cat([unit[k], unit[k + 2]]).norm(dim=0)
            assert torch.allclose(norms[name][k, 0], wanted, rtol=1e-4, atol=1e-5)
        # every token counts once: squares add up to their number
        total = norms[name][:, 0].square().sum(1)
        assert torch.allclose(total, torch.full((2,), 2.0 * x.shape[1]), rtol=1e-4)


def test_only_the_first_steps_are_run(model: StableDiffusion):
    rows = model.encode_prompts(["a red boat"])
    before = model.unet_evaluations
    short = input_norms(model, rows, Tracing(SAMPLING, steps=1))
    # a pass on the CPU has 8 embeddings, two guidance halves each
    assert model.unet_evaluations - before == 16
    long = input_norms(model, rows, Tracing(SAMPLING, steps=2))
    assert model.unet_evaluations - before == 16 + 2 * 16
    assert all(torch.equal(short[name], long[name][:, :1]) for name in long)
    unguided = replace(SAMPLING, guidance=1.0)
    before = model.unet_evaluations
    input_norms(model, rows, Tracing(unguided, steps=1))
    assert model.unet_evaluations - before == 8


def test_seeds_are_pooled(model: StableDiffusion):
    rows = model.encode_prompts(["a red boat"])
    one, two = (input_norms(model, rows, Tracing(SAMPLING, steps=1, seed=seed)) for seed in (0, 1))
    both = input_norms(model, rows, Tracing(SAMPLING, steps=1, seeds=2))
    for name, value in both.items():
        assert not torch.allclose(one[name], two[name])
        assert torch.allclose(value.square(), one[name].square() + two[name].square(), rtol=1e-5)


def test_one_embedding_pools_to_itself_and_several_to_their_root_mean_square():
    norms = torch.rand(3, 2, 5) + 0.1
    assert torch.equal(pooled(norms[:1]), norms[0])
    assert torch.allclose(pooled(norms), (norms**2).mean(0) ** 0.5)


def test_an_error_on_the_way_leaves_no_hooks(model: StableDiffusion):
    before = hooks(model)

    def fail(*_):
        raise OSError("broken")

    breaking = list(model.layers("feed_forward.out").values())[1].register_forward_hook(fail)
    try:
        with pytest.raises(OSError, match="broken"):
            input_norms(model, model.encode_prompts(["a cat"]), Tracing(SAMPLING, steps=1))
        assert hooks(model) == before + 1
    finally:
        breaking.remove()


def test_norms_do_not_depend_on_company_beyond_one_pass(model: StableDiffusion):
    prompts = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in THINGS]
    rows = model.encode_prompts(prompts)
    many = input_norms(model, rows, Tracing(SAMPLING, steps=2))
    assert len(rows) > 8
    last = input_norms(model, rows[-1:], Tracing(SAMPLING, steps=2))
    assert all(torch.equal(many[name][-1:], last[name]) for name in last)


def test_zero_tokens_do_not_break_the_norms():
    """Rows of zeros stay zeros rather than becoming not a number."""
    x = torch.zeros(2, 3, 4)
    x[0, 1] = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert torch.allclose(_squares(x, 1), torch.tensor([[0.36, 0.64, 0.0, 0.0]]))
    assert torch.equal(_squares(F.pad(x, (0, 0, 0, 2)), 1), _squares(x, 1))


def test_more_steps_than_the_sampler_takes_are_refused(model: StableDiffusion):
    with pytest.raises(InputError, match="first 5 steps, but the sampler takes 4"):
        input_norms(model, model.empty_embedding(), Tracing(SAMPLING, steps=5))
