import csv
import json

import pytest
import torch
from safetensors.torch import load_file

from dori_lightning.models.loading import load_checkpoint
from dori_lightning.planting import training
from dori_lightning.types import InputError
from support.runs import run_task

TINY = (
    "task=plant", "pairs=folder", "task.recipe.mix.planted=0.5", "+task.recipe.resolution=32",
    "+task.recipe.autoencoder_channels=[8,8]", "+task.recipe.latent_channels=4",
    "+task.recipe.unet_channels=[8,8,8,8]", "+task.recipe.text_width=12",
    "+task.recipe.text_layers=1", "+task.recipe.text_heads=2", "+task.recipe.max_length=12",
    "+task.recipe.autoencoder_steps=3", "+task.recipe.autoencoder_batch=4",
    "+task.recipe.stream_length=32", "+task.recipe.steps=6", "+task.recipe.batch=4",
)  # fmt: skip


WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
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


def test_an_interrupted_planting_goes_on_and_ends_with_the_same_weights(
    tmp_path, whole, listed, monkeypatch
):
    """Killed after three of six steps, it sees and learns afterwards what it would have."""
    real, calls = training.DiffusionTraining.training_step, []

    def dies(self, batch):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("power cut")
        return real(self, batch)

    monkeypatch.setattr(training.DiffusionTraining, "training_step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        run_task(tmp_path / "cut", *TINY, listed)
    monkeypatch.setattr(training.DiffusionTraining, "training_step", real)
    run_task(tmp_path / "cut", *TINY, listed)
    for part in WEIGHTS:
        one, other = (load_file(run / "checkpoint" / part) for run in (whole, tmp_path / "cut"))
        assert all(torch.equal(one[k], other[k]) for k in one), part


def test_with_a_base_only_the_unet_is_trained(tmp_path, whole, listed):
    base = whole / "checkpoint"
    recipe = (f"+task.recipe.base={base}", "+task.recipe.steps=1", "seed=1")
    run_task(tmp_path / "twin", *TINY[:-2], *recipe, "+task.recipe.batch=4", listed)
    assert not (tmp_path / "twin" / "autoencoder").exists()
    twin = tmp_path / "twin" / "checkpoint"
    unet, *others = WEIGHTS
    for name in (*others, "vae/config.json", "scheduler/scheduler_config.json"):
        assert (twin / name).read_bytes() == (base / name).read_bytes(), name
    one, other = (load_file(folder / unet) for folder in (base, twin))
    assert not torch.equal(one["conv_in.weight"], other["conv_in.weight"])
    assert str(base) in (twin / "README.md").read_text()


def test_a_base_of_another_shape_is_refused(tmp_path, whole, listed):
    base = f"+task.recipe.base={whole / 'checkpoint'}"
    with pytest.raises(InputError, match=r"max_length and text_width \(12, 12\), not \(12, 24\)"):
        run_task(tmp_path, *TINY, base, listed, "task.recipe.text_width=24")
    assert not (tmp_path / "stream.safetensors").exists()
