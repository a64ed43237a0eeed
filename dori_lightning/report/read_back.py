"""An audit read back from its run folder, so that its page can be made again or for others."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from dori_lightning.report.effort import AttackEffort
from dori_lightning.report.pictures import NOT_KEPT
from dori_lightning.report.record import AuditReport, Flag, Provenance
from dori_lightning.report.run_files import read_run
from dori_lightning.report.utility_files import read_utility
from dori_lightning.types import Budget, Calibration, Cell, Condition, FirstSuccess, InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.run_files import Run
    from dori_lightning.types import Outcome

__all__ = ["audit_of", "read_audit", "strictest", "with_files_that_exist"]

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
            cells=tuple(_cell(cell) for cell in held["cells"]),
            calibration=_calibration(held["calibration"]),
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
            f"({type(error).__name__}: {error})\n  mend:  run the audit again: it rewrites it"
        ) from None


def strictest(runs: Iterable[Run], asked: Disclosure) -> Disclosure:
    """Choose how pictures may be shown: what is asked for, or what a run allowed if that is less.

    A run that was told to keep pictures out of its page must not see them in another one.
    """
    allowed = [run.config.get("report", {}).get("images", "full") for run in runs]
    return max((asked, *allowed), key=_STRICT.index)


def with_files_that_exist(outcomes: Iterable[Outcome]) -> tuple[Outcome, ...]:
    """Leave out pictures that are gone, and originals that are gone or have changed since."""
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


def _cell(held: Mapping[str, Any]) -> Cell:
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


def _calibration(held: Mapping[str, Any]) -> Calibration:
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
