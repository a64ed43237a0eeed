"""What a locality run tells the loggers.

Curves: ``locality/rate/{start}/{held}`` and its interval against ``locality/steps``, and
``locality/line_rate/{toward}`` against ``locality/percent_of_line``. Tables:
``locality/transfers`` (success on other models) and ``locality/weights`` (agreement of the
selected sets by layer). Every figure, and the record with its page as an artifact. No picture of
an image is among them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from dori_lightning.locality.estimates import Rate
    from dori_lightning.locality.large import AtLarge
    from dori_lightning.locality.weights import WeightFindings
    from dori_lightning.report.locality.record import LocalityReport
    from dori_lightning.tracking.tracker import Tracker

__all__ = ["track_locality"]

_TRANSFERS = ("model", "searched", "images", "start", "hits", "asked", "rate", "low", "high")
_WEIGHTS = (
    "method", "parameter", "group", "sets", "smallest", "largest", "iou", "iou_between",
    "iou_nonempty", "chance", "both_empty",
)  # fmt: skip


def track_locality(
    tracker: Tracker, report: LocalityReport, folder: Path, *, objective: float | None
) -> None:
    """Log what a locality run found, once, at its end.

    Args:
        tracker: Loggers of the run.
        report: What was found; its files are in ``folder`` already.
        folder: Run folder.
        objective: What sweepers compare runs by; None where there is nothing to compare.
    """
    if not tracker.loggers:
        return
    figures = sorted(folder.glob("figures/locality_*.png"))
    if report.at_large is not None:
        tracker.scalars(_by_steps(report.at_large), step_metric="locality/steps")
        tracker.scalars(_by_place(report.at_large), step_metric="locality/percent_of_line")
        tracker.table("locality/transfers", _TRANSFERS, _transfers(report.at_large))
    if report.weights is not None:
        tracker.table("locality/weights", _WEIGHTS, _selections(report.weights))
    for path in figures:
        with Image.open(path) as figure:
            tracker.pictures(f"locality/{path.stem}", figure, caption=path.stem)
    tracker.summary({"final/objective": objective})
    found = [*folder.glob("locality.*"), *folder.glob("figures/*")]
    tracker.artifact(
        f"{report.checkpoint}-{report.mitigation}-locality",
        kind="report",
        files={path.relative_to(folder).as_posix(): path for path in found},
    )


def _by_steps(found: AtLarge) -> Iterator[tuple[int, Mapping[str, float]]]:
    rows: dict[int, dict[str, float]] = {}
    for point in found.budget:
        if point.rate.n:
            row = rows.setdefault(point.steps, {})
            row.update(_with_interval("rate", f"{point.start}/{point.held}", point.rate))
    yield from sorted(rows.items())


def _by_place(found: AtLarge) -> Iterator[tuple[int, Mapping[str, float]]]:
    rows: dict[int, dict[str, float]] = {}
    for point in found.lines:
        if point.rate.n:
            row = rows.setdefault(round(100 * point.place), {})
            row.update(_with_interval("line_rate", point.toward, point.rate))
    yield from sorted(rows.items())


def _with_interval(name: str, where: str, rate: Rate) -> dict[str, float]:
    low, high = rate.ci95
    return {
        f"locality/{name}/{where}": rate.rate,
        f"locality/{name}_low/{where}": low,
        f"locality/{name}_high/{where}": high,
    }


def _transfers(found: AtLarge) -> list[list[object]]:
    return [
        [
            own.model, own.searched, own.held, own.start, own.rate.hits, own.rate.n,
            *map(_finite, (own.rate.rate, *own.rate.ci95)),
        ]
        for own in found.transfers
    ]  # fmt: skip


def _selections(found: WeightFindings) -> list[list[object]]:
    return [
        [
            own.method, own.parameter, own.group, own.count, own.smallest, own.largest,
            *map(_finite, (own.iou.value, own.iou_between.value, own.iou_nonempty, own.chance)),
            own.both_empty,
        ]
        for own in found.layers
    ]  # fmt: skip


def _finite(value: float) -> float | None:
    """A number, or None where there was nothing to average."""
    return value if math.isfinite(value) else None
