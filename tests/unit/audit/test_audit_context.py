from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.audit.context import AuditContext, audit_bytes
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import Budget, Pair, Pairs

MODEL = SimpleNamespace(embedding_shape=(77, 768), latent_shape=(4, 64, 64), resolution=512)
PAIRS = Pairs([Pair("a", "vm", "a", Path("a")), Pair("b", "control", "b", Path("b"))])


def needed(*, mitigated: bool = False, images: int = 1, **attack: Any) -> int:
    context = SimpleNamespace(
        model=MODEL,
        pairs=PAIRS,
        attack=AttackSettings(**attack),
        budget=Budget(steps=50),
        sampling=Sampling("ddim", 3, 2.0, images_per_pair=images, seed=0),
        mitigation=Wanda() if mitigated else NoMitigation(),
    )
    return audit_bytes(cast("AuditContext", context))


def test_images_take_most_of_the_disk_and_grow_with_everything_that_is_generated() -> None:
    image = 3 * 512**2
    one = needed(inits=("prompt",))
    # two prompts, two attacks
    assert 4 * image < one < 5 * image + 7_000_000
    assert needed(inits=("prompt",), images=10) - one > 9 * 4 * image
    assert needed(inits=("prompt",), mitigated=True) - one >= 2 * image
    assert needed(inits=("prompt",), snapshots=(1, 10, 60)) - one > 2 * 2 * image
    assert needed(inits=("prompt", "random"), other_inits=("prompt",)) - one > image
