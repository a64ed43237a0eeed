import json
import shutil

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from dori_lightning.mitigations.activations import activations
from dori_lightning.models.pixart import PixArt
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import InputError
from support.families import drawn_by_diffusers, folder_of, load_family, tiny_pixart

PROMPT, EMPTY = "a red boat", ""


@pytest.fixture(scope="module")
def model() -> PixArt:
    return load_family("pixart")


def test_prompts_are_read_in_small_letters_as_the_library_does(model):
    loud = " A RED Boat "
    assert torch.equal(model.encode_prompts([loud]), model.encode_prompts([PROMPT]))
    assert int(model.read(model.encode_prompts([loud])).sum()) == 4 + 1  # and the mask itself
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    sampling = Sampling("dpm++", 2, 3.0)
    ours = model.generate(model.encode_prompts([PROMPT]), noise, sampling)
    assert (ours - drawn_by_diffusers(model, loud, noise, sampling)).abs().max() < 1e-4


def test_value_layers_take_what_is_said_of_them(model):
    embedding = model.encode_prompts([PROMPT, EMPTY])
    layer = next(iter(model.layers("text.value").values()))
    taken: list[torch.Tensor] = []
    noise = torch.randn(2, *model.latent_shape)
    with (
        torch.no_grad(),
        layer.register_forward_hook(lambda _, inputs, __: taken.append(inputs[0])),
    ):
        model.predict_noise(noise, torch.tensor([5, 5]), embedding)
    text, read = model.value_input(embedding), model.read(embedding)
    tokens = read[:, : text.shape[1]]
    assert tokens.sum(1).tolist() == [4, 1]
    assert torch.allclose(text[tokens], taken[0][tokens], atol=1e-6)
    # behind its end a prompt goes on with its end token
    assert torch.equal(text[0, 4:], text[0, 3:4].expand_as(text[0, 4:]))
    # neurons are judged by the tokens of a prompt, not by how much room is left
    with torch.no_grad():
        values = layer(text[0, :4]).abs().mean(0)
    assert torch.allclose(activations(layer, text, read)[0], values, atol=1e-6)
    assert not torch.allclose(activations(layer, text)[0], values, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"out_channels": 12}, "channels"),
        ({"patch_size": 4}, "patches"),
        ({"caption_channels": 24}, "caption_channels"),
        ({"caption_channels": None}, "caption_channels"),
        ({"use_additional_conditions": True}, "PixArt-alpha"),
    ],
)
def test_other_models_are_none_of_the_family(changes, says):
    components = tiny_pixart()
    assert not list(PixArt.unlike_the_family(components))
    config = {**components.denoiser.config, **changes, "_use_default_values": []}
    other = PixArtTransformer2DModel.from_config(config)
    ((what, blamed),) = PixArt.unlike_the_family(components.with_module("transformer", other))
    assert says in what
    assert "transformer" in blamed


def test_the_published_configuration_names_another_class(model, tmp_path):
    folder = shutil.copytree(folder_of("pixart"), tmp_path / "published")
    path = folder / "transformer" / "config.json"
    held = {**json.loads(path.read_text()), "_class_name": "Transformer2DModel"}
    path.write_text(json.dumps({**held, "num_vector_embeds": None, "only_cross_attention": False}))
    again = load_family("pixart", source=str(folder))
    assert again.fingerprint == model.fingerprint
    with pytest.raises(InputError, match=r"checkpoint\.family=pixart$"):
        load_family("sd3", source=str(folder))
