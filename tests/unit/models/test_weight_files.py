import pickle

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.models.weight_files import WeightFile, choose_variant, find_weights
from dori_lightning.types import InputError
from support.tiny import write_tiny

WHOLE = save({"a": torch.ones(100)})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"PK\x03\x04" + bytes(60), "models.convert"),
        (pickle.dumps({"a": 1}), "models.convert"),
        (b"GGUF" + bytes(60), "GGUF"),
        (WHOLE[:-10], f"{len(WHOLE) - 10:,} of {len(WHOLE):,} bytes"),
        (WHOLE[:20], "cut off"),
        (WHOLE + b"x", "cut off or damaged"),
        (bytes(600), "no safetensors file"),
        (save({"unet.to_q.lora_A.weight": torch.ones(1)}), "checkpoint.lora="),
        (save({"lora_unet_mid_block_to_q.lora_down.weight": torch.ones(1)}), "checkpoint.lora="),
        (save({"lycoris_unet_mid_block.hada_w1_a": torch.ones(1)}), "checkpoint.lora="),
        (save({"lora_unet_mid_block.diff": torch.ones(1)}), "checkpoint.lora="),
        (save({"mid_block.attn2.to_q_lora.down.weight": torch.ones(1)}), "checkpoint.lora="),
        (save({"conditioner.embedders.1.model.ln_final.weight": torch.ones(1)}), "XL"),
        (save({"model.diffusion_model.double_blocks.0.x": torch.ones(1)}), "FLUX"),
    ],
)  # fmt: skip
def test_what_is_called_safetensors_and_is_not_is_told(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        WeightFile.open(path).check_family(StableDiffusion.family)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("notes", "names", "noted"),
    [
        ({}, ["a"], None),
        ({"modelspec.prediction_type": "v"}, ["a"], "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, ["a"], "epsilon"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, ["a"], "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v1"}, ["a"], None),
        ({}, ["a", "v_pred"], "v_prediction"),
    ],
)
def test_a_files_own_notes_of_what_it_predicts(tmp_path, notes, names, noted):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(1) for name in names}, path, metadata=notes)
    found = WeightFile.open(path).prediction_note
    assert (found and found.kind) == noted


def weights(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(WHOLE)
    return folder


@pytest.mark.parametrize(
    ("names", "wanted", "chosen"),
    [
        (["model.safetensors"], None, ""),
        (["model.fp16.safetensors"], None, "fp16"),
        (["model.fp16.safetensors", "model.safetensors"], None, ""),
        (["model.fp16.safetensors", "model.safetensors"], "fp16", "fp16"),
        (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"],
         None, "fp16"),
        (["model.safetensors"], "fp16", InputError),
        (["model.fp16.safetensors", "model.non_ema.safetensors"], None, InputError),
        (["model.SAFETENSORS"], None, InputError),
        ([], None, InputError),
    ],
)  # fmt: skip
def test_which_variant_of_a_part_is_loaded(tmp_path, names, wanted, chosen):
    folder = weights(tmp_path / "part", *names)
    if isinstance(chosen, str):
        assert choose_variant(folder, "text_encoder", wanted) == chosen
    else:
        with pytest.raises(chosen):
            choose_variant(folder, "text_encoder", wanted)


@pytest.mark.parametrize(
    "place", ["unet/diffusion_pytorch_model.safetensors", "unet", ".", "checkpoint-500"]
)
def test_where_the_weights_of_a_part_may_lie(tmp_path, place):
    weights(tmp_path / "unet", "diffusion_pytorch_model.safetensors")
    weights(tmp_path / "checkpoint-500", "model.safetensors")
    name = "model" if place == "checkpoint-500" else "diffusion_pytorch_model"
    assert [path.name for path in find_weights(tmp_path / place, "unet")] == [
        f"{name}.safetensors"
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


def load(source, **options):
    return load_checkpoint(name="x", source=str(source), device="cpu", **options)


def test_a_folder_with_only_half_precision_weights_is_loaded(checkpoint, tmp_path):
    half = tmp_path / "half"
    write_tiny(half)
    for path in sorted(half.glob("*/*.safetensors")):
        save_file({k: v.half() for k, v in load_file(path).items()},
                  path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})  # fmt: skip
    both = load(half, variant="fp16")
    for path in half.glob("*/*[!6].safetensors"):
        path.unlink()
    alone = load(half)
    assert alone.fingerprint == both.fingerprint != load(checkpoint).fingerprint
    with pytest.raises(InputError, match=r"no bf16 weights.*it has fp16"):
        load(half, variant="bf16")


def in_a_hub_cache(checkpoint, place):
    (place / "models--owner--name" / "snapshots" / "0a1b").mkdir(parents=True)
    inside = place / "models--owner--name" / "snapshots" / "0a1b" / "checkpoint"
    inside.symlink_to(checkpoint)
    inside = inside.parent
    for part in checkpoint.iterdir():
        (inside / part.name).symlink_to(part)
    return place / "models--owner--name", f"checkpoint.source={inside}"


def beside_other_folders(checkpoint, place):
    (place / "outer").mkdir()
    (place / "outer" / "model").symlink_to(checkpoint)
    return place / "outer", f"checkpoint.source={place / 'outer' / 'model'}"


def one_file_in_it(_, place):
    (weights(place / "one", "dreamy.safetensors") / "readme.txt").write_text("x")
    return place / "one", f"checkpoint.source={place / 'one' / 'dreamy.safetensors'}"


def a_pickle_in_it(_, place):
    return weights(place / "one", "dreamy.ckpt"), "models.convert"


def a_unet_alone(checkpoint, _):
    return checkpoint / "unet", f"checkpoint.unet={checkpoint / 'unet'}"


def a_trainings_checkpoint(checkpoint, place):
    (place / "checkpoint-500").mkdir()
    (place / "checkpoint-500" / "unet").symlink_to(checkpoint / "unet")
    return place / "checkpoint-500", f"checkpoint.unet={place / 'checkpoint-500' / 'unet'}"


def a_unets_file(checkpoint, _):
    file = checkpoint / "unet" / "diffusion_pytorch_model.safetensors"
    return file, f"checkpoint.unet={file}"


@pytest.mark.parametrize(
    "brought",
    [
        in_a_hub_cache, beside_other_folders, one_file_in_it, a_pickle_in_it, a_unet_alone,
        a_trainings_checkpoint, a_unets_file,
    ],
)  # fmt: skip
def test_a_source_that_is_something_near_is_told_the_setting(checkpoint, tmp_path, brought):
    source, fix = brought(checkpoint, tmp_path)
    with pytest.raises(InputError) as refused:
        load(source)
    assert fix in str(refused.value)


def test_a_single_file_may_be_called_in_capitals(checkpoint, tmp_path):
    path = tmp_path / "MODEL.SAFETENSORS"
    save_file(
        {
            f"{prefix}.x": torch.ones(1)
            for prefix in ("model.diffusion_model", "first_stage_model")
        },
        path,
    )
    with pytest.raises(InputError, match="has no text encoder"):
        load(path, config=str(checkpoint))
