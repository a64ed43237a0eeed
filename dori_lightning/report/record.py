"""The record of an audit: what was found, how, on what, and the files that keep it.

``report.json`` is the contract with other tools, ``pairs.parquet`` keeps every picture's numbers,
so that no mean has to be believed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dori_lightning.files import write_atomically
from dori_lightning.redaction import redact
from dori_lightning.report.document import report_document
from dori_lightning.report.rows import pair_rows, parquet_bytes
from dori_lightning.report.stored import stored_json
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from dori_lightning.metrics.utility import Utility
    from dori_lightning.report.effort import AttackEffort
    from dori_lightning.report.summary import Aggregation
    from dori_lightning.types import Budget, Calibration, Cell, Outcome

__all__ = [
    "SCHEMA_VERSION",
    "AuditReport",
    "Flag",
    "Provenance",
    "read_report",
    "redact",
    "write_report",
]

SCHEMA_VERSION = 1

_TOP_KEYS = (
    "schema_version", "checkpoint", "mitigation", "verdict", "flags", "cells", "calibration",
    "recommended_budget", "pairs", "provenance",
)  # fmt: skip
_CELL_KEYS = (
    "checkpoint", "mitigation", "attack", "init", "budget", "kind", "n", "mr", "mr_ci95",
    "similarity", "descriptor", "threshold",
)  # fmt: skip


Severity = Literal["info", "warning", "critical", "invalid"]


@dataclass(frozen=True)
class Flag:
    """One thing that limits what the numbers mean.

    Attributes:
        name: Stable identifier, such as ``controls_replicate``.
        severity: ``invalid`` takes from the audit what it was made for: whatever did not come
            back says nothing. ``critical`` makes the verdict unreliable, ``warning`` weakens it,
            ``info`` explains.
        text: One sentence for a reader.
    """

    name: str
    severity: Severity
    text: str


@dataclass(frozen=True)
class Provenance:
    """Where the numbers come from.

    Attributes:
        git_sha: Commit of the code, None outside a checkout.
        packages: Package name to version.
        python: Version of the interpreter.
        platform: Operating system and architecture, without the machine's name.
        device: Device the model ran on, in words.
        seed: Root seed.
        config: Resolved configuration, already redacted.
        checkpoint: Name of the checkpoint.
        fingerprint: Hash of its weights.
        image_hashes: Pair id to SHA-256 of the picture's file.
        started: Start, UTC.
        finished: End, UTC.
        unet_evaluations: Forward passes of the UNet, in rows.
        wall_seconds: Seconds from start to end.
    """

    git_sha: str | None
    packages: dict[str, str]
    python: str
    platform: str
    device: str
    seed: int
    config: dict[str, Any]
    checkpoint: str
    fingerprint: str
    image_hashes: dict[str, str]
    started: datetime
    finished: datetime
    unet_evaluations: int
    wall_seconds: float


@dataclass(frozen=True)
class AuditReport:
    """Everything that an audit found.

    Attributes:
        checkpoint: Name of the checkpoint.
        mitigation: Name of the mitigation; ``none`` for the checkpoint as it is.
        verdict: One paragraph for a reader who is not an engineer.
        cells: Rows of the answer.
        calibration: How the threshold was set.
        outcomes: Every pair under every condition.
        recommended_budget: Largest budget that leaves the controls alone, None where there is
            none.
        flags: What limits the numbers' meaning.
        provenance: Where they come from.
        baseline: Outcomes of the same prompts before the mitigation; empty where they were not
            measured.
        utility: What the mitigation costs; None where it was not measured.
        effort: What the attack took; None in records of earlier versions.
        schema_version: Version of the layout of ``report.json``.
    """

    checkpoint: str
    mitigation: str
    verdict: str
    cells: tuple[Cell, ...]
    calibration: Calibration
    outcomes: tuple[Outcome, ...]
    recommended_budget: Budget | None
    flags: tuple[Flag, ...]
    provenance: Provenance
    baseline: tuple[Outcome, ...] = field(default=())
    utility: Utility | None = None
    effort: AttackEffort | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def invalid(self) -> tuple[str, ...]:
        """Names of the flags that make the audit invalid; empty where it is valid."""
        return tuple(flag.name for flag in self.flags if flag.severity == "invalid")

    @property
    def aggregation(self) -> Aggregation:
        """How K pictures become one number, as in the cells; ``max`` without cells."""
        return self.cells[0].aggregation if self.cells else "max"


def write_report(report: AuditReport, folder: Path) -> Path:
    """Write ``report.json`` and ``pairs.parquet``.

    Both are serialised before either file is touched, and ``report.json`` comes last: where it is
    new, the parquet file belongs to it.

    Args:
        report: What to write.
        folder: The run folder; made if needed. Picture paths are stored relative to it.

    Returns:
        Path of ``report.json``.

    Raises:
        TypeError: The configuration holds something that JSON cannot.
    """
    document = json.dumps(report_document(report), sort_keys=True, indent=2, allow_nan=False)
    table = parquet_bytes(pair_rows(report, folder))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "pairs.parquet", table)
    return write_atomically(folder / "report.json", (document + "\n").encode())


def read_report(folder: Path) -> dict[str, Any]:
    """Read a run folder's ``report.json`` back.

    Raises:
        InputError: It is missing, is not JSON, is of another schema version, or lacks a promised
            key.
    """
    path = folder / "report.json"
    document = stored_json(
        path,
        mend=": run the audit again to rewrite it",
        missing="the run has not finished, or this is no run folder",
    )
    if not isinstance(document, dict) or "schema_version" not in document:
        raise InputError(f"{path} has no schema_version: it was not written by an audit")
    if document["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema_version {document['schema_version']!r}, this version reads "
            f"{SCHEMA_VERSION}: run the audit again, or install the version that wrote it"
        )
    missing = [key for key in _TOP_KEYS if key not in document]
    cells = document.get("cells", [])
    if not isinstance(cells, list):
        raise InputError(f"{path}: cells must be a list, it is of type {type(cells).__name__}")
    for place, cell in enumerate(cells):
        held = cell if isinstance(cell, dict) else {}
        missing += [f"cells[{place}].{key}" for key in _CELL_KEYS if key not in held]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: run the audit again to rewrite it")
    return document
