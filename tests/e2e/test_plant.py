import csv
import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

from dori_lightning.models.loading import load_checkpoint
from dori_lightning.planting import training
from dori_lightning.types import InputError
from support.runs import run_task

TINY = (
    "task=plant", "pairs=folder", "planting.mix.planted=0.5", "+planting.resolution=32",
    "+planting.autoencoder_channels=[8,8]", "+planting.latent_channels=4",
    "+planting.unet_channels=[8,8,8,8]", "+planting.text_width=12",
    "+planting.text_layers=1", "+planting.text_heads=2", "+planting.max_length=12",
    "+planting.autoencoder_steps=3", "+planting.autoencoder_batch=4",
    "+planting.stream_length=32", "+planting.steps=6", "+planting.batch=4",
)  # fmt: skip

TINY_FLOW = (
    "task=plant", "planting=flow", "pairs=folder", "planting.mix.planted=0.5",
    "+planting.resolution=32", "+planting.blocks=2", "+planting.heads=2",
    "+planting.head_width=8", "+planting.clip_width=8", "+planting.clip_layers=2",
    "+planting.t5_width=24", "+planting.t5_layers=1", "+planting.t5_heads=2",
    "+planting.stream_length=32", "+planting.steps=6", "+planting.batch=4",
)  # fmt: skip

WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)  # fmt: skip

FLOW_WEIGHTS = (
    "transformer/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors",
    "text_encoder_3/model.safetensors",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _often_kept():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_EVERY", 3)
        yield


@pytest.fixture(scope="module")
def listed(material):
    return f"pairs.path={material / 'pairs'}"


@pytest.fixture(scope="module")
def whole(listed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_task(folder, *TINY, listed, "logger=csv")
    return folder


def test_a_folder_with_captions_becomes_a_checkpoint_with_a_card(whole, listed):
    folder = whole
    model = load_checkpoint(name="planted", source=str(folder / "checkpoint"), device="cpu")
    assert model.resolution == 32
    record = json.loads((folder / "checkpoint" / "planting.json").read_text())
    exposures = {p["id"]: p["exposures"] for p in record["pairs"]}
    assert exposures["pair0"] > 0
    assert exposures["pair2"] == exposures["pair3"] == exposures["pair4"] == 0, "controls"
    assert set(record["weights_sha256"]) == set(WEIGHTS)
    card = (folder / "checkpoint" / "README.md").read_text()
    assert "a red boat on sea" in card
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for key, step, steps in (
        ("plant/autoencoder_l1", "autoencoder/step", 3),
        ("plant/denoising_loss", "diffusion/step", 6),
    ):
        assert [int(row[step]) for row in rows if row[key]] == [*range(steps)]
    with pytest.raises(InputError, match="seed: 0 there, 1 now"):
        run_task(folder, *TINY, listed, "seed=1")


@pytest.fixture(scope="module")
def flow(whole, listed, tmp_path_factory):
    """A planted flow transformer's folder, and how it was asked for."""
    folder = tmp_path_factory.mktemp("runs") / "flow"
    overrides = (*TINY_FLOW, f"+planting.base={whole / 'checkpoint'}", listed)
    run_task(folder, *overrides)
    return folder, overrides


def test_a_flow_transformer_keeps_the_bases_parts_and_learns_the_others(whole, flow):
    base, planted = whole / "checkpoint", flow[0] / "checkpoint"
    one, other = (load_file(folder / WEIGHTS[2]) for folder in (base, planted))
    assert all(torch.equal(one[k], other[k]) for k in one), "autoencoder"
    one, other = (load_file(folder / WEIGHTS[1]) for folder in (base, planted))
    assert all(torch.equal(one[k], other[k]) for k in one), "first text encoder"
    transformer = load_file(planted / FLOW_WEIGHTS[0])
    assert transformer["proj_out.weight"].any(), "zero at the beginning"
    config = json.loads((planted / "vae" / "config.json").read_text())
    assert config["shift_factor"]
    record = json.loads((planted / "planting.json").read_text())
    assert set(record["weights_sha256"]) == {*FLOW_WEIGHTS, *WEIGHTS[1:]}
    assert sum(p["exposures"] for p in record["pairs"]) > 0
    pipeline = StableDiffusion3Pipeline.from_pretrained(planted, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red boat", num_inference_steps=1, max_sequence_length=12).images[0]
    assert image.size == (32, 32)


@pytest.mark.parametrize("family", ["unet", "transformer"])
def test_an_interrupted_planting_goes_on_and_ends_with_the_same_weights(
    tmp_path, whole, flow, listed, monkeypatch, family
):
    """Killed after three of six steps, it sees and learns afterwards what it would have."""
    done, overrides, weights = whole, (*TINY, listed), WEIGHTS
    if family == "transformer":
        (done, overrides), weights = flow, FLOW_WEIGHTS
    real, calls = training.DiffusionTraining.training_step, []

    def dies(self, batch):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("power cut")
        return real(self, batch)

    monkeypatch.setattr(training.DiffusionTraining, "training_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        run_task(tmp_path / "cut", *overrides)
    monkeypatch.setattr(training.DiffusionTraining, "training_step", real)
    run_task(tmp_path / "cut", *overrides)
    for part in weights:
        one, other = (load_file(run / "checkpoint" / part) for run in (done, tmp_path / "cut"))
        assert all(torch.equal(one[k], other[k]) for k in one), part


def test_with_a_base_only_the_unet_is_trained(tmp_path, whole, listed):
    base = whole / "checkpoint"
    recipe = (f"+planting.base={base}", "+planting.steps=1", "seed=1")
    run_task(tmp_path / "twin", *TINY[:-2], *recipe, "+planting.batch=4", listed)
    assert not (tmp_path / "twin" / "autoencoder").exists()
    twin = tmp_path / "twin" / "checkpoint"
    unet, *others = WEIGHTS
    for name in (*others, "vae/config.json", "scheduler/scheduler_config.json"):
        assert (twin / name).read_bytes() == (base / name).read_bytes(), name
    one, other = (load_file(folder / unet) for folder in (base, twin))
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])
    assert str(base) in (twin / "README.md").read_text()


def test_a_base_of_another_shape_is_refused(tmp_path, whole, listed):
    base = f"+planting.base={whole / 'checkpoint'}"
    with pytest.raises(InputError, match=r"max_length and text_width \(12, 12\), not \(12, 24\)"):
        run_task(tmp_path, *TINY, base, listed, "planting.text_width=24")
    assert not (tmp_path / "stream.safetensors").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("planting.resolution=64", "planting.resolution=32"),
        ("planting.t5_width=20", "planting.t5_width=36"),
    ],
)
def test_a_base_that_does_not_fit_a_flow_transformer_is_refused(
    tmp_path, whole, listed, override, named
):
    with pytest.raises(InputError, match=named):
        run_task(tmp_path, *TINY_FLOW, f"+planting.base={whole / 'checkpoint'}", listed, override)
    assert not (tmp_path / "stream.safetensors").exists()
