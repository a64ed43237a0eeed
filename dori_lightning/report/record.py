"""The record of an audit: what was found, how, on what, and the files that keep it.

``report.json`` is the contract with other tools, ``pairs.parquet`` keeps every picture's numbers,
so that no mean has to be believed.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dori_lightning.metrics.image_distances import KernelDistance
from dori_lightning.metrics.replication import (
    Aggregation,
    PairResult,
    Search,
    Trust,
    attack_trust,
    first_successes,
    headline_condition,
    pair_results,
    prompt_condition,
    search_of,
)
from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.metrics.utility import (
    Alignment,
    Comparison,
    DenoisingLoss,
    LossRow,
    PictureRow,
    Replicas,
    Utility,
)
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import (
    Budget,
    Calibration,
    Cell,
    Condition,
    FirstSuccess,
    InputError,
    Outcome,
    Pair,
)

Disclosure = Literal["full", "blurred", "none"]
"""How images may be shown; what blurring throws away is gone."""

NOT_KEPT = Path()
"""Stands for an image whose file is not where a run left it."""


@dataclass(frozen=True)
class AttackEffort:
    """Evaluations of the UNet, in rows, that the results rest on.

    What a resumed run did not do again is counted, and rows that only fill up a pass are not; what
    went through the UNet in one process is ``provenance.unet_evaluations``.

    Attributes:
        attack: Of the search: noise samples of every step taken.
        attack_saved: Of steps that stopped attacks did not take.
        pictures: Of drawing from embeddings found by the attack.
        pictures_saved: Of pictures of later budgets that stopped attacks did not draw.
    """

    attack: int
    attack_saved: int
    pictures: int
    pictures_saved: int


LOCALITY_FILE = "locality.json"


@dataclass(frozen=True)
class LocalityFigure:
    """One figure.

    Attributes:
        title: Heading.
        caption: What it shows and how to read it.
        uri: ``data:`` address.
        width: Pixels.
        height: Pixels.
        pictures: Whether it holds pictures, whose colours a dark page must leave alone.
    """

    title: str
    caption: str
    uri: str
    width: int
    height: int
    pictures: bool = False


@dataclass(frozen=True)
class LocalitySection:
    """What one locality run shows.

    Attributes:
        name: Its run folder's name.
        lead: Its answer in words, a paragraph a line; empty where it gives none.
        figures: Its figures, in its own order.
        withheld: How many figures hold pictures that may not be shown.
    """

    name: str
    lead: str
    figures: tuple[LocalityFigure, ...]
    withheld: int = 0


def is_locality(folder: Path) -> bool:
    """Whether a run folder holds the result of ``task=locality``."""
    return (folder / LOCALITY_FILE).is_file()


# -------- document
# The layout of ``report.json``, the contract with other tools.


def report_document(report: AuditReport) -> dict[str, Any]:
    """Build the content of ``report.json`` out of plain values; NaN becomes None.

    Raises:
        TypeError: The report holds something that JSON cannot.
    """
    document = {
        "schema_version": report.schema_version,
        "checkpoint": report.checkpoint,
        "mitigation": report.mitigation,
        "verdict": report.verdict,
        "invalid": list(report.invalid),
        "flags": [asdict(flag) for flag in report.flags],
        "cells": [_cell(cell) for cell in report.cells],
        "calibration": _calibration(report.calibration),
        "recommended_budget": asdict(report.recommended_budget)
        if report.recommended_budget
        else None,
        "pairs": _pairs(report),
        "utility": report.utility.to_dict() if report.utility else None,
        "effort": asdict(report.effort) if report.effort else None,
        "provenance": {**asdict(report.provenance), "config": redact(report.provenance.config)},
    }
    plain: dict[str, Any] = plain_values(document)
    return plain


def _condition(condition: Condition) -> dict[str, Any]:
    return {"attack": condition.attack, "init": condition.init, "budget": asdict(condition.budget)}


def _cell(cell: Cell) -> dict[str, Any]:
    row = {name: value for name, value in asdict(cell).items() if name != "condition"}
    spread = {"median": row.pop("similarity_median"), "mad": row.pop("similarity_mad")}
    return {**row, **_condition(cell.condition), "similarity": spread}


def _calibration(calibration: Calibration) -> dict[str, Any]:
    def quantiles(values: tuple[float, ...]) -> dict[str, float | int]:
        finite = np.array([v for v in values if math.isfinite(v)])
        levels = {"min": 0.0, "p05": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
        found = {
            name: float(np.quantile(finite, q)) if finite.size else math.nan
            for name, q in levels.items()
        }
        return {"n": int(finite.size), **found}

    return {
        "descriptor": calibration.descriptor,
        "threshold": calibration.threshold,
        "rule": calibration.rule,
        "auc": calibration.auc,
        "roc": [
            {"false_positive_rate": fpr, "true_positive_rate": tpr, "threshold": threshold}
            for fpr, tpr, threshold in calibration.roc
        ],
        "null": list(calibration.null),
        "ceiling": list(calibration.ceiling),
        "quantiles": {
            "null": quantiles(calibration.null),
            "ceiling": quantiles(calibration.ceiling),
        },
    }


def _pairs(report: AuditReport) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for result in report.pair_results:
        pair = result.pair
        row = rows.setdefault(
            pair.id,
            {
                "id": pair.id, "kind": pair.kind, "prompt": pair.prompt, "repeats": pair.repeats,
                "duplicate_of": pair.duplicate_of, "truncated": pair.truncated,
                "conditions": [],
            },
        )  # fmt: skip
        row["conditions"].append(
            {
                **_condition(result.condition), "status": result.status,
                "best_similarity": result.best, "statistic": result.statistic,
                "reproduced": result.reproduced,
            }
        )  # fmt: skip
    return list(rows.values())


def plain_values(value: Any) -> Any:
    """Turn a value into what JSON has; NaN and infinities become null.

    Raises:
        TypeError: JSON has nothing for it; writing its ``repr`` would hide that.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, Mapping):
        return {str(name): plain_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain_values(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds")
    raise TypeError(f"report.json cannot hold a {type(value).__name__}: {value!r}")


# -------- rows
# The long table behind the report: one row for every generated picture.

_COLUMNS: dict[str, pa.DataType] = {
    "checkpoint": pa.string(),
    "mitigation": pa.string(),
    "pair_id": pa.string(),
    "kind": pa.string(),
    "prompt": pa.string(),
    "repeats": pa.float64(),
    "duplicate_of": pa.string(),
    "truncated": pa.bool_(),
    "image_sha256": pa.string(),
    "attack": pa.string(),
    "init": pa.string(),
    "norm": pa.string(),
    "eps": pa.float64(),
    "steps": pa.int64(),
    "restart": pa.int64(),
    "status": pa.string(),
    "seed": pa.int64(),
    "descriptor": pa.string(),
    "threshold": pa.float64(),
    "diversity": pa.float64(),
    "lpips": pa.float64(),
    "alignment": pa.float64(),
    "loss_first": pa.float64(),
    "loss_last": pa.float64(),
    "displacement": pa.float64(),
    "stopped_at": pa.int64(),
    "first_success_steps": pa.int64(),
    "image": pa.string(),
    "original": pa.string(),
}


def pair_rows(report: AuditReport, folder: Path) -> list[dict[str, Any]]:
    """List every generated picture of a report: pair x condition x restart x seed.

    Each descriptor has a column. Outcomes of the baseline carry the mitigation ``none``.
    ``first_success_steps`` is one number for an attack (pair x init x restart), in all of its
    rows: the fewest steps looked at after which it reproduced the pair, null where it never did.
    ``stopped_at`` marks rows whose attack was stopped there, before the steps of the condition.

    Args:
        report: The report.
        folder: Paths of pictures and references are given relative to it.

    Raises:
        ValueError: An outcome has not as many similarities, or pictures, as seeds.
    """
    return [
        *(
            {**row, "first_success_steps": report.first_successes.get(search) if search else None}
            for outcome in report.outcomes
            for search in [search_of(outcome)]
            for row in _rows(outcome, report, report.mitigation, folder)
        ),
        *(r for o in report.baseline for r in _rows(o, report, "none", folder)),
    ]


def parquet_bytes(rows: Sequence[dict[str, Any]]) -> bytes:
    """Serialise rows of ``pair_rows``; a column keeps its type also where it holds no value."""
    names = sorted({name for row in rows for name in row if name.startswith("similarity_")})
    schema = pa.schema([*_COLUMNS.items(), *((name, pa.float64()) for name in names)])
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd")
    return sink.getvalue()


def _rows(
    outcome: Outcome, report: AuditReport, mitigation: str, folder: Path
) -> Iterator[dict[str, Any]]:
    pair, condition = outcome.pair, outcome.condition
    count = len(outcome.seeds)
    for name, values in outcome.similarity.items():
        if len(values) != count:
            raise ValueError(
                f"pair {pair.id} has {count} seeds but {len(values)} similarities of {name}"
            )
    if outcome.images and len(outcome.images) != count:
        raise ValueError(f"pair {pair.id} has {count} seeds but {len(outcome.images)} pictures")
    for place, seed in enumerate(outcome.seeds):
        yield {
            "checkpoint": report.checkpoint,
            "mitigation": mitigation,
            "pair_id": pair.id,
            "kind": pair.kind,
            "prompt": pair.prompt,
            "repeats": pair.repeats,
            "duplicate_of": pair.duplicate_of,
            "truncated": pair.truncated,
            "image_sha256": pair.sha256,
            "attack": condition.attack,
            "init": condition.init,
            "norm": condition.budget.norm,
            "eps": condition.budget.eps,
            "steps": condition.budget.steps,
            "restart": outcome.restart,
            "status": outcome.status,
            "seed": seed,
            "descriptor": report.calibration.descriptor,
            "threshold": report.calibration.threshold,
            "diversity": _number_rows(outcome.diversity),
            "lpips": _item(outcome.lpips, place),
            "alignment": _item(outcome.alignment, place),
            "loss_first": _number_rows(outcome.loss_first),
            "loss_last": _number_rows(outcome.loss_last),
            "displacement": _number_rows(outcome.displacement),
            "stopped_at": outcome.stopped_at,
            "image": _relative(outcome.images[place], folder) if outcome.images else None,
            "original": _relative(pair.image, folder),
            **{
                f"similarity_{name}": _number_rows(values[place])
                for name, values in outcome.similarity.items()
            },
        }


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(path, folder).replace(os.sep, "/")


def _item(values: np.ndarray | None, place: int) -> float | None:
    return None if values is None else _number_rows(values[place])


def _number_rows(value: float | None) -> float | None:
    """Parquet has a null of its own; NaN there would take part in means."""
    return None if value is None or math.isnan(value) else float(value)


# -------- stored
# Files of a run folder read back, or refused by name where they are damaged.


def stored_json(path: Path, *, fix: str, missing: str = "") -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        fix: End of the message, after what is wrong.
        missing: What it means that there is no such file; empty leaves that to the caller.

    Raises:
        InputError: It is not JSON, or is missing and ``missing`` says what that means.
        FileNotFoundError: It is missing and ``missing`` is empty.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not missing:
            raise
        raise InputError(f"{path} does not exist: {missing}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({error}){fix}") from None


def stored_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of an audit's parquet file.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path} cannot be read ({error})\n  fix:   run the audit again: it rewrites the file"
        ) from None
    return rows


# -------- record

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

    What follows from the stored fields (``own_cells`` to ``first_successes``) is computed once,
    on first use, and is not written to ``report.json``.

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

    @cached_property
    def own_cells(self) -> tuple[Cell, ...]:
        """Cells of the mitigation under audit, without those of the baseline."""
        return tuple(cell for cell in self.cells if cell.mitigation == self.mitigation)

    @cached_property
    def prompt_condition(self) -> Condition | None:
        """The prompts as they are; None where no image was generated from them."""
        return prompt_condition(self.own_cells)

    @cached_property
    def headline_condition(self) -> Condition | None:
        """The attack that the verdict speaks of; None where no attack was run."""
        return headline_condition(self.own_cells)

    @cached_property
    def trust(self) -> Trust:
        """What the controls say of that attack."""
        return attack_trust(self.own_cells, self.headline_condition)

    @cached_property
    def pair_results(self) -> tuple[PairResult, ...]:
        """One result per pair and condition under the mitigation."""
        return self._results(self.outcomes)

    @cached_property
    def baseline_results(self) -> tuple[PairResult, ...]:
        """One result per pair from its prompt before the mitigation."""
        return self._results(self.baseline)

    @cached_property
    def first_successes(self) -> dict[Search, int]:
        """Steps after which each attack first reproduced its pair; others are left out."""
        return first_successes(self.outcomes, self.calibration, self.aggregation)

    def _results(self, outcomes: Iterable[Outcome]) -> tuple[PairResult, ...]:
        return pair_results(
            outcomes,
            descriptor=self.calibration.descriptor,
            threshold=self.calibration.threshold,
            aggregation=self.aggregation,
        )


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
        fix=": run the audit again to rewrite it",
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


# -------- run_files
# What an audit left in its run folder, read back: the record, every similarity, the edit.

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
    found = stored_json(path, fix="\n  fix:   run the audit again: it rewrites it")
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
            f"different audits\n  fix:   run the audit again: it rewrites both"
        )


# -------- utility_files
# What a mitigation costs, as files: the numbers, and the rows behind them; written and read.

_LOSSES = pa.schema(
    {
        "id": pa.string(),
        "prompt": pa.string(),
        "draw": pa.int64(),
        "timestep": pa.int64(),
        "unmitigated": pa.float64(),
        "mitigated": pa.float64(),
    }
)
_PICTURES = pa.schema(
    {
        "kind": pa.string(),
        "id": pa.string(),
        "group": pa.string(),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "similarity": pa.float64(),
        "original_unmitigated": pa.float64(),
        "original_mitigated": pa.float64(),
        "alignment_unmitigated": pa.float64(),
        "alignment_mitigated": pa.float64(),
        "unmitigated": pa.string(),
        "mitigated": pa.string(),
    }
)


def write_utility(utility: Utility, folder: Path) -> Path:
    """Write ``utility_losses.parquet``, ``utility_pictures.parquet`` and ``utility.json``.

    The JSON file comes last: where it is new, the tables belong to it.

    Args:
        utility: What was measured.
        folder: The run folder. Picture paths are stored relative to it.

    Returns:
        Path of ``utility.json``.
    """
    document = json.dumps(
        plain_values(utility.to_dict()), sort_keys=True, indent=2, allow_nan=False
    )
    losses = _parquet(utility.loss_rows, _LOSSES, folder)
    pictures = _parquet(utility.picture_rows, _PICTURES, folder)
    write_atomically(folder / "utility_losses.parquet", losses)
    write_atomically(folder / "utility_pictures.parquet", pictures)
    return write_atomically(folder / "utility.json", (document + "\n").encode())


def read_utility(folder: Path, held: Mapping[str, Any]) -> Utility:
    """Read back what a mitigation costs; pictures that are gone are left out.

    Args:
        folder: The run folder, with ``utility_pictures.parquet``.
        held: What ``report.json`` keeps of it.

    Raises:
        InputError: The pictures' table is missing or damaged.
        KeyError: ``held`` lacks a promised key.
    """
    near, loss = held["neighbours"], held["denoising_loss"]
    replicas = near["replicating"] if near else None
    return Utility(
        descriptor=held["descriptor"],
        denoising_loss=DenoisingLoss(**_numbers(loss)) if loss else None,
        ordinary=_comparison(held) if held["prompts"] is not None else None,
        neighbours=_comparison(near) if near and near["prompts"] is not None else None,
        replicas=Replicas(**_numbers(replicas)) if replicas else None,
        left_out=held["left_out"],
        picture_rows=tuple(_picture_rows(folder)),
    )


def _comparison(held: Mapping[str, Any]) -> Comparison:
    kid, alignment = held["kid"], held["alignment"]
    known = _numbers(held)
    return Comparison(
        prompts=held["prompts"],
        pictures_each=held["pictures_each"],
        kid=KernelDistance(**_numbers({k: v for k, v in kid.items() if k != "features"}))
        if kid
        else None,
        fid=held["fid"],
        features=held["features"],
        similarity=known["similarity_to_unmitigated"],
        similarity_mad=known["similarity_to_unmitigated_mad"],
        similarity_ci95=known["similarity_to_unmitigated_ci95"],
        alignment=Alignment(**_numbers(alignment)) if alignment else None,
    )


def _numbers(held: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and intervals as they were before JSON, which writes NaN as null."""
    return {
        name: tuple(map(_finite, value)) if isinstance(value, list) else _finite(value)
        for name, value in held.items()
    }


def _finite(value: Any) -> Any:
    return math.nan if value is None else value


def _picture_rows(folder: Path) -> list[PictureRow]:
    rows = stored_rows(folder / "utility_pictures.parquet")
    places = ("unmitigated", "mitigated")
    found = [
        PictureRow(
            **{
                **row,
                "similarity": _finite(row["similarity"]),
                **{name: Path(os.path.normpath(folder / row[name])) for name in places},
            }
        )
        for row in rows
    ]
    return [row for row in found if row.unmitigated.is_file() and row.mitigated.is_file()]


def _parquet(rows: Sequence[LossRow | PictureRow], schema: pa.Schema, folder: Path) -> bytes:
    plain = [
        {name: _cell_utility_files(item, folder) for name, item in asdict(row).items()}
        for row in rows
    ]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(plain, schema=schema), sink, compression="zstd")
    return sink.getvalue()


def _cell_utility_files(value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return os.path.relpath(value, folder).replace(os.sep, "/")
    # parquet has a null of its own; NaN there would take part in means
    return None if isinstance(value, float) and math.isnan(value) else value


# -------- read_back
# An audit read back from its run folder, so that its page can be made again or for others.

_STRICT: tuple[Disclosure, ...] = ("full", "blurred", "none")


def read_audit(folder: Path) -> AuditReport:
    """Read a finished audit back; pictures that are gone are ``NOT_KEPT`` or left out.

    Args:
        folder: Its run folder.

    Raises:
        InputError: A file is missing or damaged, or lacks what this version writes.
    """
    return audit_of(read_run(folder))


def audit_of(run: Run) -> AuditReport:
    """Put a run's files together into the report that wrote them.

    Raises:
        InputError: ``report.json`` lacks what this version writes.
    """
    held = run.document
    try:
        return AuditReport(
            checkpoint=run.checkpoint,
            mitigation=run.mitigation,
            verdict=held["verdict"],
            cells=tuple(_cell_read_back(cell) for cell in held["cells"]),
            calibration=_calibration_read_back(held["calibration"]),
            outcomes=with_files_that_exist(run.outcomes),
            recommended_budget=_budget(held["recommended_budget"])
            if held["recommended_budget"]
            else None,
            flags=tuple(Flag(**flag) for flag in held["flags"]),
            provenance=_provenance(held["provenance"]),
            baseline=with_files_that_exist(run.baseline),
            utility=read_utility(run.folder, held["utility"]) if held.get("utility") else None,
            effort=AttackEffort(**held["effort"]) if held.get("effort") else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{run.folder / 'report.json'} lacks what this version writes "
            f"({type(error).__name__}: {error})\n  fix:   run the audit again: it rewrites it"
        ) from None


def strictest(runs: Iterable[Run], asked: Disclosure) -> Disclosure:
    """Choose how pictures may be shown: what is asked for, or what a run allowed if that is less.

    A run that was told to keep pictures out of its page must not see them in another one.
    """
    allowed = [run.config.get("report", {}).get("images", "full") for run in runs]
    return max((asked, *allowed), key=_STRICT.index)


def with_files_that_exist(outcomes: Iterable[Outcome]) -> tuple[Outcome, ...]:
    """Leave out pictures that are gone, and references that are gone or have changed since."""
    found: dict[Path, Path] = {}
    kept = []
    for outcome in outcomes:
        pair = outcome.pair
        if pair.image not in found:
            same = pair.image.is_file() and pair.sha256 in ("", _sha256(pair.image))
            found[pair.image] = pair.image if same else NOT_KEPT
        images = outcome.images if all(path.is_file() for path in outcome.images) else ()
        kept.append(replace(outcome, pair=replace(pair, image=found[pair.image]), images=images))
    return tuple(kept)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _number(value: float | None) -> float:
    """JSON has no NaN; the record writes null."""
    return math.nan if value is None else float(value)


def _interval(values: Sequence[float | None]) -> tuple[float, float]:
    low, high = values
    return _number(low), _number(high)


def _budget(held: Mapping[str, Any]) -> Budget:
    return Budget(held["norm"], held["eps"], held["steps"])


def _cell_read_back(held: Mapping[str, Any]) -> Cell:
    return Cell(
        checkpoint=held["checkpoint"],
        mitigation=held["mitigation"],
        condition=Condition(held["attack"], held["init"], _budget(held["budget"])),
        kind=held["kind"],
        n=held["n"],
        failed=held["failed"],
        hits=held["hits"],
        mr=_number(held["mr"]),
        mr_ci95=_interval(held["mr_ci95"]),
        similarity_median=_number(held["similarity"]["median"]),
        similarity_mad=_number(held["similarity"]["mad"]),
        descriptor=held["descriptor"],
        threshold=float(held["threshold"]),
        aggregation=held["aggregation"],
        # records of earlier versions have neither
        counted=held.get("counted", "at_budget"),
        first_success=_first_success(held.get("first_success")),
    )


def _first_success(held: Mapping[str, Any] | None) -> FirstSuccess | None:
    if held is None:
        return None
    return FirstSuccess(
        held["pairs"], held["n"], _number(held["mr"]), _number(held["median_steps"])
    )


def _calibration_read_back(held: Mapping[str, Any]) -> Calibration:
    return Calibration(
        descriptor=held["descriptor"],
        threshold=float(held["threshold"]),
        rule=held["rule"],
        # records of earlier versions keep their quantiles only
        null=tuple(map(_number, held.get("null", ()))),
        ceiling=tuple(map(_number, held.get("ceiling", ()))),
        auc=_number(held["auc"]),
        roc=tuple(
            (
                point["false_positive_rate"],
                point["true_positive_rate"],
                # the first point lies above every similarity
                math.inf if point["threshold"] is None else point["threshold"],
            )
            for point in held["roc"]
        ),
    )


def _provenance(held: Mapping[str, Any]) -> Provenance:
    times = {name: datetime.fromisoformat(held[name]) for name in ("started", "finished")}
    return Provenance(**{**held, **times, "config": json.loads(json.dumps(held["config"]))})
