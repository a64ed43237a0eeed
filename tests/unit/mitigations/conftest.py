from collections.abc import Callable
from pathlib import Path

import pytest

from dori_lightning.mitigations.base import Workshop
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import Pair
from support.tiny import tiny_model
from support.workshop import make_workshop, read_pairs


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
def workshop(model: StableDiffusion, tmp_path: Path, pairs: tuple[Pair, ...]) -> Workshop:
    """A workshop over all pairs with a folder of its own."""
    return make_workshop(tmp_path, model, pairs)


@pytest.fixture
def workshop_of(model: StableDiffusion, pairs: tuple[Pair, ...]) -> Callable[..., Workshop]:
    """Make further workshops: ``workshop_of(folder, seed=1)``."""

    def make(folder: Path, **options: object) -> Workshop:
        return make_workshop(folder, model, pairs, **options)  # type: ignore[arg-type]

    return make
