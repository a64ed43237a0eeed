from collections.abc import Callable
from pathlib import Path

import pytest

from dori_lightning.mitigations.base import Context
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import Pair
from support.context import make_context, read_pairs
from support.tiny import tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    """One tiny checkpoint for all tests: mitigations leave it as it was, and tests must too."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, ...]:
    """Two suspected pairs and three controls."""
    return read_pairs(tmp_path_factory.mktemp("material"))


@pytest.fixture
def suspected(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """What mitigations are to forget."""
    return tuple(pair for pair in pairs if pair.kind != "control")


@pytest.fixture
def context(model: StableDiffusion, tmp_path: Path, pairs: tuple[Pair, ...]) -> Context:
    """A context over all pairs with a folder of its own."""
    return make_context(tmp_path, model, pairs)


@pytest.fixture
def context_of(model: StableDiffusion, pairs: tuple[Pair, ...]) -> Callable[..., Context]:
    """Make further contexts: ``context_of(folder, seed=1)``."""

    def make(folder: Path, **options: object) -> Context:
        return make_context(folder, model, pairs, **options)  # type: ignore[arg-type]

    return make
