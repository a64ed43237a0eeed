"""The figures of a report with their captions, for the page and for the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori_lightning.files import write_atomically
from dori_lightning.report.figures import (
    memorization_against_repeats,
    picture_grid,
    rate_against_steps,
    roc,
    similarity_histograms,
)
from dori_lightning.report.pictures import png_uri
from dori_lightning.report.summary import headline_condition, pair_results, prompt_condition

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.record import AuditReport
    from dori_lightning.report.summary import PairResult
    from dori_lightning.types import Condition

__all__ = ["Plot", "page_plots", "write_figures"]

GRID_ROWS = 12
"""Rows of the picture grid; more would not fit a screen."""


@dataclass(frozen=True)
class Plot:
    """One figure on the page.

    Attributes:
        name: Stable name, also of its file.
        title: Heading.
        caption: What it shows and how to read it.
        light: ``data:`` address for a light page and for paper.
        dark: ``data:`` address for a dark page.
    """

    name: str
    title: str
    caption: str
    light: str
    dark: str


_TEXTS = {
    "rate_against_steps": (
        "How much the attack is allowed to spend",
        "Share of images that come back, against the attack's steps; the bands are 95 % "
        "intervals. With enough steps an attack paints anything: the number of steps at which the "
        "controls begin to rise is where the attack stops being evidence.",
    ),
    "similarity_histograms": (
        "How similar the pictures are",
        "Number of pairs at each similarity. A threshold is sound where it falls into an empty "
        "stretch between the controls and the reproduced images.",
    ),
    "roc": (
        "Can the measure tell the two apart?",
        "For every possible threshold: suspected images above it, against controls above it, both "
        "from their prompts. A curve through the upper left corner separates them without error.",
    ),
    "memorization_against_repeats": (
        "Repetition and memorization",
        "Similarity of the pictures against how often each image was repeated in training; known "
        "here because the images were planted. Filled: from the prompts; open: from the attack.",
    ),
}


def page_plots(report: AuditReport) -> list[Plot]:
    """Draw every figure that has something to show, in the order of the page."""
    plots = []
    for name, draw in _drawings(report).items():
        light, dark = draw(False), draw(True)
        if light is not None and dark is not None:
            title, caption = _TEXTS[name]
            plots.append(Plot(name, title, caption, png_uri(light), png_uri(dark)))
    return plots


def write_figures(
    report: AuditReport, folder: Path, *, images: Disclosure = "full"
) -> tuple[Path, ...]:
    """Write every figure that has something to show as PNG into ``folder/figures``."""
    target = folder / "figures"
    target.mkdir(parents=True, exist_ok=True)
    drawn = {name: draw(False) for name, draw in _drawings(report).items()}
    own, results = _own(report)
    grid = [
        (_pick(results, pair_id, own[0]), _pick(results, pair_id, own[1]))
        for pair_id in list(dict.fromkeys(r.pair.id for r in results))[:GRID_ROWS]
    ]
    drawn["picture_grid"] = picture_grid(
        grid, threshold=report.calibration.threshold, disclosure=images
    )
    return tuple(
        write_atomically(target / f"{name}.png", data)
        for name, data in drawn.items()
        if data is not None
    )


def _own(
    report: AuditReport,
) -> tuple[tuple[Condition | None, Condition | None], list[PairResult]]:
    own = [cell for cell in report.cells if cell.mitigation == report.mitigation]
    results = pair_results(
        report.outcomes,
        descriptor=report.calibration.descriptor,
        threshold=report.calibration.threshold,
        aggregation=report.aggregation,
    )
    return (prompt_condition(own), headline_condition(own)), results


def _pick(
    results: list[PairResult], pair_id: str, condition: Condition | None
) -> PairResult | None:
    return next((r for r in results if r.pair.id == pair_id and r.condition == condition), None)


def _drawings(report: AuditReport) -> dict[str, Callable[[bool], bytes | None]]:
    spoken, results = _own(report)
    conditions = [condition for condition in spoken if condition is not None]
    rule = report.calibration
    own = [cell for cell in report.cells if cell.mitigation == report.mitigation]
    return {
        "rate_against_steps": lambda dark: rate_against_steps(own, dark=dark),
        "similarity_histograms": lambda dark: similarity_histograms(
            results, conditions=conditions, calibration=rule, dark=dark
        ),
        "roc": lambda dark: roc(rule, dark=dark),
        "memorization_against_repeats": lambda dark: memorization_against_repeats(
            results, conditions=conditions, threshold=rule.threshold, dark=dark
        ),
    }
