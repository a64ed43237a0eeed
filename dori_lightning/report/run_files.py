"""What an audit left in its run folder, read back: the record, every similarity, the edit."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.report.record import read_report
from dori_lightning.report.stored import stored_json, stored_rows
from dori_lightning.types import Budget, Calibration, Condition, InputError, Outcome, Pair

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["EDIT_FILE", "Run", "read_run"]

EDIT_FILE = "edit.json"
_PREFIX = "similarity_"


@dataclass(frozen=True)
class Run:
    """One finished audit.

    Attributes:
        folder: Its run folder.
        document: Content of its ``report.json``.
        outcomes: Every pair under every condition, as measured.
        edit: Content of its ``edit.json``; None where there is none.
        baseline: Its prompts before the mitigation; empty where they were not asked.
    """

    folder: Path
    document: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    edit: Mapping[str, Any] | None = None
    baseline: tuple[Outcome, ...] = ()

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint."""
        return str(self.document["checkpoint"])

    @property
    def mitigation(self) -> str:
        """Name of the mitigation."""
        return str(self.document["mitigation"])

    @property
    def fingerprint(self) -> str:
        """Hash of the checkpoint's weights."""
        return str(self.document["provenance"]["fingerprint"])

    @property
    def config(self) -> Mapping[str, Any]:
        """Resolved configuration of the run."""
        held: Mapping[str, Any] = self.document["provenance"]["config"]
        return held

    @property
    def aggregation(self) -> Any:
        """How K pictures become one number."""
        own = self.own_cells
        return own[0].get("aggregation", "max") if own else "max"

    @property
    def own_cells(self) -> list[Mapping[str, Any]]:
        """Cells of this run's mitigation, under the run's own threshold."""
        return [c for c in self.document["cells"] if c["mitigation"] == self.mitigation]

    @property
    def descriptors(self) -> frozenset[str]:
        """Descriptors that every picture was measured with."""
        names = [frozenset(outcome.similarity) for outcome in self.outcomes]
        return frozenset.intersection(*names) if names else frozenset()

    def calibration(self) -> Calibration:
        """Threshold that the run calibrated for itself; the samples behind it are not kept."""
        rule = self.document["calibration"]
        auc = rule.get("auc")
        return Calibration(
            descriptor=rule["descriptor"],
            threshold=float(rule["threshold"]),
            rule=rule["rule"],
            null=(),
            ceiling=(),
            auc=math.nan if auc is None else float(auc),
            roc=(),
        )


def read_run(folder: Path) -> Run:
    """Read a finished run folder.

    Args:
        folder: Holds ``report.json`` and ``pairs.parquet``.

    Raises:
        InputError: A file is missing or damaged, or the two do not belong together.
    """
    document = read_report(folder)
    rows = stored_rows(folder / "pairs.parquet")
    mitigation = str(document["mitigation"])
    run = Run(
        folder,
        document,
        _outcomes(rows, mitigation, folder),
        _edit(folder),
        _outcomes(rows, "none", folder) if mitigation != "none" else (),
    )
    _check_same_audit(run)
    return run


def _edit(folder: Path) -> Mapping[str, Any] | None:
    path = folder / EDIT_FILE
    if not path.is_file():
        return None
    found = stored_json(path, mend="\n  mend:  run the audit again: it rewrites it")
    return found if isinstance(found, dict) else None


def _outcomes(
    rows: Sequence[Mapping[str, Any]], mitigation: str, folder: Path
) -> tuple[Outcome, ...]:
    """Put the rows of one picture each together again, in the order of the file."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["mitigation"] == mitigation:
            names = ("pair_id", "attack", "init", "norm", "eps", "steps", "restart")
            groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return tuple(_outcome(group, folder) for group in groups.values())


def _outcome(group: Sequence[Mapping[str, Any]], folder: Path) -> Outcome:
    first = group[0]
    pair = Pair(
        id=first["pair_id"],
        kind=first["kind"],
        prompt=first["prompt"],
        image=_place(folder, first.get("original")) or Path(),
        repeats=first["repeats"] or 0.0,
        sha256=first["image_sha256"] or "",
        duplicate_of=first["duplicate_of"],
        truncated=bool(first.get("truncated")),
    )
    budget = Budget(first["norm"], first["eps"], first["steps"])
    names = [name for name in first if name.startswith(_PREFIX)]
    return Outcome(
        pair=pair,
        condition=Condition(first["attack"], first["init"], budget),
        restart=first["restart"],
        status=first["status"],
        seeds=tuple(row["seed"] for row in group),
        similarity={
            name.removeprefix(_PREFIX): np.array(
                [math.nan if row[name] is None else row[name] for row in group], np.float64
            )
            for name in names
        },
        diversity=math.nan if first["diversity"] is None else first["diversity"],
        loss_first=first["loss_first"],
        loss_last=first["loss_last"],
        lpips=_values(group, "lpips"),
        alignment=_values(group, "alignment"),
        displacement=first["displacement"],
        images=tuple(filter(None, (_place(folder, row["image"]) for row in group))),
        stopped_at=first.get("stopped_at"),
    )


def _values(group: Sequence[Mapping[str, Any]], name: str) -> np.ndarray | None:
    """One number for each picture; None where none has one."""
    values = [row[name] for row in group]
    if all(value is None for value in values):
        return None
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _place(folder: Path, relative: str | None) -> Path | None:
    return None if relative is None else Path(os.path.normpath(folder / relative))


def _check_same_audit(run: Run) -> None:
    """Count anew under the run's own threshold: the record must say the same.

    Raises:
        InputError: It does not; the two files come from different audits.
    """
    counted = {
        (c.condition.attack, c.condition.init, c.condition.budget.norm, c.condition.budget.eps,
         c.condition.budget.steps, c.kind): (c.hits, c.n)
        for c in cells_of(
            run.outcomes, run.calibration(), checkpoint=run.checkpoint,
            mitigation=run.mitigation, aggregation=run.aggregation,
        )
    }  # fmt: skip
    recorded = {
        (c["attack"], c["init"], c["budget"]["norm"], c["budget"]["eps"], c["budget"]["steps"],
         c["kind"]): (c.get("hits"), c["n"])
        for c in run.own_cells
    }  # fmt: skip
    if counted != recorded:
        raise InputError(
            f"{run.folder}: report.json and pairs.parquet do not say the same, so they come from "
            f"different audits\n  mend:  run the audit again: it rewrites both"
        )
