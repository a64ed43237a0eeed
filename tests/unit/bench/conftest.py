"""A tiny model with pairs, as the bench measures them."""

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as L
import pytest

from dori_lightning.bench.attack import Subject
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.pairs.datamodule import PairsDataModule
from support.context import make_context, read_pairs
from support.tiny import tiny_model


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="package")
def subject(model: StableDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder: Path = tmp_path_factory.mktemp("subject")
    pairs = read_pairs(folder, vm=3, control=0)
    context = make_context(folder, model, pairs)
    context = replace(context, data=PairsDataModule(pairs, model))
    return Subject(
        model=model,
        pairs=pairs,
        context=context,
        trainer=L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            inference_mode=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        ),
        folder=folder / "scratch",
        threshold=0.5,
        seed=0,
    )
