"""A model to attack, and what an attack gives its images to, without a cascade."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dori_lightning.certify.base import Attack, Plan, Subject
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import Edit, EmptyEdit
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import Calibration, Pair
from support.context import make_audit_context


class Collected:
    """Keeps the images of every level; nobody comes back."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        self.levels: list[str] = []
        self.images: dict[str, Mapping[str, torch.Tensor]] = {}
        self.notes: dict[str, Mapping[str, str] | None] = {}
        self.rows = 0

    def left(self, level: str) -> list[Pair]:
        del level
        return self.pairs

    def add(
        self,
        level: str,
        images: Mapping[str, torch.Tensor],
        *,
        rows: int,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.levels.append(level)
        self.images[level], self.notes[level] = images, notes
        self.rows += rows


def attacked(
    tmp_path: Path, model: Any, edit: Edit | None = None, sampling: Sampling | None = None
) -> Subject:
    """A model with an edit; two suspects and three controls."""
    fields = {} if sampling is None else {"sampling": sampling}
    context = make_audit_context(tmp_path, model, **fields)
    rule = Calibration("local_correlation", 0.5, "fixed", (), (), 1.0, ())
    return Subject("audited", context, edit or EmptyEdit(), rule)


def plan_of(model: Any, sampling: Sampling, **fields: Any) -> Plan:
    """What is known of a model before it is loaded."""
    return Plan(NoMitigation(), model.family.name, sampling, **fields)


def try_on(
    attack: Attack, subject: Subject, places: Sequence[int] = range(4)
) -> tuple[Collected, float]:
    """What an attack gives for pairs at some places, and the rows that each of them took.

    On the CPU batches are filled up: with four pairs and four images of each, and searches of
    four, there is nothing to fill.
    """
    pairs = [subject.context.pairs[place] for place in places]
    collected, model = Collected(pairs), subject.model
    _ = subject.scale  # measured once, and no work of an attack
    before = model.unet_evaluations
    attack.run(subject, pairs, collected)
    return collected, (model.unet_evaluations - before) / len(pairs)
