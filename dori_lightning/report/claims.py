"""Recorded claims about a table, and whether a new one bears them out.

A file of claims (``expected.json`` of an experiment) is a list of objects::

    {"cell": {...}, "metric": "mr", "value": 0.0, "tol": 0.05}

``cell`` has the keys of a cell in ``report.json``: checkpoint, mitigation, attack, init, norm,
eps, steps, kind. What does not depend on an attack (the cost) names checkpoint and mitigation
alone. A claim holds where the measured number is within ``tol`` of ``value``. An optional
``sweep`` names the run folder's sweep that the claim is about, where several are recorded in one
file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from dori_lightning.types import INITS, KINDS, InputError, Norm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from dori_lightning.report.comparison import HeadlineRow
    from dori_lightning.types import Cell


CELL_KEYS = ("checkpoint", "mitigation", "attack", "init", "norm", "eps", "steps", "kind")
ROW_KEYS = ("checkpoint", "mitigation")
METRICS: dict[str, tuple[float, float]] = {
    "mr": (0.0, 1.0),
    "similarity": (-1.0, 1.0),
    "denoising_loss_ratio": (0.0, math.inf),
    "kid": (-math.inf, math.inf),
    "unet_evaluations": (0.0, math.inf),
}
"""What can be claimed, and in which range its numbers lie."""
_OF_ROWS = {"denoising_loss_ratio": "loss_ratio", "kid": "kid",
            "unet_evaluations": "unet_evaluations"}  # fmt: skip


class ClaimsFailedError(Exception):
    """A recorded claim does not hold: nothing is wrong with the input, the numbers differ."""


@dataclass(frozen=True)
class Claim:
    """One recorded number.

    Attributes:
        cell: Which cell, or which row.
        metric: A key of `METRICS`.
        value: The number.
        tol: How far the measured number may be away.
        sweep: Name of the sweep's folder that it is about; None for any.
    """

    cell: Mapping[str, Any]
    metric: str
    value: float
    tol: float
    sweep: str | None = None


@dataclass(frozen=True)
class Checked:
    """A claim beside what was measured.

    Attributes:
        measured: The measured number; NaN where there is none.
        holds: Whether it is within the tolerance.
    """

    claim: Claim
    measured: float
    holds: bool


def read_claims(path: Path) -> tuple[Claim, ...]:
    """Read a file of claims; an empty list claims nothing.

    Raises:
        InputError: The file is missing or no list of claims; names every malformed entry.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the claims: {error.strerror}\n  where: {path}\n"
            f"  fix:   task.expected=FILE"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(entries, list):
        raise InputError(f"{path} must hold a list of claims, not a {type(entries).__name__}")
    problems = [f"  [{k}] {text}" for k, entry in enumerate(entries) for text in _problems(entry)]
    if problems:
        listed = "\n".join(problems)
        raise InputError(f"{path} has malformed claims:\n{listed}")
    return tuple(
        Claim(e["cell"], e["metric"], float(e["value"]), float(e["tol"]), e.get("sweep"))
        for e in entries
    )


def _problems(entry: Any) -> Iterator[str]:
    """Say everything that is wrong with the form of one claim."""
    if not isinstance(entry, Mapping):
        yield f"must be an object, not {entry!r}"
        return
    wanted = {"cell", "metric", "value", "tol"}
    if missing := wanted - entry.keys():
        yield f"lacks {', '.join(sorted(missing))}"
        return
    if stray := entry.keys() - wanted - {"sweep"}:
        yield f"has unknown keys {', '.join(sorted(map(str, stray)))}"
    if not isinstance(entry.get("sweep", ""), str):
        yield f"sweep must be a name, not {entry['sweep']!r}"
    metric = entry["metric"]
    if not isinstance(metric, str) or metric not in METRICS:
        yield f"metric must be one of {', '.join(METRICS)}, not {metric!r}"
        return
    low, high = METRICS[metric]
    if not _is_number(entry["value"]) or not low <= entry["value"] <= high:
        yield f"value of {metric} must be a number in [{low:g}, {high:g}], not {entry['value']!r}"
    if not _is_number(entry["tol"]) or not 0 <= entry["tol"] < math.inf:
        yield f"tol must be a number of at least 0, not {entry['tol']!r}"
    yield from _cell_problems(entry["cell"], ROW_KEYS if metric in _OF_ROWS else CELL_KEYS)


def _cell_problems(cell: Any, keys: Sequence[str]) -> Iterator[str]:
    if not isinstance(cell, Mapping):
        yield f"cell must be an object, not {cell!r}"
        return
    if set(cell) != set(keys):
        yield f"cell must have the keys {', '.join(keys)}, not {', '.join(map(str, cell))}"
        return
    for key in ROW_KEYS:
        if not isinstance(cell[key], str) or not cell[key]:
            yield f"{key} must be a name, not {cell[key]!r}"
    if "attack" not in keys:
        return
    if cell["kind"] not in KINDS:
        yield f"kind must be one of {', '.join(KINDS)}, not {cell['kind']!r}"
    if cell["norm"] not in get_args(Norm):
        yield f"norm must be one of {', '.join(get_args(Norm))}, not {cell['norm']!r}"
    steps, eps = cell["steps"], cell["eps"]
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        yield f"steps must be a whole number of at least 0, not {steps!r}"
    if (cell["norm"] == "none") != (eps is None) or not (eps is None or _is_number(eps)):
        yield f"eps must be null for norm none and a number otherwise, not {eps!r}"
    if cell["attack"] == "prompt":
        if (cell["init"], cell["norm"], steps) != (None, "none", 0):
            yield "attack prompt has init null, norm none and 0 steps"
    elif cell["attack"] != "dori":
        yield f"attack must be prompt or dori, not {cell['attack']!r}"
    elif cell["init"] not in INITS:
        yield f"init must be one of {', '.join(INITS)}, not {cell['init']!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def check_claims(
    claims: Sequence[Claim],
    cells: Sequence[Cell],
    rows: Sequence[HeadlineRow],
    *,
    sweeps: Sequence[str] = (),
) -> tuple[Checked, ...]:
    """Hold claims against a table.

    Those about a sweep that is not among ``sweeps``, the sweeps that it was made of, are left out.
    """
    checked = []
    for claim in claims:
        if claim.sweep is not None and claim.sweep not in sweeps:
            continue
        measured = _measured(claim, cells, rows)
        checked.append(Checked(claim, measured, abs(measured - claim.value) <= claim.tol + 1e-12))
    return tuple(checked)


def _measured(claim: Claim, cells: Sequence[Cell], rows: Sequence[HeadlineRow]) -> float:
    wanted = claim.cell
    if claim.metric in _OF_ROWS:
        named = (wanted["checkpoint"], wanted["mitigation"])
        row = next((r for r in rows if (r.checkpoint, r.mitigation) == named), None)
        found: float = getattr(row, _OF_ROWS[claim.metric], math.nan)
        return found
    cell = next((c for c in cells if _is(c, wanted)), None)
    if cell is None:
        return math.nan
    return cell.mr if claim.metric == "mr" else cell.similarity_median


def _is(cell: Cell, wanted: Mapping[str, Any]) -> bool:
    condition, budget = cell.condition, cell.condition.budget
    own = (cell.checkpoint, cell.mitigation, condition.attack, condition.init, budget.norm,
           budget.steps, cell.kind)  # fmt: skip
    keys = ("checkpoint", "mitigation", "attack", "init", "norm", "steps", "kind")
    if own != tuple(wanted[key] for key in keys):
        return False
    if budget.eps is None or wanted["eps"] is None:
        return budget.eps is None and wanted["eps"] is None
    return math.isclose(budget.eps, wanted["eps"], rel_tol=1e-3)
