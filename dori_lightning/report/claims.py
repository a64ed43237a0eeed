"""Recorded claims about a table, and whether a new one bears them out.

A file of claims (``expected.json`` of an experiment) is a list of objects::

    {"cell": {...}, "metric": "mr", "value": 0.0, "tol": 0.05}

``cell`` has the keys of a cell in ``report.json``: checkpoint, mitigation, attack, init, norm,
eps, steps, kind. What does not depend on an attack (the cost) names checkpoint and mitigation
alone. Of certificates it has checkpoint, mitigation, attack and group (``suspects``, ``controls``,
``reference``, ``planted``), and the metric is ``back``: how many of the group that attack brought
back at levels that count. A claim holds where the measured number is within ``tol`` of ``value``.
An optional ``sweep`` names the run folder's sweep that the claim is about, where several are
recorded in one file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, model_validator

from dori_lightning.certify.cascade import AttackFindings, Group
from dori_lightning.report.comparison import HeadlineRow
from dori_lightning.runtime.documents import stored
from dori_lightning.types import Cell, Init, Kind, Norm

METRICS: dict[str, tuple[float, float]] = {
    "mr": (0.0, 1.0),
    "similarity": (-1.0, 1.0),
    "denoising_loss_ratio": (0.0, math.inf),
    "kid": (-math.inf, math.inf),
    "unet_evaluations": (0.0, math.inf),
    "back": (0.0, math.inf),
}
"""What can be claimed, and in which range its numbers lie."""


class RowKey(BaseModel, extra="forbid", strict=True, frozen=True):
    """Which row of the table."""

    checkpoint: Annotated[str, Field(min_length=1)]
    mitigation: Annotated[str, Field(min_length=1)]


class CellKey(RowKey, frozen=True):
    """Which cell of a row."""

    attack: Literal["prompt", "dori"]
    init: Init | None
    norm: Norm
    eps: FiniteFloat | None
    steps: NonNegativeInt
    kind: Kind

    @model_validator(mode="after")
    def _is_a_condition(self) -> Self:
        if (self.norm == "none") != (self.eps is None):
            raise ValueError("eps must be null for norm none and a number otherwise")
        if (self.attack == "prompt") != (self.init is None):
            raise ValueError("init must be null for attack prompt and a start otherwise")
        if self.attack == "prompt" and (self.norm, self.steps) != ("none", 0):
            raise ValueError("attack prompt has norm none and 0 steps")
        return self


class _Claim(BaseModel, extra="forbid", strict=True, frozen=True):
    metric: str
    value: FiniteFloat
    tol: Annotated[FiniteFloat, Field(ge=0)]
    sweep: str | None = None

    @model_validator(mode="after")
    def _is_in_range(self) -> Self:
        low, high = METRICS[self.metric]
        if not low <= self.value <= high:
            raise ValueError(f"value of {self.metric} must lie in [{low:g}, {high:g}]")
        return self


class CellClaim(_Claim, frozen=True):
    """A recorded number of one cell."""

    cell: CellKey
    metric: Literal["mr", "similarity"]

    def measured(self, cells: Sequence[Cell], rows: Sequence[HeadlineRow]) -> float:  # noqa: ARG002
        """The same number in a table, NaN where that has none."""
        cell = next((cell for cell in cells if _is(cell, self.cell)), None)
        if cell is None:
            return math.nan
        return cell.mr if self.metric == "mr" else cell.similarity_median


class CostClaim(_Claim, frozen=True):
    """A recorded number of what a mitigation costs."""

    cell: RowKey
    metric: Literal["denoising_loss_ratio", "kid", "unet_evaluations"]

    def measured(self, cells: Sequence[Cell], rows: Sequence[HeadlineRow]) -> float:  # noqa: ARG002
        """The same number in a table, NaN where that has none."""
        wanted = (self.cell.checkpoint, self.cell.mitigation)
        row = next((row for row in rows if (row.checkpoint, row.mitigation) == wanted), None)
        found: float = getattr(row, self.metric.removeprefix("denoising_"), math.nan)
        return found


Door = tuple[str, str, str]
"""Checkpoint, mitigation and attack."""


class DoorKey(RowKey, frozen=True):
    """Which attack of a certificate, and which images."""

    attack: Annotated[str, Field(min_length=1)]
    group: Group


class DoorClaim(_Claim, frozen=True):
    """How many images an attack of a certificate brought back."""

    cell: DoorKey
    metric: Literal["back"]

    def measured(self, doors: Mapping[Door, AttackFindings]) -> float:
        """The same number of certificates, NaN where those have none."""
        cell = self.cell
        found = doors.get((cell.checkpoint, cell.mitigation, cell.attack))
        return math.nan if found is None else float(found.count(cell.group)[0])


Claim = Annotated[CellClaim | CostClaim | DoorClaim, Field(discriminator="metric")]


@dataclass(frozen=True)
class Checked:
    """A claim beside what was measured.

    Attributes:
        measured: The measured number; NaN where there is none.
        holds: Whether it is within the tolerance.
    """

    claim: CellClaim | CostClaim | DoorClaim
    measured: float
    holds: bool


def read_claims(path: Path) -> tuple[CellClaim | CostClaim | DoorClaim, ...]:
    """Read a file of claims; an empty list claims nothing.

    Raises:
        InputError: The file is missing or no list of claims; names malformed entries.
    """
    return tuple(stored(list[Claim], path, fix="mend the claims, or task.expected=FILE"))


def check_claims(
    claims: Sequence[CellClaim | CostClaim | DoorClaim],
    cells: Sequence[Cell],
    rows: Sequence[HeadlineRow],
    *,
    doors: Mapping[Door, AttackFindings] = MappingProxyType({}),
    sweeps: Sequence[str] = (),
) -> tuple[Checked, ...]:
    """Hold claims against a table, or against what attacks of certificates found (``doors``).

    Those about a sweep that is not among ``sweeps``, the sweeps that it was made of, are left out.
    """
    checked = []
    for claim in claims:
        if claim.sweep is None or claim.sweep in sweeps:
            if isinstance(claim, DoorClaim):
                found = claim.measured(doors)
            else:
                found = claim.measured(cells, rows)
            checked.append(Checked(claim, found, abs(found - claim.value) <= claim.tol + 1e-12))
    return tuple(checked)


def _is(cell: Cell, wanted: CellKey) -> bool:
    condition, budget = cell.condition, cell.condition.budget
    found = {
        "checkpoint": cell.checkpoint,
        "mitigation": cell.mitigation,
        "attack": condition.attack,
        "init": condition.init,
        "norm": budget.norm,
        "steps": budget.steps,
        "kind": cell.kind,
    }
    # a file holds a radius to some digits
    near = math.isclose(budget.eps or 0.0, wanted.eps or 0.0, rel_tol=1e-3)
    return near and found == wanted.model_dump(exclude={"eps"})
