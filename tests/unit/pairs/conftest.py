import pytest

from support.pairs import write_image


@pytest.fixture
def folder(tmp_path):
    """Three images, a.png to c.png, without a list."""
    root = tmp_path / "pictures"
    for seed, name in enumerate("abc"):
        write_image(root / f"{name}.png", seed=seed)
    return root
