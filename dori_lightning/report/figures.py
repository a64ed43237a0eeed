"""The figures of a report; the same numbers give the same bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from dori_lightning.report.grid import picture_grid
from dori_lightning.report.repeats import memorization_against_repeats
from dori_lightning.report.style import (
    KIND_LOOK,
    Ink,
    new_figure,
    plain_axes,
    rendered,
    styled,
    under_legend,
)
from dori_lightning.report.summary import INIT_NAMES, condition_words
from dori_lightning.types import KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from dori_lightning.report.summary import PairResult
    from dori_lightning.types import Calibration, Cell, Condition, Init, Norm

__all__ = [
    "memorization_against_repeats",
    "picture_grid",
    "rate_against_steps",
    "roc",
    "similarity_histograms",
]

_PLURAL = {"vm": "suspected images", "tm": "suspected template copies", "control": "controls"}
_APART = 5.0
"""Points between the marks of two kinds at the same number of steps."""


def rate_against_steps(cells: Sequence[Cell], ink: Ink | None = None) -> bytes | None:
    """Draw the memorization rate against the attack's steps, with Wilson intervals.

    Each start and radius has a panel. The rate from the prompts is the attack from there at 0
    steps. The kinds stand a little apart, so that intervals do not hide each other.

    Returns:
        The figure, None where no attack was run.
    """
    panels = list(
        dict.fromkeys(
            (c.condition.init, c.condition.budget.norm, c.condition.budget.eps)
            for c in cells
            if c.condition.attack == "dori"
        )
    )
    if not panels:
        return None
    ink = ink or Ink()
    with styled(ink):
        columns = ink.columns(len(panels))
        lines = math.ceil(len(panels) / columns)
        figure = new_figure(ink.width(8.8 if columns > 1 else 6.8), 2.9 * lines + 0.5)
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _rate_panel(axes, cells, panel, ink)
        for row in grid:
            row[0].set_ylabel("images reproduced")
        under_legend(figure, *grid.flat, columns=1 if ink.narrow else 3)
        return rendered(figure, ink)


def _rate_panel(
    axes: Axes, cells: Sequence[Cell], panel: tuple[Init | None, Norm, float | None], ink: Ink
) -> None:
    plain_axes(axes)
    init, norm, eps = panel
    steps: set[int] = set()
    for place, kind in enumerate(KINDS):
        curve = {
            c.condition.budget.steps: c
            for c in cells
            if c.kind == kind
            and c.n > 0
            and (
                (c.condition.attack == "prompt" and init == "prompt")
                or panel == (c.condition.init, c.condition.budget.norm, c.condition.budget.eps)
            )
        }
        if not curve:
            continue
        at = sorted(curve)
        steps.update(at)
        _, marker, line = KIND_LOOK[kind]
        colour = ink.kind(kind)
        rates = np.array([curve[s].mr for s in at])
        low, high = np.array([curve[s].mr_ci95 for s in at]).T
        aside = ScaledTranslation((place - 1) * _APART / 72, 0, axes.figure.dpi_scale_trans)
        axes.errorbar(
            at, rates, yerr=np.clip([rates - low, high - rates], 0, None),
            color=colour, marker=marker, linestyle=line, linewidth=1.8, elinewidth=1.2,
            capsize=2.5, markersize=5.5, transform=axes.transData + aside, clip_on=False,
            label=f"{_PLURAL[kind]} (n = {max(c.n for c in curve.values())})",
        )  # fmt: skip
    axes.set_xscale("symlog", linthresh=1.0)
    axes.xaxis.set_major_locator(FixedLocator(sorted(steps)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(steps), [str(s) for s in sorted(steps)])
    axes.tick_params(axis="x", labelsize=8.5 if len(steps) > 6 else 10)
    axes.set_xlim(
        -0.25 if 0 in steps else 0.8 * min(steps, default=1), 1.2 * max(steps, default=1)
    )
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("attack steps (0: the prompt itself)" if init == "prompt" else "attack steps")
    radius = "" if norm == "none" else f", {norm} radius {eps:g}"
    axes.set_title(f"started from {INIT_NAMES[init]}{radius}" if init else "attack")


def similarity_histograms(
    results: Sequence[PairResult],
    ink: Ink | None = None,
    *,
    conditions: Sequence[Condition],
    calibration: Calibration,
) -> bytes | None:
    """Draw how similar the pictures are to the originals, per kind and condition.

    Returns:
        The figure, None where nothing was measured.
    """
    shown = [r for r in results if r.condition in conditions and not math.isnan(r.statistic)]
    kinds = [kind for kind in KINDS if any(r.pair.kind == kind for r in shown)]
    if not shown:
        return None
    ink = ink or Ink()
    low = min(0.0, *(r.statistic for r in shown))
    bins = np.linspace(math.floor(low * 10) / 10, max(1.0, *(r.statistic for r in shown)), 25)
    with styled(ink):
        figure = new_figure(ink.width(), 1.5 * len(kinds) + 0.6)
        grid = figure.subplots(
            len(kinds), len(conditions), squeeze=False, sharex=True, sharey="row"
        )
        for row, kind in zip(grid, kinds, strict=True):
            for axes, condition in zip(row, conditions, strict=True):
                values = [
                    r.statistic for r in shown if r.pair.kind == kind and r.condition == condition
                ]
                plain_axes(axes)
                axes.hist(
                    values, bins=bins, color=ink.kind(kind), edgecolor=ink.ground, linewidth=0.6
                )
                axes.axvline(calibration.threshold, color=ink.alarm, linewidth=1.6, linestyle="--")
                axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
            row[0].set_ylabel(_PLURAL[kind].replace("suspected ", "suspected\n"))
        for axes, condition in zip(grid[0], conditions, strict=True):
            words = condition_words(condition).split(",")[0]
            title = "from the prompts" if condition.attack == "prompt" else words
            axes.set_title("from the attack" if ink.narrow and "attack" in title else title)
        grid[0][0].annotate(
            f"threshold {calibration.threshold:.2f}", (calibration.threshold, 0.96),
            xycoords=("data", "axes fraction"), xytext=(-5, 0), textcoords="offset points",
            color=ink.alarm, ha="right", va="top", fontsize=9.5,
        )  # fmt: skip
        figure.supxlabel(
            f"similarity to the original ({calibration.descriptor})", fontsize=10, color=ink.text
        )
        return rendered(figure, ink)


def roc(calibration: Calibration, ink: Ink | None = None) -> bytes | None:
    """Draw how well the descriptor tells reproduced suspected images from controls.

    Returns:
        The figure, None where vm or control pairs are missing.
    """
    if not calibration.roc:
        return None
    ink = ink or Ink()
    with styled(ink):
        figure = new_figure(4.4, 4.2)
        axes = figure.subplots()
        plain_axes(axes)
        false, true, thresholds = (
            np.array(column) for column in zip(*calibration.roc, strict=True)
        )
        axes.plot([0, 1], [0, 1], color=ink.calm, linestyle=":", linewidth=1.2)
        axes.plot(false, true, color=ink.kind("vm"), linewidth=2.2, drawstyle="steps-post")
        passing = np.flatnonzero(thresholds >= calibration.threshold)
        if passing.size:
            place = passing[np.argmin(thresholds[passing])]
            point = (float(false[place]), float(true[place]))
            axes.plot(*point, marker="D", markersize=8, color=ink.alarm, clip_on=False, zorder=5)
            axes.annotate(
                f"threshold {calibration.threshold:.2f}", point, xytext=(12, -16),
                textcoords="offset points", color=ink.alarm, fontsize=9.5,
            )  # fmt: skip
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set_xlabel("controls above the threshold")
        axes.set_ylabel("suspected images above it")
        axes.set_title("AUC n/a" if math.isnan(calibration.auc) else f"AUC {calibration.auc:.3f}")
        return rendered(figure, ink)
