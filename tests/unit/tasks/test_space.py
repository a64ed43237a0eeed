import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dori_lightning.attacks.settings import AttackSettings
from dori_lightning.models.protocol import Sampling
from dori_lightning.tasks import _space
from dori_lightning.tasks._space import audit_bytes, check_space
from dori_lightning.types import Budget, InputError, Pair

MODEL: Any = SimpleNamespace(embedding_shape=(77, 768), latent_shape=(4, 64, 64), resolution=512)
PAIRS = [Pair("a", "vm", "a", Path("a")), Pair("b", "control", "b", Path("b"))]


def test_pictures_are_most_of_it_and_grow_with_everything_that_is_drawn() -> None:
    def needed(*, mitigated: bool = False, images: int = 1, **attack: Any) -> int:
        return audit_bytes(
            MODEL, PAIRS, settings=AttackSettings(**attack), budget=Budget(steps=50),
            sampling=Sampling("ddim", 3, 2.0, images_per_pair=images, seed=0),
            mitigated=mitigated,
        )  # fmt: skip

    picture = 3 * 512**2
    one = needed(inits=("prompt",))
    # two prompts, two attacks
    assert 4 * picture < one < 5 * picture + 7_000_000
    assert needed(inits=("prompt",), images=10) - one > 9 * 4 * picture
    assert needed(inits=("prompt",), mitigated=True) - one >= 2 * picture
    assert needed(inits=("prompt",), snapshots=(1, 10, 60)) - one > 2 * 2 * picture
    assert needed(inits=("prompt", "random"), other_inits=("prompt",)) - one > picture


def test_too_little_is_refused_with_both_numbers_and_what_is_there_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").write_bytes(os.urandom(30_000))
    monkeypatch.setattr(_space.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000_000))
    check_space(tmp_path, 1_000_030_000)
    with pytest.raises(InputError, match=r"1\.00 GB free, but up to 1\.50 GB(.|\n)*mend:  free"):
        check_space(tmp_path, 1_500_030_000)
