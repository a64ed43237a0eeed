import pytest

from support.tiny import tiny_model


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))
