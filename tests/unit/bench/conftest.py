"""A tiny model with pairs, as a measurement of speed is given them."""

from pathlib import Path

import pytest

from dori_lightning.bench.measure import BenchContext
from support.context import make_context, read_pairs
from support.tiny import tiny_model


@pytest.fixture(scope="package")
def bench(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("bench")
    model = tiny_model(folder / "tiny")
    pairs = read_pairs(folder, vm=3, control=0)
    context = make_context(folder, model, pairs)
    return BenchContext(model=model, pairs=pairs, context=context, folder=folder / "scratch")
