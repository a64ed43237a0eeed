"""What an attack is given on a tiny model: a subject, and an attempt that keeps its images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from dori_lightning.certify.base import Plan, Subject
from dori_lightning.mitigations.edits import Edit, EmptyEdit
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import Calibration, Pair
from support.context import make_audit_context, quiet_trainer

SAMPLING = Sampling("ddim", 2, 2.0, images_per_pair=4)


@dataclass
class Kept:
    """An attempt at some pairs, of which those come back that it is told of.

    Attributes:
        pairs: The group.
        back: Level to ids of the pairs that come back there.
        images: Level to images by pair.
        rows: Pair id to rows in all.
    """

    pairs: Sequence[Pair]
    back: Mapping[str, Sequence[str]] = field(default_factory=dict)
    images: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    def left(self, level: str) -> list[Pair]:
        return [pair for pair in self.pairs if pair.id not in self.done]

    def add(self, level: str, images: Mapping[str, torch.Tensor], *, rows: int) -> None:
        for name, own in images.items():
            assert name not in self.images.setdefault(level, {})
            self.images[level][name] = own
            self.rows[name] = self.rows.get(name, 0) + rows
        self.done |= set(self.back.get(level, ()))


def make_subject(
    tmp_path: Path, model: StableDiffusion, edit: Edit | None = None, **fields: Any
) -> Subject:
    """The audited model with an edit; nothing is judged, so it has no thresholds."""
    trainer = partial(quiet_trainer, inference_mode=False)
    context = make_audit_context(
        tmp_path, model, **{"sampling": SAMPLING, "make_trainer": trainer, **fields}
    )
    return Subject("audited", context, edit or EmptyEdit(), cast(Calibration, None))


def plan_of(mitigation: Any, family: str = "sd") -> Plan:
    return Plan(mitigation, family, SAMPLING)
