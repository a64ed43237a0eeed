"""What an attack is given on a tiny model: a subject, and an attempt that keeps its images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dori_lightning.certify.base import Attack, Plan, Subject
from dori_lightning.mitigations.base import Mitigation
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import Edit, EmptyEdit
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import Calibration, Pair
from support.context import make_audit_context, quiet_trainer

SAMPLING = Sampling("ddim", 2, 2.0, images_per_pair=4)


@dataclass
class Kept:
    """An attempt at some pairs, of which those come back that it is told of.

    Attributes:
        pairs: The group.
        back: Level to ids of the pairs that come back there, or a function of both that says so.
        closed: Levels that are not to be tried.
        images: Level to images by pair.
        rows: Pair id to rows in all.
        notes: Level to what the attack said of its images.
    """

    pairs: Sequence[Pair]
    back: Mapping[str, Sequence[str]] | Callable[[str, str], bool] = field(default_factory=dict)
    closed: Sequence[str] = ()
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
        if level in self.closed:
            return []
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
            assert own.dim() == 4
            assert bool(((own >= 0) & (own <= 1)).all())
            self.images[level][name] = own
            self.rows[name] = self.rows.get(name, 0) + rows
            if self._comes_back(level, name):
                self.done.add(name)

    def _comes_back(self, level: str, name: str) -> bool:
        if isinstance(self.back, Mapping):
            return name in self.back.get(level, ())
        return self.back(level, name)

    @property
    def levels(self) -> list[str]:
        """Levels that were tried, in order."""
        return list(self.images)

    @property
    def total(self) -> int:
        """Rows of all pairs."""
        return sum(self.rows.values())


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


@contextmanager
def model_unchanged(model: LatentDiffusion) -> Iterator[None]:
    """Weights, their flags, mode and filter are the same bits afterwards."""
    denoiser = model.denoiser()

    def state() -> tuple[Any, ...]:
        return (
            denoiser.training,
            model.embedding_filter,
            [p.requires_grad for p in denoiser.parameters()],
            [p.grad for p in denoiser.parameters()],
        )

    weights = {name: value.clone() for name, value in denoiser.state_dict().items()}
    before = state()
    yield
    assert state() == before
    after = denoiser.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def attacked(attack: Attack, subject: Subject, pairs: Sequence[Pair], **settings: Any) -> Kept:
    """Run an attack on pairs, and hold that it leaves the model as it was."""
    attempt = Kept(pairs, **settings)
    with model_unchanged(subject.model):
        attack.run(subject, pairs, attempt)
    return attempt
