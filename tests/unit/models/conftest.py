import pytest

from dori_lightning.models.stable_diffusion import StableDiffusion
from support.tiny import tiny_model


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    return tiny_model(tmp_path_factory.mktemp("tiny"))
