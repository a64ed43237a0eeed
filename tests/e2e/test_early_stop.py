"""Attacks that stop at their first success find what whole attacks find, for less."""

from pathlib import Path

import pandas as pd
import pytest

from support.runs import run_task, write_pairs
from support.tiny import write_tiny

NOISES, SAMPLER, PICTURES = 2, 2, 2
BASE = (
    "pairs=folder", "utility=none", "attack.budget.steps=4", "attack.snapshots=[1,2]",
    f"attack.noise_batch={NOISES}", "attack.inits=[prompt,random]", f"sampling.steps={SAMPLER}",
    f"sampling.images_per_pair={PICTURES}", "checkpoint.name=tiny", "checkpoint.device=cpu",
    "trainer=cpu", "report.images=none", "attack.pairs_per_forward=2",
)  # fmt: skip
THRESHOLD = "metrics.descriptors.local_correlation.threshold"


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("material")
    write_tiny(place / "checkpoint")
    write_pairs(place / "pairs", vm=3, control=2)
    return place


def run(material: Path, folder: Path, *more: str) -> Path:
    run_task(
        folder, *BASE, f"pairs.path={material / 'pairs'}",
        f"checkpoint.source={material / 'checkpoint'}", *more,
    )  # fmt: skip
    return folder


def test_scores(material: Path, tmp_path: Path) -> None:
    folder = run(material, tmp_path / "whole", f"{THRESHOLD}=0.5")
    rows = pd.read_parquet(folder / "pairs.parquet")
    keys = ["init", "pair_id", "steps"]
    print(rows.groupby(keys).similarity_local_correlation.max().unstack())
    print(rows.columns)
    assert 0
