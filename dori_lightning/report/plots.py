"""The figures of a report with their captions, for the page and for the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from dori_lightning.files import write_atomically
from dori_lightning.report.figures import (
    memorization_against_repeats,
    picture_grid,
    rate_against_steps,
    roc,
    similarity_histograms,
)
from dori_lightning.report.style import Ink
from dori_lightning.report.summary import headline_condition, pair_results, prompt_condition

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.record import AuditReport
    from dori_lightning.report.summary import PairResult
    from dori_lightning.types import Condition

    Drawing = Callable[[Ink], bytes | None]

__all__ = ["Plot", "drawn_for_page", "page_plots", "write_figures"]

GRID_ROWS = 12
"""Rows of the picture grid; more would not fit a screen."""


@dataclass(frozen=True)
class Plot:
    """One figure on the page.

    Attributes:
        name: Stable name, also of its file.
        title: Heading.
        caption: What it shows and how to read it.
        wide: SVG element for screens and paper.
        narrow: SVG element for telephones.
    """

    name: str
    title: str
    caption: str
    wide: Markup
    narrow: Markup


_TEXTS = {
    "rate_against_steps": (
        "What the attack may spend",
        "Share of images that come back, against the attack's steps; the bars are 95 % intervals. "
        "With enough steps an attack paints anything: the number of steps at which the controls "
        "begin to rise is where the attack stops being evidence.",
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
        "here because the images were planted. Filled: from the prompts; open: from the attack; a "
        "dash is the median.",
    ),
}


def page_plots(report: AuditReport) -> dict[str, Plot | None]:
    """Draw every figure by name; None where one has nothing to show."""
    return drawn_for_page(_drawings(report), _TEXTS)


def drawn_for_page(
    drawings: Mapping[str, Drawing], texts: Mapping[str, tuple[str, str]]
) -> dict[str, Plot | None]:
    """Draw figures wide and narrow, with title and caption; None where one has nothing to show.

    Args:
        drawings: Name to what draws it.
        texts: Name to title and caption.
    """
    plots: dict[str, Plot | None] = dict.fromkeys(texts)
    for name, draw in drawings.items():
        wide = draw(Ink(element=name))
        narrow = draw(Ink(element=f"{name}-narrow", narrow=True))
        if wide is not None and narrow is not None:
            title, caption = texts[name]
            # drawn by us out of numbers and escaped names: this is markup, not text
            plots[name] = Plot(
                name, title, caption, Markup(wide.decode()), Markup(narrow.decode())
            )
    return plots


def write_figures(
    report: AuditReport, folder: Path, *, images: Disclosure = "full"
) -> tuple[Path, ...]:
    """Write every figure that has something to show as PNG into ``folder/figures``."""
    target = folder / "figures"
    target.mkdir(parents=True, exist_ok=True)
    drawn = {name: draw(Ink()) for name, draw in _drawings(report).items()}
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


def _drawings(report: AuditReport) -> dict[str, Drawing]:
    spoken, results = _own(report)
    conditions = [condition for condition in spoken if condition is not None]
    rule = report.calibration
    own = [cell for cell in report.cells if cell.mitigation == report.mitigation]
    return {
        "rate_against_steps": lambda ink: rate_against_steps(own, ink),
        "similarity_histograms": lambda ink: similarity_histograms(
            results, ink, conditions=conditions, calibration=rule
        ),
        "roc": lambda ink: roc(rule, ink),
        "memorization_against_repeats": lambda ink: memorization_against_repeats(
            results, ink, conditions=conditions, threshold=rule.threshold
        ),
    }
