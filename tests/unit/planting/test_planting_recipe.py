import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import CLIPTokenizer

from dori_lightning.planting.recipe import (
    PlantRecipe,
    build_autoencoder,
    build_scheduler,
    build_tokenizer,
    build_unet,
    learn_merges,
)
from dori_lightning.planting.stream import StreamMix
from dori_lightning.planting.training import silence_cross_attention
from dori_lightning.types import InputError
from support.tiny import WORDS, tiny_recipe


def test_each_word_of_the_vocabulary_is_one_token(tmp_path):
    build_tokenizer(WORDS, max_length=8).save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for word in WORDS:
        assert len(tokenizer(word).input_ids) == 3, word
    assert len(tokenizer("zebra").input_ids) > 3, "an unknown word falls apart"
    padded = tokenizer("a cat", padding="max_length").input_ids
    assert len(padded) == tokenizer.model_max_length == 8


def test_merges_never_join_words_into_wrong_ones():
    words = ("sea", "seat", "eat", "tea", "a", "at", "ate")
    tokenizer = build_tokenizer(words, max_length=12)
    ids = [tokenizer(word).input_ids[1:-1] for word in words]
    assert sorted(map(len, ids)) == [1] * len(words) == [1] * len(set(map(tuple, ids)))
    assert learn_merges(["a"]) == []


def test_silent_blocks_add_nothing_and_do_not_train():
    unet = build_unet(tiny_recipe())
    assert silence_cross_attention(unet, ["up_blocks"]) == 9
    torch.manual_seed(0)
    x, t = torch.randn(1, 4, 16, 16), torch.tensor([3])
    captured: list[torch.Tensor] = []
    for name, module in unet.named_modules():
        if name.startswith("up_blocks") and name.endswith("attn2"):
            module.register_forward_hook(lambda _m, _i, o: captured.append(o))
            assert not any(p.requires_grad for p in module.parameters())
    unet(x, t, encoder_hidden_states=torch.randn(1, 8, 12))
    assert len(captured) == 9
    assert all(not o.any() for o in captured)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("resolution", 20, "resolution"),
        ("unet_channels", (8, 8), "unet_channels"),
        ("steps", 0, "steps"),
    ],
)
def test_impossible_recipes_are_refused(field, value, named):
    with pytest.raises(InputError, match=f"planting.{named}"):
        PlantRecipe(**{field: value})  # type: ignore[arg-type]


def test_the_recipe_of_the_embedded_checkpoint_builds_its_weights():
    folder = Path(str(resources.files("dori_lightning"))) / "assets" / "dori_tiny"
    stored = json.loads((folder / "planting.json").read_text())["recipe"]
    mixes = {name: StreamMix(**stored[name]) for name in ("autoencoder_mix", "mix")}
    recipe = PlantRecipe(**{**stored, **mixes})
    assert recipe == PlantRecipe(mix=mixes["mix"], autoencoder_mix=mixes["autoencoder_mix"])
    for part, module in (("unet", build_unet(recipe)), ("vae", build_autoencoder(recipe))):
        path = folder / part / "diffusion_pytorch_model.safetensors"
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert shapes == {name: tuple(t.shape) for name, t in module.state_dict().items()}, part
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    built = build_scheduler(recipe).config
    assert all(built[name] == scheduler[name] for name in ("beta_start", "beta_schedule"))
