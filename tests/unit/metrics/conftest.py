"""Real photographs and drawn scenes, small."""

import csv

import pytest
import torch

from dori_lightning.metrics.descriptors import (
    GradientOrientation,
    LocalCorrelation,
    NormalizedCorrelation,
    StructuralSimilarity,
    TiledCorrelation,
)
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.planting.dataset import write_planted_pairs
from dori_lightning.planting.scenes import draw_scene

STRUCTURAL = {
    "normalized": NormalizedCorrelation,
    "local": LocalCorrelation,
    "tiled": TiledCorrelation,
    "gradient": GradientOrientation,
    "ssim": StructuralSimilarity,
}


@pytest.fixture(params=sorted(STRUCTURAL))
def descriptor(request):
    return STRUCTURAL[request.param]()


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Six photographs and two scenes, (8, 3, 64, 64) in [0, 1]."""
    folder = tmp_path_factory.mktemp("planted")
    write_planted_pairs(folder)
    with (folder / "metadata.csv").open() as file:
        names = {row["id"]: row["file_name"] for row in csv.DictReader(file)}
    chosen = ("astronaut", "cat", "coffee", "rocket", "coins", "temple")
    pictures = [image_tensor(square_image(folder / names[k]), 64) for k in chosen]
    scenes = [image_tensor(draw_scene(k).image) for k in (7_000_000, 7_000_001)]
    return torch.stack([*pictures, *scenes])
