"""The figures of a report, as PNG bytes of fixed size: the same numbers give the same bytes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from dori_lightning.report.grid import picture_grid
from dori_lightning.report.style import KIND_STYLE, Ink, figure_png, new_figure, plain_axes, styled
from dori_lightning.report.summary import condition_words
from dori_lightning.types import KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from dori_lightning.report.summary import PairResult
    from dori_lightning.types import Calibration, Cell, Condition, Kind

__all__ = [
    "memorization_against_repeats",
    "picture_grid",
    "rate_against_steps",
    "roc",
    "similarity_histograms",
]

_PLURAL = {"vm": "suspected images", "tm": "suspected template copies", "control": "controls"}


def rate_against_steps(cells: Sequence[Cell], *, dark: bool = False) -> bytes | None:
    """Draw the memorization rate against the attack's steps, with its Wilson band.

    Each start and radius has a panel. The rate from the prompts is the attack from there at 0
    steps.

    Returns:
        PNG bytes, None where no attack was run.
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
    ink = Ink(dark=dark)
    with styled(ink):
        columns = min(len(panels), 2)
        lines = math.ceil(len(panels) / columns)
        figure = new_figure(4.4 * columns + (2.0 if columns == 1 else 0.0), 3.6 * lines)
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _rate_panel(axes, cells, panel, ink)
        grid.flat[0].legend(loc="best")
        for row in grid:
            row[0].set_ylabel("images reproduced")
        return figure_png(figure)


def _rate_panel(
    axes: Axes, cells: Sequence[Cell], panel: tuple[str | None, str, float | None], ink: Ink
) -> None:
    plain_axes(axes)
    steps: set[int] = set()
    for kind in KINDS:
        curve = {
            c.condition.budget.steps: c
            for c in cells
            if c.kind == kind
            and c.n > 0
            and (
                (c.condition.attack == "prompt" and panel[0] == "prompt")
                or panel == (c.condition.init, c.condition.budget.norm, c.condition.budget.eps)
            )
        }
        if not curve:
            continue
        at = sorted(curve)
        steps.update(at)
        _, _, marker, line = KIND_STYLE[kind]
        colour = ink.kind(kind)
        low, high = zip(*(curve[s].mr_ci95 for s in at), strict=True)
        axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
        for edge in (low, high):
            axes.plot(at, edge, color=colour, alpha=0.45, linestyle=line, linewidth=0.9)
        label = f"{_PLURAL[kind]} (n = {max(c.n for c in curve.values())})"
        axes.plot(
            at, [curve[s].mr for s in at],
            color=colour, marker=marker, linestyle=line, linewidth=2, label=label,
        )  # fmt: skip
    axes.set_xscale("symlog", linthresh=1.0)
    axes.xaxis.set_major_locator(FixedLocator(sorted(steps)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(steps), [str(s) for s in sorted(steps)])
    axes.tick_params(axis="x", labelsize=9 if len(steps) > 6 else 11)
    axes.set_xlim(left=-0.15 if 0 in steps else 0.85 * min(steps, default=1))
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("attack steps (0: prompt)" if panel[0] == "prompt" else "attack steps")
    init, norm, eps = panel
    start = {
        "prompt": "own prompt",
        "random": "random embedding",
        "control_prompt": "unrelated prompt",
    }
    radius = "" if norm == "none" else f", {norm} radius {eps:g}"
    axes.set_title(f"from {start.get(init or '', 'start')}{radius}")


def similarity_histograms(
    results: Sequence[PairResult],
    *,
    conditions: Sequence[Condition],
    calibration: Calibration,
    dark: bool = False,
) -> bytes | None:
    """Draw how similar the pictures are to the originals, per kind and condition.

    Returns:
        PNG bytes, None where nothing was measured.
    """
    shown = [r for r in results if r.condition in conditions and not math.isnan(r.statistic)]
    kinds = [kind for kind in KINDS if any(r.pair.kind == kind for r in shown)]
    if not shown:
        return None
    ink = Ink(dark=dark)
    low = min(0.0, *(r.statistic for r in shown))
    bins = np.linspace(math.floor(low * 10) / 10, max(1.0, *(r.statistic for r in shown)), 25)
    with styled(ink):
        figure = new_figure(8.8, 1.9 * len(kinds) + 0.6)
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
                axes.axvline(calibration.threshold, color=ink.alarm, linewidth=1.8, linestyle="--")
                axes.yaxis.get_major_locator().set_params(integer=True)
            row[0].set_ylabel(_PLURAL[kind].replace("suspected ", "suspected\n"))
        for axes, condition in zip(grid[0], conditions, strict=True):
            words = condition_words(condition)
            axes.set_title(
                "from the prompts" if condition.attack == "prompt" else words.split(",")[0],
                fontsize=11,
            )
        grid[0][0].annotate(
            f"threshold {calibration.threshold:.2f}", (calibration.threshold, 0.96),
            xycoords=("data", "axes fraction"), xytext=(-5, 0), textcoords="offset points",
            color=ink.alarm, ha="right", va="top", fontsize=10,
        )  # fmt: skip
        figure.supxlabel(
            f"similarity to the original ({calibration.descriptor})", fontsize=11, color=ink.text
        )
        return figure_png(figure)


def roc(calibration: Calibration, *, dark: bool = False) -> bytes | None:
    """Draw how well the descriptor tells reproduced suspected images from controls.

    Returns:
        PNG bytes, None where vm or control pairs are missing.
    """
    if not calibration.roc:
        return None
    ink = Ink(dark=dark)
    with styled(ink):
        figure = new_figure(6.4, 3.8)
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
            axes.plot(*point, marker="D", markersize=9, color=ink.alarm, clip_on=False, zorder=5)
            axes.annotate(
                f"threshold {calibration.threshold:.2f}", point, xytext=(12, -16),
                textcoords="offset points", color=ink.alarm, fontsize=10,
            )  # fmt: skip
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.set_xlabel("controls above the threshold")
        axes.set_ylabel("suspected images above it")
        axes.set_title("AUC n/a" if math.isnan(calibration.auc) else f"AUC {calibration.auc:.3f}")
        return figure_png(figure)


def memorization_against_repeats(
    results: Sequence[PairResult],
    *,
    conditions: Sequence[Condition],
    threshold: float,
    kind: Kind = "vm",
    dark: bool = False,
) -> bytes | None:
    """Draw similarity against how often a picture was planted in the training stream.

    Filled marks are pictures from prompts, open ones those of the attack.

    Returns:
        PNG bytes, None where no pair has repetitions.
    """
    shown = [
        r for r in results
        if r.pair.kind == kind and r.pair.repeats > 0
        and r.condition in conditions and not math.isnan(r.statistic)
    ]  # fmt: skip
    if not shown:
        return None
    ink = Ink(dark=dark)
    with styled(ink):
        figure = new_figure(6.4, 3.8)
        axes = figure.subplots()
        plain_axes(axes)
        colour = ink.kind(kind)
        width = 0.03 * (max(r.pair.repeats for r in shown) or 1.0)
        for condition in conditions:
            points = [r for r in shown if r.condition == condition]
            attacked = condition.attack == "dori"
            x = [r.pair.repeats + (width if attacked else -width) for r in points]
            axes.scatter(
                x, [r.statistic for r in points],
                s=46, marker="D" if attacked else "o", linewidths=1.5,
                facecolors="none" if attacked else colour, edgecolors=colour, alpha=0.9,
                label="from adversarial embeddings" if attacked else "from the prompts",
            )  # fmt: skip
        axes.axhline(
            threshold,
            color=ink.alarm,
            linewidth=1.6,
            linestyle="--",
            label=f"threshold {threshold:.2f}",
        )
        levels = sorted({r.pair.repeats for r in shown})
        if len(levels) <= 8:
            axes.set_xticks(levels, [f"{level:g}" for level in levels])
        axes.set_ylim(min(0.0, *(r.statistic for r in shown)) - 0.03, 1.04)
        axes.set_xlabel("relative number of repetitions in training")
        axes.set_ylabel("similarity to the original")
        axes.legend(loc="lower right")
        return figure_png(figure)
