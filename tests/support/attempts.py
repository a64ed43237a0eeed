"""Attacks run alone: on a tiny model, with an attempt that remembers what it was given."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from support.context import make_audit_context

NEVER = Calibration("local_correlation", 0.5, "fixed", (), (), float("nan"), ())
"""Nothing is measured here."""


class Remembered:
    """An `Attempt` that keeps images and counts rows."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        back: Callable[[str, str], bool] = lambda level, pair: False,
        closed: Sequence[str] = (),
    ) -> None:
        """Begin.

        Args:
            pairs: Who is attacked.
            back: Whether the images of a level and a pair id are copies.
            closed: Levels that are not to be tried.
        """
        self.pairs, self.back, self.closed = list(pairs), back, closed
        self.images: dict[str, dict[str, torch.Tensor]] = {}
        self.rows = 0

    def left(self, level: str) -> list[Pair]:
        return [] if level in self.closed else list(self.pairs)

    def add(self, level: str, images: Mapping[str, torch.Tensor], *, rows: int) -> None:
        assert set(images) <= {pair.id for pair in self.pairs}
        for drawn in images.values():
            assert drawn.dim() == 4
            assert bool(((drawn >= 0) & (drawn <= 1)).all())
        self.images[level] = dict(images)
        self.rows += rows * len(images)
        self.pairs = [pair for pair in self.pairs if not self.back(level, pair.id)]

    @property
    def levels(self) -> list[str]:
        return list(self.images)


def make_subject(
    folder: Path, model: LatentDiffusion, *, edit: Edit | None = None, **fields: Any
) -> Subject:
    """The audited model; ``fields`` replace those of its context."""
    context = make_audit_context(folder, model, **fields)
    return Subject("audited", context, edit or EmptyEdit(), NEVER)


def plan_of(
    sampling: Sampling, *, family: str = "sd", mitigation: Mitigation | None = None
) -> Plan:
    return Plan(mitigation or NoMitigation(), family, sampling)


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


def attacked(
    attack: Attack, subject: Subject, pairs: Sequence[Pair], **settings: Any
) -> Remembered:
    """Run an attack on pairs, and hold that it leaves the model as it was."""
    attempt = Remembered(pairs, **settings)
    with model_unchanged(subject.model):
        attack.run(subject, pairs, attempt)
    return attempt
