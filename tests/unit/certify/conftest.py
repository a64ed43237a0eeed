import pytest

from support.tiny import tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """One tiny checkpoint for all tests: attacks leave it as it was, and tests must too."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "checkpoint")
