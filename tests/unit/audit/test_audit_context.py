from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.audit.context import AuditContext, audit_bytes, check_controls
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.models.protocol import Sampling
from dori_lightning.pairs.corpus import ORDINARY_PROMPTS
from dori_lightning.types import Budget, Pair, Pairs, Reference

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
    # two prompts in the run and in the cache, two attacks, and the ordinary prompts
    assert 6 * image < one - ORDINARY_PROMPTS * image < 7 * image + 7_000_000
    assert needed(inits=("prompt",), images=10) - one > 9 * (6 + ORDINARY_PROMPTS) * image
    assert needed(inits=("prompt",), mitigated=True) == one
    assert needed(inits=("prompt",), snapshots=(1, 10, 60)) - one > 2 * 2 * image
    assert needed(inits=("prompt", "random"), other_inits=("prompt",)) - one > image


def test_controls_with_fewer_references_than_suspected_pairs_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    several = [replace(pair, others=(Reference(Path("x")),)) for pair in PAIRS]
    for pairs in (PAIRS, several, several[1:], several[:1]):
        check_controls(pairs, AttackSettings(inits=("prompt",)))
    assert not caplog.records
    check_controls([several[0], PAIRS[1]], AttackSettings(inits=("prompt",)))
    assert "2.0 reference images on average and controls 1.0" in caplog.text
