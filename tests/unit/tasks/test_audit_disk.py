from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.audit.disk import audit_bytes
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import Budget, Pair

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
