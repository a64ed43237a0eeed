"""The page's table of numbers: every cell in words, with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori_lightning.report.summary import (
    KIND_WORDS,
    condition_words,
    headline_condition,
    interval_words,
    percent_words,
    prompt_condition,
)
from dori_lightning.report.tables import ranked_cells

if TYPE_CHECKING:
    from dori_lightning.report.record import AuditReport
    from dori_lightning.types import Counted

__all__ = ["NumberGroup", "NumberRow", "number_groups"]


_STOPPED: dict[Counted, str] = {"up_to_budget": ", or fewer where that was enough"}


@dataclass(frozen=True)
class NumberRow:
    """One condition.

    Attributes:
        asked: How the images were asked for.
        reproduced: Images reproduced, of those measured, and what failed.
        rate: Memorization rate.
        interval: Its 95 % interval.
        centre: The rate in percent, None where there is none.
        low: Lower end of the interval in percent.
        high: Upper end in percent.
        similarity: Median and median absolute deviation.
        threshold: Similarity above which a picture counts.
        spoken: Whether the verdict speaks of it.
    """

    asked: str
    reproduced: str
    rate: str
    interval: str
    centre: float | None
    low: float
    high: float
    similarity: str
    threshold: str
    spoken: bool


@dataclass(frozen=True)
class NumberGroup:
    """The rows of one kind of pair under one mitigation.

    Attributes:
        title: Which images, and under which mitigation.
        rows: Its conditions.
    """

    title: str
    rows: tuple[NumberRow, ...]


def number_groups(report: AuditReport) -> list[NumberGroup]:
    """Write every cell in words, grouped by mitigation and kind of pair."""
    own = [cell for cell in report.cells if cell.mitigation == report.mitigation]
    spoken = (prompt_condition(own), headline_condition(own))
    several = len({cell.mitigation for cell in report.cells}) > 1
    groups: dict[str, list[NumberRow]] = {}
    for cell in ranked_cells(report.cells):
        title = f"{KIND_WORDS[cell.kind].capitalize()}s"
        if title.endswith("ys"):
            title = f"{title[:-2]}ies"
        if several:
            before = "without the mitigation" if cell.mitigation == "none" else cell.mitigation
            title += f", {before}"
        low, high = (0.0 if math.isnan(bound) else 100 * bound for bound in cell.mr_ci95)
        failed = f", {cell.failed} failed" if cell.failed else ""
        groups.setdefault(title, []).append(
            NumberRow(
                asked=condition_words(cell.condition) + _STOPPED.get(cell.counted, ""),
                reproduced=f"{cell.hits} of {cell.n}{failed}",
                rate=percent_words(cell.mr),
                interval=interval_words(cell.mr_ci95),
                centre=None if math.isnan(cell.mr) else 100 * cell.mr,
                low=low,
                high=high,
                similarity="n/a"
                if math.isnan(cell.similarity_median)
                else f"{cell.similarity_median:.2f} ± {cell.similarity_mad:.2f}",
                threshold=f"{cell.threshold:.2f}",
                spoken=cell.mitigation == report.mitigation and cell.condition in spoken,
            )
        )
    return [NumberGroup(title, tuple(rows)) for title, rows in groups.items()]
