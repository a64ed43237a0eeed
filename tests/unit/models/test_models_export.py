import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from dori_lightning.models.export import (
    check_written,
    weights_of,
    write_configs,
    write_folder,
    write_single,
)
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import InputError
from support.tiny import tiny_model, tiny_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny checkpoint whose weights fit half precision, as those of released ones do."""
    made = tiny_model(tmp_path_factory.mktemp("tiny"))
    round_to_half(made)
    return made


def round_to_half(model: StableDiffusion) -> None:
    with torch.no_grad():
        for part in (model.denoiser(), model.autoencoder, model.text_encoder):
            for parameter in part.parameters():
                parameter.copy_(parameter.half())


def load(source: Path, config: Path | None = None) -> StableDiffusion:
    return load_checkpoint(
        name="x", source=str(source), config=config and str(config), device="cpu"
    )


def states(model: StableDiffusion) -> dict[str, torch.Tensor]:
    components = {"u": model.denoiser(), "v": model.autoencoder, "t": model.text_encoder}
    return {f"{k}{n}": t for k, part in components.items() for n, t in part.state_dict().items()}


def same(first: StableDiffusion, second: StableDiffusion) -> bool:
    a, b = states(first), states(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def file_dtypes(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_a_folder_reads_back_bit_for_bit_in_the_narrowest_exact_dtype(model, tmp_path):
    components, folder = model.components, tmp_path / "diffusers"
    weights = weights_of(components)
    write_folder(folder, components, weights)
    assert weights.exact
    assert set(weights.dtypes.values()) == {"fp16"}
    for path in folder.rglob("*.safetensors"):
        assert file_dtypes(path) == {"F16"}
    again = load(folder)
    assert same(again, model)
    assert again.fingerprint == weights.fingerprint
    prompts = ["a red boat", "a cat at night"]
    assert torch.equal(again.encode_prompts(prompts), model.encode_prompts(prompts))
    assert torch.equal(again.levels.signal_variance, model.levels.signal_variance)
    assert again.scheduler.config == load(folder).scheduler.config
    check_written(folder, weights)


def test_one_weight_that_needs_more_keeps_its_part_in_full_precision(model, tmp_path):
    weight = model.denoiser().conv_in.bias
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] = 1 + 2**-20
        weights = weights_of(model.components)
        assert weights.exact
        assert weights.dtypes == {"unet": "fp32", "vae": "fp16", "text_encoder": "fp16"}
        write_folder(tmp_path, model.components, weights)
        assert same(load(tmp_path), model)
        with torch.no_grad():
            weight[0] = 2.0**100
        assert weights_of(model.components).dtypes["unet"] == "fp32"
        with pytest.raises(InputError, match=r"conv_in\.bias.*too large for fp16"):
            weights_of(model.components, "fp16")
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_dtype_that_is_asked_for_is_used_and_rounding_is_told(model):
    wide, narrow = weights_of(model.components, "fp32"), weights_of(model.components, "bf16")
    assert (wide.exact, narrow.exact) == (True, False)
    assert set(narrow.dtypes.values()) == {"bf16"}
    assert wide.fingerprint == weights_of(model.components).fingerprint != narrow.fingerprint
    assert next(iter(narrow.states["unet"].values())).dtype == torch.bfloat16
    with pytest.raises(InputError, match="fp16, bf16, fp32 or null, got 'half'"):
        weights_of(model.components, "half")


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_plain_diffusers_opens_and_runs_the_folder(model, tmp_path, dtype):
    components = model.components
    weights = weights_of(components, dtype)
    write_folder(tmp_path, components, weights)
    pipeline = StableDiffusionPipeline.from_pretrained(
        tmp_path, safety_checker=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    unet, encoder = pipeline.unet.state_dict(), pipeline.text_encoder.state_dict()
    assert all(torch.equal(unet[n], t.float()) for n, t in weights.states["unet"].items())
    assert all(
        torch.equal(encoder[n], t.float()) for n, t in weights.states["text_encoder"].items()
    )
    ids = pipeline.tokenizer("a red boat").input_ids
    assert ids == model.tokenizer("a red boat").input_ids
    image = pipeline("a cat", num_inference_steps=1, height=32, width=32, output_type="pt")
    assert image.images.shape == (1, 3, 32, 32)


def test_a_single_file_reads_back_bit_for_bit(model, tmp_path):
    components, path, config = model.components, tmp_path / "x.safetensors", tmp_path / "config"
    weights = weights_of(components)
    write_configs(config, components)
    assert not list(config.rglob("*.safetensors"))
    write_single(path, components, weights, {"edit": "abc"})
    assert file_dtypes(path) == {"F16"}
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"dori_lightning": '{"edit": "abc"}'}
    again = load(path, config)
    assert same(again, model)
    check_written(path, weights, config=config)


def test_plain_diffusers_opens_the_single_file_with_a_local_configuration(model, tmp_path):
    components, path, config = model.components, tmp_path / "x.safetensors", tmp_path / "config"
    weights = weights_of(components)
    write_configs(config, components)
    write_single(path, components, weights, {"edit": "abc", "fingerprint": "def"})
    pipeline = StableDiffusionPipeline.from_single_file(
        str(path), config=str(config), local_files_only=True, safety_checker=None
    )
    unet, encoder = pipeline.unet.state_dict(), pipeline.text_encoder.state_dict()
    assert all(torch.equal(unet[n], t.float()) for n, t in weights.states["unet"].items())
    assert all(
        torch.equal(encoder[n].float(), t.float())
        for n, t in weights.states["text_encoder"].items()
    )


def test_an_open_clip_encoder_gets_the_layout_of_version_2(model, tmp_path):
    config = CLIPTextConfig(**{**model.text_encoder.config.to_dict(), "hidden_act": "gelu"})
    torch.manual_seed(1)
    components = model.components.with_module("text_encoder", CLIPTextModel(config).eval())
    weights = weights_of(components)
    write_folder(tmp_path / "folder", components, weights)
    write_single(tmp_path / "x.safetensors", components, weights)
    keys = set(load_file(tmp_path / "x.safetensors"))
    prefix = "cond_stage_model.model"
    assert f"{prefix}.transformer.resblocks.0.attn.in_proj_weight" in keys
    assert f"{prefix}.positional_embedding" in keys
    assert not any("text_model" in key for key in keys)
    again = load(tmp_path / "x.safetensors", tmp_path / "folder")
    assert same(again, load(tmp_path / "folder"))
    assert again.fingerprint == weights.fingerprint


def test_a_v_predicting_checkpoint_stays_one(tmp_path):
    made = tiny_model(tmp_path / "tiny", tiny_recipe(prediction_type="v_prediction"))
    write_folder(tmp_path / "out", made.components, weights_of(made.components))
    again = load(tmp_path / "out")
    assert again.prediction_type == "v_prediction"
    assert same(again, made)


def test_the_folder_names_no_place_of_this_machine_and_no_code(model, tmp_path):
    source = tmp_path / "source"
    write_folder(source, model.components, weights_of(model.components))
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        path = next((source / part).glob("*config.json"))
        config = json.loads(path.read_text())
        config.update(auto_map={"AutoModel": "evil--code.Model"}, _name_or_path="/home/someone")
        path.write_text(json.dumps(config))
    (source / "unet" / "code.py").write_text("raise SystemExit")
    (source / "unet" / "old.bin").write_bytes(b"pickle")
    made = load(source)
    write_folder(tmp_path / "out", made.components, weights_of(made.components))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    for path in files:
        if path.suffix != ".safetensors":
            text = path.read_text("utf-8")
            assert str(tmp_path) not in text
            assert "/home/someone" not in text
            assert "auto_map" not in text


def test_what_reads_back_differently_is_an_error(model, tmp_path):
    components = model.components
    write_folder(tmp_path, components, weights_of(components))
    other = weights_of(components, "bf16")
    with pytest.raises(RuntimeError, match=f"{other.fingerprint}.*{model_fingerprint(model)}"):
        check_written(tmp_path, other)


def model_fingerprint(model: StableDiffusion) -> str:
    return weights_of(model.components).fingerprint
