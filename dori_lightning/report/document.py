"""The layout of ``report.json``, the contract with other tools."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dori_lightning.redaction import redact
from dori_lightning.report.summary import pair_results

if TYPE_CHECKING:
    from dori_lightning.report.record import AuditReport
    from dori_lightning.types import Calibration, Cell, Condition

__all__ = ["plain_values", "report_document"]


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
    rule = report.calibration
    rows: dict[str, dict[str, Any]] = {}
    for result in pair_results(
        report.outcomes,
        descriptor=rule.descriptor,
        threshold=rule.threshold,
        aggregation=report.aggregation,
    ):
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
