from pathlib import Path

import pytest
import torch

from dori_lightning.attacks.solver import AttackProblem
from support.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("tiny")
    return tiny_model(folder)


@pytest.fixture(scope="module")
def problem(model):
    generator = torch.Generator().manual_seed(3)
    names = ("boat", "house", "cat", "night", "sea")
    prompts = [f"a red {name}" for name in names]
    latents = torch.randn((5, *model.latent_shape), generator=generator)
    return AttackProblem(names, (0,) * 5, latents, model.encode_prompts(prompts))
