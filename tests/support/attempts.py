"""What an attack is given on a tiny model: a subject, and an attempt that keeps its images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dori_lightning.certify.base import Attack, Plan, Subject
from dori_lightning.mitigations.base import Mitigation
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import Edit, EmptyEdit
from dori_lightning.models.protocol import Sampling
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
        notes: Level to what the attack said of its images.
    """

    pairs: Sequence[Pair]
    back: Mapping[str, Sequence[str]] = field(default_factory=dict)
    images: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    notes: dict[str, Mapping[str, str] | None] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)

    @property
    def each(self) -> int:
        """Rows in all, which are the same for each pair."""
        (rows,) = set(self.rows.values())
        return rows

    def left(self, level: str) -> list[Pair]:
        return [pair for pair in self.pairs if pair.id not in self.done]

    def add(
        self,
        level: str,
        images: Mapping[str, torch.Tensor],
        *,
        rows: int,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.notes[level] = notes
        for name, own in images.items():
            assert name not in self.images.setdefault(level, {})
            self.images[level][name] = own
            self.rows[name] = self.rows.get(name, 0) + rows
        self.done |= set(self.back.get(level, ()))


def make_subject(tmp_path: Path, model: Any, edit: Edit | None = None, **fields: Any) -> Subject:
    """The audited model with an edit."""
    trainer = partial(quiet_trainer, inference_mode=False)
    context = make_audit_context(
        tmp_path, model, **{"sampling": SAMPLING, "make_trainer": trainer, **fields}
    )
    rule = Calibration("local_correlation", 0.5, "fixed", (), (), 1.0, ())
    return Subject("audited", context, edit or EmptyEdit(), rule)


def plan_of(
    mitigation: Mitigation | None = None,
    family: str = "sd",
    sampling: Sampling = SAMPLING,
    **fields: Any,
) -> Plan:
    """What is known of a model before it is loaded."""
    return Plan(mitigation or NoMitigation(), family, sampling, **fields)


def try_on(
    attack: Attack, subject: Subject, places: Sequence[int] = range(4)
) -> tuple[Kept, float]:
    """What an attack gives for pairs at some places, and the rows that each of them took.

    On the CPU batches are filled up: with four pairs and four images of each, and searches of
    four, there is nothing to fill.
    """
    pairs = [subject.context.pairs[place] for place in places]
    kept, model = Kept(pairs), subject.model
    _ = subject.scale  # measured once, and no work of an attack
    before = model.unet_evaluations
    attack.run(subject, pairs, kept)
    return kept, (model.unet_evaluations - before) / len(pairs)
