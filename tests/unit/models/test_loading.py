import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dori_lightning.models.convert import convert
from dori_lightning.models.export import parts_of, weights_of, write_single
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import InputError
from support.tiny import tiny_recipe, write_tiny


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path / "tiny")


def load(source: Path | str, **options: Any) -> StableDiffusion:
    return load_checkpoint(name="x", source=str(source), device="cpu", **options)


def test_the_fingerprint_is_of_the_weights(folder, tmp_path):
    first, again = load(folder), load(folder)
    other = load(write_tiny(tmp_path / "other", seed=1))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint


def test_a_pickle_only_folder_is_refused_with_the_command_that_converts_it(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    pickled = weights.with_suffix(".bin")
    torch.save(load_file(weights), pickled)
    weights.unlink()
    with pytest.raises(
        InputError, match=r"pickle.*python -m dori_lightning.models.convert"
    ) as caught:
        load(folder)
    assert str(pickled) in str(caught.value)
    assert convert(pickled, weights).tensors > 100
    assert load(folder).resolution == 32


def test_converting_refuses_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "evil.bin"
    torch.save({"x": Evil()}, path)
    with pytest.raises(InputError, match="not a plain file of tensors"):
        convert(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_classes_named_by_the_folder_are_ignored(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["os", "system"]
    index["_class_name"] = "EvilPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    assert type(load(folder).unet).__name__ == "UNet2DConditionModel"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder, part):
    (folder / part).rename(folder / f"no_{part}")
    with pytest.raises(InputError, match=part):
        load(folder)


def test_a_truncated_weight_file_is_one_message(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cut off") as refused:
        load(folder)
    assert str(path) in str(refused.value)


def test_a_text_encoder_of_another_width_is_refused(folder, tmp_path):
    other = write_tiny(tmp_path / "wide", tiny_recipe(text_width=16))
    (folder / "text_encoder").rename(folder / "old")
    (other / "text_encoder").rename(folder / "text_encoder")
    with pytest.raises(InputError, match=r"width 16.*takes 12"):
        load(folder)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("no/such/folder", "neither a diffusers folder"),
        ("model.ckpt", "pickle"),
        ("package:nothing", "not installed"),
    ],
)
def test_a_source_that_is_nothing_is_explained(source, named):
    with pytest.raises(InputError, match=named):
        load(source)


def test_half_precision_on_the_cpu_is_refused(folder):
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        load(folder, precision="fp16")


def test_eager_and_fused_attention_agree(folder):
    torch.manual_seed(0)
    fused, eager = load(folder), load(folder, attention="eager", channels_last=True)
    inputs = (torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.tensor([5, 900]))
    context = fused.encode_prompts(["a cat", "a boat"])
    with torch.no_grad():
        assert torch.allclose(
            fused.denoising_loss(*inputs, context),
            eager.denoising_loss(*inputs, context),
            atol=1e-5,
        )


def test_weights_saved_in_half_precision_load_as_fp32(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def single_file(folder: Path) -> Path:
    model = load(folder)
    path = folder.parent / "model.safetensors"
    parts = parts_of(model)
    write_single(path, parts, weights_of(parts))
    return path


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_single_file_is_the_same_checkpoint(tmp_path, prediction_type):
    recipe = tiny_recipe(prediction_type=prediction_type)
    folder = write_tiny(tmp_path / "tiny", recipe)
    path = single_file(folder)
    keys = set(load_file(path))
    assert "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight" in keys
    assert "first_stage_model.decoder.mid.attn_1.q.weight" in keys
    model = load(path, config=str(folder))
    assert model.fingerprint == load(folder).fingerprint
    assert model.prediction_type == prediction_type


def test_a_single_file_with_the_text_encoders_older_names_is_the_same(folder):
    path = single_file(folder)
    newer, older = (f"cond_stage_model.transformer.{name}" for name in ("text_model.", ""))
    state = {name.replace(newer, older): tensor for name, tensor in load_file(path).items()}
    assert f"{older}embeddings.token_embedding.weight" in state
    save_file(state, path, metadata={"format": "pt"})
    assert load(path, config=str(folder)).fingerprint == load(folder).fingerprint


@pytest.mark.parametrize("prediction_type", [None, "epsilon", "v_prediction"])
def test_a_single_file_that_notes_another_prediction_type_needs_a_word(folder, prediction_type):
    path = single_file(folder)
    save_file(load_file(path), path, metadata={"modelspec.prediction_type": "v"})
    if prediction_type is None:
        with pytest.raises(InputError, match=r"checkpoint\.prediction_type=v_prediction"):
            load(path, config=str(folder))
        return
    model = load(path, config=str(folder), prediction_type=prediction_type)
    assert model.prediction_type == prediction_type


def test_a_single_file_without_configuration_says_what_to_give(folder):
    with pytest.raises(InputError, match=r"checkpoint\.config="):
        load(single_file(folder))


def test_a_single_file_with_a_part_missing_names_it(folder):
    path = single_file(folder)
    state = {k: v for k, v in load_file(path).items() if not k.startswith("first_stage_model")}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="has no autoencoder"):
        load(path, config=str(folder))


def test_a_single_file_of_another_architecture_is_refused(folder, tmp_path):
    other = write_tiny(tmp_path / "wide", tiny_recipe(text_width=16))
    with pytest.raises(InputError, match="does not load with the configuration"):
        load(single_file(folder), config=str(other))
