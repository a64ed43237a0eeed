"""The figures of a comparison: before and after the attack, and rates against what it may spend.

The same numbers give the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from dori_lightning.report.belonging import BASELINE
from dori_lightning.report.headline_tables import ball_words
from dori_lightning.report.style import (
    SERIES,
    Ink,
    new_figure,
    plain_axes,
    rendered,
    styled,
    under_legend,
)
from dori_lightning.report.summary import INIT_NAMES
from dori_lightning.types import INITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dori_lightning.report.headline import HeadlineRow
    from dori_lightning.types import Cell, Init

__all__ = ["before_and_after", "rate_against_radius", "rates_against_steps"]

_LINES = ("-", "--", ":")
_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class _Look:
    colour: str
    line: str
    marker: str
    width: float


def _looks(labels: Sequence[str], ink: Ink) -> dict[str, _Look]:
    """Give every mitigation a look of its own; the checkpoint as it is stands out."""
    looks = {}
    for place, label in enumerate(name for name in labels if name != BASELINE):
        looks[label] = _Look(
            colour=SERIES[place % len(SERIES)],
            line=_LINES[place // len(SERIES) % len(_LINES)],
            marker=_MARKERS[place % len(_MARKERS)],
            width=1.8,
        )
    return {BASELINE: _Look(ink.text, "-", "o", 2.6), **looks}


def before_and_after(rows: Sequence[HeadlineRow], ink: Ink | None = None) -> bytes | None:
    """Draw, for every mitigation, what its prompts bring back beside what the attack does.

    A mitigation that is attacked within several balls is shown in the widest.

    Returns:
        The figure, None where no suspected image was measured.
    """
    widest = {(row.checkpoint, row.mitigation): row for row in rows}
    groups: dict[str, list[HeadlineRow]] = {}
    for row in widest.values():
        if row.prompt_vm is not None or row.attacks:
            groups.setdefault(row.checkpoint, []).append(row)
    if not groups:
        return None
    ink = ink or Ink()
    heights = [len(group) + 0.8 for group in groups.values()]
    with styled(ink):
        figure = new_figure(ink.width(), 0.38 * sum(heights) + 0.9 + 0.35 * len(heights))
        grid = figure.subplots(
            len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for axes, (checkpoint, group) in zip(grid[:, 0], groups.items(), strict=True):
            _dumbbells(axes, group, ink)
            if len(groups) > 1:
                axes.set_title(checkpoint)
        under_legend(figure, *grid[:, 0], columns=1 if ink.narrow else 3)
        grid[-1, 0].set_xlabel("suspected images reproduced")
        return rendered(figure, ink)


def _dumbbells(axes: Axes, rows: Sequence[HeadlineRow], ink: Ink) -> None:
    plain_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", linewidth=0.8)
    for place, row in enumerate(rows):
        attacked = row.main.vm if row.main is not None else None
        ends = [cell.mr for cell in (row.prompt_vm, attacked) if cell is not None and cell.n]
        if len(ends) == 2:
            axes.plot(ends, [place, place], color=ink.faint, linewidth=5, zorder=1)
        for cell, shift, colour, filled, label in (
            (row.prompt_vm, -0.14, ink.kind("vm"), False, "from their prompts"),
            (attacked, 0.14, ink.alarm, True, "from the attack"),
        ):
            if cell is None or not cell.n:
                continue
            low, high = cell.mr_ci95
            axes.plot([low, high], [place + shift] * 2, color=colour, linewidth=1.4, zorder=2)
            axes.plot(
                cell.mr, place, marker="o", markersize=9, linestyle="none", color=colour,
                markerfacecolor=colour if filled else ink.ground, markeredgewidth=1.8,
                label=label, zorder=3, clip_on=False,
            )  # fmt: skip
        for figure in (row.published.prompt, row.published.attacked) if row.published else ():
            if figure is not None:
                axes.plot(
                    figure.rate, place + 0.36, marker=2, markersize=8, linestyle="none",
                    color=ink.calm, label="the paper, on Stable Diffusion", zorder=2,
                    clip_on=False,
                )  # fmt: skip
    names = [
        row.mitigation.replace("_", "_\n", 1) if ink.narrow else row.mitigation for row in rows
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=8.5 if ink.narrow else 10)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))


def rates_against_steps(
    rows: Sequence[HeadlineRow], cells: Sequence[Cell], ink: Ink | None = None
) -> bytes | None:
    """Draw each mitigation's rate of suspected images against the attack's steps.

    A panel for each checkpoint, initial point and ball. The rate from the prompts is the attack
    from there at 0 steps.

    Returns:
        The figure, None where no attack was measured at several steps.
    """
    panels = list(
        dict.fromkeys(
            (row.checkpoint, attack.init, row.norm, row.eps)
            for row in rows
            for attack in row.attacks
        )
    )
    curves = {panel: _curves(cells, panel) for panel in panels}
    curves = {
        panel: held for panel, held in curves.items() if any(len(c) > 2 for c in held.values())
    }
    if not curves:
        return None
    several = len({panel[0] for panel in curves}) > 1
    ink = ink or Ink()
    looks = _looks(list(dict.fromkeys(row.mitigation for row in rows)), ink)
    with styled(ink):
        figure, grid = _sheet(len(curves), ink)
        for axes, (panel, held) in zip(grid, curves.items(), strict=True):
            checkpoint, init, norm, eps = panel
            _lines(axes, held, looks)
            steps = sorted({step for curve in held.values() for step in curve})
            axes.set_xscale("symlog", linthresh=1.0)
            axes.xaxis.set_major_locator(FixedLocator(steps))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(steps, [str(step) for step in steps])
            axes.set_xlabel("attack steps (0: prompt)" if init == "prompt" else "attack steps")
            radius = "" if norm == "none" else f", {norm} {eps:.3g}"
            name = f"{checkpoint}: " if several else ""
            axes.set_title(f"{name}from {INIT_NAMES[init]}{radius}", fontsize=10)
        under_legend(figure, *grid, columns=2 if ink.narrow else 4)
        return rendered(figure, ink)


def _curves(
    cells: Sequence[Cell], panel: tuple[str, Init, str, float | None]
) -> dict[str, dict[int, Cell]]:
    checkpoint, init, norm, eps = panel
    held: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        condition, budget = cell.condition, cell.condition.budget
        fits = (condition.init, budget.norm, budget.eps) == (init, norm, eps)
        prompt = condition.attack == "prompt" and init == "prompt"
        if cell.checkpoint == checkpoint and cell.kind == "vm" and cell.n and (fits or prompt):
            held.setdefault(cell.mitigation, {})[budget.steps] = cell
    return held


def rate_against_radius(rows: Sequence[HeadlineRow], ink: Ink | None = None) -> bytes | None:
    """Draw each mitigation's rate of suspected images against the attack's radius, at full steps.

    A panel for each checkpoint and initial point; the widest ball is on the right.

    Returns:
        The figure, None where all attacks had one ball.
    """
    panels = [
        (checkpoint, init)
        for checkpoint in dict.fromkeys(row.checkpoint for row in rows)
        for init in INITS
        if len({ball_words(r) for r in rows if r.checkpoint == checkpoint and r.attacks}) > 1
        and any(a.init == init for r in rows if r.checkpoint == checkpoint for a in r.attacks)
    ]
    if not panels:
        return None
    ink = ink or Ink()
    looks = _looks(list(dict.fromkeys(row.mitigation for row in rows)), ink)
    with styled(ink):
        figure, grid = _sheet(len(panels), ink)
        for axes, (checkpoint, init) in zip(grid, panels, strict=True):
            own = [row for row in rows if row.checkpoint == checkpoint and row.attacks]
            # rows of one mitigation come with their balls from narrow to wide
            balls = sorted(
                {(r.norm == "none", r.norm, r.eps or 0.0): ball_words(r) for r in own}.items()
            )
            places = {words: place + 1 for place, (_, words) in enumerate(balls)}
            held: dict[str, dict[int, Cell]] = {}
            for row in own:
                for attack in row.attacks:
                    if attack.init == init and attack.vm is not None and attack.vm.n:
                        held.setdefault(row.mitigation, {})[places[ball_words(row)]] = attack.vm
                if init == "prompt" and row.prompt_vm is not None and row.prompt_vm.n:
                    held.setdefault(row.mitigation, {})[0] = row.prompt_vm
            _lines(axes, held, looks)
            ticks = {0: "prompt", **{place: words for words, place in places.items()}}
            shown = {k: v for k, v in ticks.items() if any(k in curve for curve in held.values())}
            axes.set_xticks(list(shown), [text.replace(", ", "\n") for text in shown.values()])
            axes.set_title(f"{checkpoint}: from {INIT_NAMES[init]}", fontsize=10)
        under_legend(figure, *grid, columns=2 if ink.narrow else 4)
        return rendered(figure, ink)


def _lines(axes: Axes, curves: dict[str, dict[int, Cell]], looks: dict[str, _Look]) -> None:
    plain_axes(axes)
    for label, curve in curves.items():
        at, look = sorted(curve), looks[label]
        axes.plot(
            at, [curve[k].mr for k in at], color=look.colour, linestyle=look.line,
            marker=look.marker, linewidth=look.width, markersize=6, label=label, clip_on=False,
        )  # fmt: skip
        if len(curves) <= 3:  # more bands than that hide each other
            low, high = zip(*(curve[k].mr_ci95 for k in at), strict=True)
            axes.fill_between(at, low, high, color=look.colour, alpha=0.12, linewidth=0)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    place = axes.get_subplotspec()
    axes.set_ylabel("suspected images reproduced" if place and place.is_first_col() else "")


def _sheet(count: int, ink: Ink) -> tuple[Figure, list[Axes]]:
    """Make a figure of ``count`` panels, two beside each other."""
    columns = ink.columns(count)
    lines = math.ceil(count / columns)
    figure = new_figure(ink.width(8.8 if columns > 1 else 6.8), 3.0 * lines + 1.2)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, list(grid[:count])
