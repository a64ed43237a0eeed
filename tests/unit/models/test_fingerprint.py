"""One fingerprint over everything that a result depends on, and over nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dori_lightning.models.export import weights_of, write_folder, write_single
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.readers import FolderPairs
from support.runs import write_pairs
from support.tiny import write_tiny


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path / "tiny")


def load(source: Path, **options: Any) -> StableDiffusion:
    return load_checkpoint(name="x", source=str(source), device="cpu", **options)


def edit(path: Path, **values: Any) -> None:
    """Change values of a JSON file; None removes one."""
    held = {**json.loads(path.read_text("utf-8")), **values}
    kept = {name: value for name, value in held.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("vae/config.json", {"scaling_factor": 0.5}),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}),
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}),
        ("scheduler/scheduler_config.json", {"clip_sample": True}),
        # DPM-Solver++ has another default
        ("scheduler/scheduler_config.json", {"timestep_spacing": None}),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}),
        ("text_encoder/config.json", {"hidden_act": "gelu"}),
        ("text_encoder/config.json", {"num_attention_heads": 3}),
        ("unet/config.json", {"norm_eps": 1e-3}),
        ("unet/config.json", {"sample_size": 8}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 6}),
        ("tokenizer/tokenizer_config.json", {"pad_token": "<|startoftext|>"}),
    ],
)
def test_what_decides_a_result_is_in_the_fingerprint(folder, file, values):
    before = load(folder).fingerprint
    edit(folder / file, **values)
    assert load(folder).fingerprint != before


def test_so_are_the_tokens_of_a_prompt_and_no_cache_is_shared(folder, tmp_path):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    path = other / "tokenizer" / "tokenizer.json"
    held = json.loads(path.read_text("utf-8"))
    vocabulary = held["model"]["vocab"]
    vocabulary["a</w>"], vocabulary["red</w>"] = vocabulary["red</w>"], vocabulary["a</w>"]
    path.write_text(json.dumps(held), encoding="utf-8")
    pairs = FolderPairs(write_pairs(tmp_path / "pairs", vm=1, control=0)).read()
    embeddings = {}
    for place in (other, folder):
        model = load(place)
        data = PairsDataModule(pairs, model, cache=tmp_path / "cache")
        embeddings[place] = data.batch(pairs).embeddings
        assert torch.equal(embeddings[place], model.encode_prompts([pairs[0].prompt]))
    assert not torch.equal(embeddings[other], embeddings[folder])


def test_a_moved_folder_with_other_notes_has_the_same_fingerprint(folder, tmp_path):
    before = load(folder).fingerprint
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    (moved / "README.md").write_text("another card", encoding="utf-8")
    (moved / "model_index.json").unlink()
    for file in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        edit(moved / file, _diffusers_version="0.0.1", _name_or_path="/somewhere/else", _note=1)
    notes = {"transformers_version": "4.0", "_name_or_path": "a/b", "architectures": ["X"]}
    edit(moved / "text_encoder" / "config.json", **notes, dtype="float16", use_cache=False)
    edit(moved / "tokenizer" / "tokenizer_config.json", name_or_path="a/b", tokenizer_class="X")
    edit(moved / "unet" / "config.json", act_fn=None)  # its own default
    assert load(moved).fingerprint == before


def test_how_it_is_computed_is_not_in_the_fingerprint(folder):
    options: dict[str, Any] = {"precision": "bf16", "channels_last": True}
    assert load(folder, **options).fingerprint == load(folder).fingerprint


def test_use_does_not_change_the_fingerprint(folder):
    model = load(folder)
    model.encode_prompts(["a red boat"])
    model.cuts("a red boat at sea")
    assert weights_of(model.components).fingerprint == model.fingerprint


def test_a_folder_and_a_single_file_of_one_checkpoint_agree(folder, tmp_path):
    model = load(folder)
    components = model.components
    write_single(tmp_path / "one.safetensors", components, weights_of(components))
    again = load(tmp_path / "one.safetensors", config=str(folder))
    assert again.fingerprint == model.fingerprint


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_an_export_samples_as_its_source_where_that_left_values_to_the_sampler(
    folder, tmp_path, sampler
):
    edit(folder / "scheduler" / "scheduler_config.json", timestep_spacing=None)
    model = load(folder)
    components = model.components
    write_folder(tmp_path / "export", components, weights_of(components))
    again = load(tmp_path / "export")
    assert again.fingerprint == model.fingerprint
    sampling = Sampling(sampler=sampler, steps=3)
    assert torch.equal(again.sampling_timesteps(sampling), model.sampling_timesteps(sampling))
