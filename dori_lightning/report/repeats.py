"""The figure of planted data: how often a picture was shown, against how well it is remembered."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.transforms import ScaledTranslation

from dori_lightning.report.style import (
    Ink,
    new_figure,
    plain_axes,
    rendered,
    styled,
    under_legend,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes

    from dori_lightning.report.summary import PairResult
    from dori_lightning.types import Condition, Kind

__all__ = ["memorization_against_repeats", "repeats_by_mitigation"]

_APART = 7.0
"""Points between the marks of prompts and attack at the same multiplicity."""


def memorization_against_repeats(
    results: Sequence[PairResult],
    ink: Ink | None = None,
    *,
    conditions: Sequence[Condition],
    threshold: float,
    kind: Kind = "vm",
) -> bytes | None:
    """Draw similarity against how often a picture was planted in the training stream.

    Filled marks are pictures from prompts, open ones those of the attack; a dash is the median of
    a multiplicity.

    Returns:
        The figure, None where no pair has repetitions.
    """
    panels = {"": (results, conditions)}
    return _sheet(panels, ink or Ink(), threshold=threshold, kind=kind)


def repeats_by_mitigation(
    rows: Mapping[str, tuple[Sequence[PairResult], Sequence[Condition]]],
    ink: Ink | None = None,
    *,
    threshold: float,
    kind: Kind = "vm",
) -> bytes | None:
    """Draw the same for several mitigations, a panel each.

    Args:
        rows: Label of the mitigation to its results and the conditions to show.
        ink: How to draw.
        threshold: Similarity above which a picture counts as a replica.
        kind: Kind of pair.

    Returns:
        The figure, None where no pair has repetitions.
    """
    return _sheet(rows, ink or Ink(), threshold=threshold, kind=kind)


def _sheet(
    rows: Mapping[str, tuple[Sequence[PairResult], Sequence[Condition]]],
    ink: Ink,
    *,
    threshold: float,
    kind: Kind,
) -> bytes | None:
    panels = {
        label: ([r for r in results if _counts(r, conditions, kind)], conditions)
        for label, (results, conditions) in rows.items()
    }
    panels = {label: panel for label, panel in panels.items() if panel[0]}
    if not panels:
        return None
    # four small panels beside each other on a screen, two on a telephone
    columns = min(len(panels), 2 if ink.narrow else 4)
    lines = math.ceil(len(panels) / columns)
    low = min(0.0, *(r.statistic for shown, _ in panels.values() for r in shown))
    with styled(ink):
        size = (ink.width(6.8), 3.4) if len(panels) == 1 else (ink.width(9.4), 2.4 * lines + 0.7)
        figure = new_figure(*size)
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (label, (shown, conditions)) in zip(grid.flat, panels.items(), strict=False):
            _panel(axes, shown, conditions, ink, threshold=threshold, kind=kind)
            axes.set_ylim(low - 0.05, 1.05)
            axes.set_title(_short(label, 17 if columns > 1 else 60), fontsize=9.5)
        several = len(panels) > 1
        for axes in grid[-1]:
            axes.set_xlabel("repetitions" if several else "relative number of repetitions")
        for axes in grid[:, 0]:
            axes.set_ylabel("similarity" if several else "similarity to the original")
        under_legend(figure, *grid.flat, columns=1 if ink.narrow else 3)
        return rendered(figure, ink)


def _counts(result: PairResult, conditions: Sequence[Condition], kind: Kind) -> bool:
    return (
        result.pair.kind == kind
        and result.pair.repeats > 0
        and result.condition in conditions
        and not math.isnan(result.statistic)
    )


def _panel(
    axes: Axes,
    shown: Sequence[PairResult],
    conditions: Sequence[Condition],
    ink: Ink,
    *,
    threshold: float,
    kind: Kind,
) -> None:
    plain_axes(axes)
    colour = ink.kind(kind)
    levels = sorted({r.pair.repeats for r in shown})
    axes.axhline(
        threshold, color=ink.alarm, linewidth=1.5, linestyle="--",
        label=f"threshold {threshold:.2f}",
    )  # fmt: skip
    for condition in conditions:
        points = [r for r in shown if r.condition == condition]
        attacked = condition.attack == "dori"
        aside = ScaledTranslation(
            (_APART if attacked else -_APART) / 72, 0, axes.figure.dpi_scale_trans
        )
        place = axes.transData + aside
        axes.scatter(
            [r.pair.repeats for r in points], [r.statistic for r in points],
            s=26, marker="D" if attacked else "o", linewidths=1.3,
            facecolors="none" if attacked else colour, edgecolors=colour, alpha=0.85,
            label="from the attack" if attacked else "from the prompts", transform=place,
        )  # fmt: skip
        for level in levels:
            values = [r.statistic for r in points if r.pair.repeats == level]
            if values:
                axes.plot(
                    [level], [np.median(values)], marker="_", markersize=13, color=ink.text,
                    markeredgewidth=1.6, transform=place,
                )  # fmt: skip
    wide = (levels[-1] - levels[0]) or 1.0
    axes.set_xlim(levels[0] - 0.15 * wide, levels[-1] + 0.15 * wide)
    if len(levels) <= 8:
        axes.set_xticks(levels, [f"{level:g}" for level in levels])


def _short(label: str, length: int) -> str:
    """Break a long name at its underscores: panels are narrow."""
    lines = [""]
    for part in label.replace("_", "_\n").split("\n"):
        if len(lines[-1]) + len(part) > length and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
