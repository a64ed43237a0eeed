"""The figures of a report; the same numbers give the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from dori_lightning.metrics.replication import (
    PairResult,
    headline_condition,
    pair_results,
    prompt_condition,
)
from dori_lightning.report.comparison import HeadlineRow
from dori_lightning.report.pictures import Disclosure, thumbnail
from dori_lightning.report.record import AuditReport
from dori_lightning.report.tables import ball_words
from dori_lightning.report.words import INIT_NAMES, STATUS_WORDS, condition_words
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.types import (
    BASELINE,
    INITS,
    KINDS,
    Calibration,
    Cell,
    Condition,
    Init,
    Kind,
    Norm,
)

# -------- style
# Colours, type sizes and output that all figures share.
#
# A figure goes to a file as PNG, or onto the page as SVG. On the page its colours are the page's
# own variables, so that one drawing serves light and dark screens and paper, and its text is
# text.

KIND_LOOK: dict[Kind, tuple[str, str, str]] = {
    "vm": ("#0072B2", "o", "-"),
    "tm": ("#B3600A", "s", "--"),
    "control": ("#5F6368", "^", ":"),
}
"""Per kind: colour (after Okabe and Ito), marker and line."""

SERIES = ("#0B6FA8", "#C4500A", "#00785A", "#A8497F", "#8A6500", "#5B4DB2")
"""Colours of things that are compared, in turn."""

_GROUND, _TEXT, _FAINT, _ALARM, _CALM = "#FFFFFF", "#1C2024", "#D9DDE1", "#B8420A", "#8A929A"

# The page's stylesheet defines these for light and for dark ground.
_VARIABLES = {
    _GROUND: "panel",
    _TEXT: "text",
    _FAINT: "line",
    _ALARM: "found",
    _CALM: "calm",
    **{look[0]: kind for kind, look in KIND_LOOK.items()},
    **{colour: f"series-{place}" for place, colour in enumerate(SERIES, 1)},
}


class FigureStyle:
    """How a figure is drawn: for which place, and in which colours.

    Args:
        element: Name of the page's element that it becomes, unique on the page; empty for a file.
        narrow: Draw for a telephone: one panel beside another only where it must be.
    """

    ground, text, faint, alarm, calm = _GROUND, _TEXT, _FAINT, _ALARM, _CALM

    def __init__(self, *, element: str = "", narrow: bool = False) -> None:
        self.element = element
        self.narrow = narrow

    @staticmethod
    def kind(kind: Kind) -> str:
        """Colour of a kind of pair."""
        return KIND_LOOK[kind][0]

    def columns(self, panels: int) -> int:
        """How many of so many panels stand beside each other."""
        return 1 if self.narrow else min(panels, 2)

    def width(self, wide: float = 8.8) -> float:
        """Width of a figure in inches."""
        return 4.0 if self.narrow else wide


@contextmanager
def styled(ink: FigureStyle) -> Iterator[None]:
    """Draw in one style, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": "DejaVu Sans",
                "font.size": 10,
                "axes.titlesize": 10.5,
                "axes.titlelocation": "left",
                "axes.titleweight": "bold",
                "axes.labelsize": 10,
                "axes.facecolor": ink.ground,
                "figure.facecolor": ink.ground,
                "savefig.facecolor": ink.ground,
                "axes.edgecolor": ink.calm,
                "axes.labelcolor": ink.text,
                "axes.titlecolor": ink.text,
                "text.color": ink.text,
                "xtick.color": ink.text,
                "ytick.color": ink.text,
                "grid.color": ink.faint,
                "legend.frameon": False,
                "legend.fontsize": 9.5,
                # names come from configurations: a dollar sign in one is no formula
                "text.parse_math": False,
                "svg.fonttype": "none",
                "svg.hashsalt": "dori",
            }
        )
        yield


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of a fixed size in inches that no window system knows of."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes) -> None:
    """Leave two spines and a faint horizontal grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=3)


def under_legend(figure: Figure, *panels: Axes, columns: int = 3) -> None:
    """Put one legend under all panels, where it hides no mark; each label once."""
    seen: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    if seen:
        figure.legend(
            list(seen.values()),
            list(seen),
            loc="outside lower center",
            ncols=columns,
            handlelength=2.2,
            columnspacing=1.6,
        )


def rendered(figure: Figure, ink: FigureStyle) -> bytes:
    """Encode a figure; equal figures give equal bytes, since no version and no date is written."""
    sink = io.BytesIO()
    if not ink.element:
        figure.savefig(sink, format="png", metadata={"Software": None})
        return sink.getvalue()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(sink.getvalue().decode(), ink.element).encode()


def _for_page(svg: str, element: str) -> str:
    """Turn a file into an element: no header, no names that could clash, the page's colours."""
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'^<svg([^>]*?)\swidth="[^"]*"([^>]*?)>', r'<svg\1\2 aria-hidden="true">', text)
    text = re.sub(r'^<svg([^>]*?)\sheight="[^"]*"', r"<svg\1", text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(
        r'\sid="([^"]+)"',
        lambda found: f' id="{element}-{found[1]}"' if found[1] in used else "",
        text,
    )
    text = re.sub(r'(href="#|url\(#)', rf"\1{element}-", text)
    # matplotlib writes the one rule of its own into the element
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    for colour, name in _VARIABLES.items():
        text = re.sub(rf"{colour}\b", f"var(--{name})", text, flags=re.IGNORECASE)
    text = text.replace("'DejaVu Sans'", "var(--sans)")
    return re.sub(r"\s*\n\s*", "\n", text)


# -------- grid
# The figure of pictures: what was to be protected, beside what came back.


def picture_grid(
    rows: Sequence[tuple[PairResult | None, PairResult | None]],
    *,
    threshold: float,
    disclosure: Disclosure = "full",
) -> bytes | None:
    """Draw one row per pair: original, best picture from its prompt, best picture from the attack.

    A picture above the threshold has a thick frame and the word ``REPRODUCED``.

    Args:
        rows: Results from the prompt and from the attack, of the same pair.
        threshold: Similarity above which a picture counts as a replica.
        disclosure: ``none`` draws nothing.

    Returns:
        PNG bytes; None where there is nothing to draw or pictures are not to be shown.
    """
    known = [row for row in rows if row[0] is not None or row[1] is not None]
    if disclosure == "none" or not known:
        return None
    ink = FigureStyle()
    with styled(ink):
        figure = new_figure(6.6, 2.35 * len(known) + 0.3)
        grid = figure.subplots(len(known), 3, squeeze=False)
        for axes, row in zip(grid, known, strict=True):
            pair = next(result.pair for result in row if result is not None)
            original = thumbnail(pair.image, disclosure)
            assert original is not None
            axes[0].imshow(np.asarray(original))
            axes[0].set_ylabel(f"{pair.id[:18]}\n({pair.kind})", fontsize=10)
            for panel, result in zip(axes[1:], row, strict=True):
                _grid_picture(panel, result, threshold, disclosure, ink)
            for panel in axes:
                panel.set_xticks([])
                panel.set_yticks([])
        for panel, title in zip(
            grid[0], ("original", "from its prompt", "from the attack"), strict=True
        ):
            panel.set_title(title)
        return rendered(figure, ink)


def _grid_picture(
    panel: Axes,
    result: PairResult | None,
    threshold: float,
    disclosure: Disclosure,
    ink: FigureStyle,
) -> None:
    shown = thumbnail(result.picture, disclosure) if result and result.picture else None
    if shown is not None:
        panel.imshow(np.asarray(shown))
    else:
        why = (
            "not run"
            if result is None
            else STATUS_WORDS[result.status]
            if result.status != "ok"
            else "not kept"
        )
        panel.text(0.5, 0.5, why, ha="center", va="center", transform=panel.transAxes)
        panel.set_aspect(1.0, adjustable="box")
    above = result is not None and result.best > threshold
    for spine in panel.spines.values():
        spine.set_color(ink.alarm if above else ink.calm)
        spine.set_linewidth(3.5 if above else 0.8)
    if result is not None and not math.isnan(result.best):
        mark = "REPRODUCED  " if above else ""
        panel.set_xlabel(
            f"{mark}{result.best:.2f}", color=ink.alarm if above else ink.text,
            fontsize=10, fontweight="bold" if above else "normal",
        )  # fmt: skip


# -------- price_figure
# The figure of a comparison that holds what is removed against what it costs.


def removal_against_price(
    rows: Sequence[HeadlineRow], ink: FigureStyle | None = None
) -> bytes | None:
    """Draw what the attack still finds against what the mitigation costs on ordinary pictures.

    A mitigation that is attacked within several balls is shown in the widest. Both intervals are
    95 %; a panel for each checkpoint.

    Returns:
        The figure, None where no mitigation has both numbers.
    """
    widest = {(row.checkpoint, row.mitigation): row for row in rows}
    groups: dict[str, list[HeadlineRow]] = {}
    for row in widest.values():
        if _drawn(row):
            groups.setdefault(row.checkpoint, []).append(row)
    if not groups:
        return None
    ink = ink or FigureStyle()
    with styled(ink):
        columns = ink.columns(len(groups))
        lines = math.ceil(len(groups) / columns)
        figure = new_figure(ink.width(8.8 if columns > 1 else 7.6), 3.9 * lines)
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(groups) :]:
            axes.set_visible(False)
        for axes, (checkpoint, group) in zip(grid.flat, groups.items(), strict=False):
            _panel(axes, group, ink)
            if len(groups) > 1:
                axes.set_title(checkpoint)
        figure.supxlabel("denoising loss on ordinary pictures, change", fontsize=10)
        figure.supylabel("suspected images found by the attack", fontsize=10)
        return rendered(figure, ink)


def _drawn(row: HeadlineRow) -> bool:
    attacked = row.main.vm if row.main is not None else None
    known = attacked is not None and attacked.n > 0 and math.isfinite(row.cost.loss_ratio)
    return known and row.mitigation != BASELINE


def _panel(axes: Axes, rows: Sequence[HeadlineRow], ink: FigureStyle) -> None:
    plain_axes(axes)
    axes.axvline(0.0, color=ink.calm, linewidth=1.0)
    for place, row in enumerate(_by_height(rows)):
        assert row.main is not None
        assert row.main.vm is not None
        cell, ratio = row.main.vm, row.cost.loss_ratio
        found = cell.hits > 0
        bounds = np.array([row.cost.loss_ratio_ci95, cell.mr_ci95])
        spread = np.abs(bounds - np.array([[ratio], [cell.mr]]))
        axes.errorbar(
            ratio - 1.0, cell.mr,
            xerr=np.nan_to_num(spread[0])[:, None], yerr=np.nan_to_num(spread[1])[:, None],
            color=ink.alarm if found else ink.kind("vm"), marker="o", markersize=8,
            elinewidth=1.2, linestyle="none", clip_on=False, zorder=3,
        )  # fmt: skip
        axes.annotate(
            row.mitigation, (ratio - 1.0, cell.mr),
            # names of marks at one height go up and down in turn
            xytext=(8, 8 if place % 2 == 0 else -14), textcoords="offset points", fontsize=9,
            color=ink.text,
        )  # fmt: skip
    axes.set_ylim(-0.02, 1.02)
    axes.margins(x=0.25)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _by_height(rows: Sequence[HeadlineRow]) -> list[HeadlineRow]:
    return sorted(
        rows,
        key=lambda row: (
            row.main.vm.mr if row.main is not None and row.main.vm is not None else 0.0,
            row.cost.loss_ratio,
        ),
    )


# -------- repeats
# The figure of planted data: how often a picture was shown, against how well it is remembered.

_APART_REPEATS = 7.0
"""Points between the marks of prompts and attack at the same multiplicity."""


def memorization_against_repeats(
    results: Sequence[PairResult],
    ink: FigureStyle | None = None,
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
    return _sheet(panels, ink or FigureStyle(), threshold=threshold, kind=kind)


def repeats_by_mitigation(
    rows: Mapping[str, tuple[Sequence[PairResult], Sequence[Condition]]],
    ink: FigureStyle | None = None,
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
    return _sheet(rows, ink or FigureStyle(), threshold=threshold, kind=kind)


def _sheet(
    rows: Mapping[str, tuple[Sequence[PairResult], Sequence[Condition]]],
    ink: FigureStyle,
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
            _panel_repeats(axes, shown, conditions, ink, threshold=threshold, kind=kind)
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


def _panel_repeats(
    axes: Axes,
    shown: Sequence[PairResult],
    conditions: Sequence[Condition],
    ink: FigureStyle,
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
            (_APART_REPEATS if attacked else -_APART_REPEATS) / 72, 0, axes.figure.dpi_scale_trans
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


# -------- figures

_PLURAL = {"vm": "suspected images", "tm": "suspected template copies", "control": "controls"}
_APART = 5.0
"""Points between the marks of two kinds at the same number of steps."""


def rate_against_steps(cells: Sequence[Cell], ink: FigureStyle | None = None) -> bytes | None:
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
    ink = ink or FigureStyle()
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
    axes: Axes,
    cells: Sequence[Cell],
    panel: tuple[Init | None, Norm, float | None],
    ink: FigureStyle,
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
    ink: FigureStyle | None = None,
    *,
    conditions: Sequence[Condition],
    calibration: Calibration,
) -> bytes | None:
    """Draw how similar the pictures are to the references, per kind and condition.

    Returns:
        The figure, None where nothing was measured.
    """
    shown = [r for r in results if r.condition in conditions and not math.isnan(r.statistic)]
    kinds = [kind for kind in KINDS if any(r.pair.kind == kind for r in shown)]
    if not shown:
        return None
    ink = ink or FigureStyle()
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


def roc(calibration: Calibration, ink: FigureStyle | None = None) -> bytes | None:
    """Draw how well the descriptor tells reproduced suspected images from controls.

    Returns:
        The figure, None where vm or control pairs are missing.
    """
    if not calibration.roc:
        return None
    ink = ink or FigureStyle()
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


# -------- plots
# The figures of a report with their captions, for the page and for the run folder.

Drawing = Callable[[FigureStyle], bytes | None]

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
        wide = draw(FigureStyle(element=name))
        narrow = draw(FigureStyle(element=f"{name}-narrow", narrow=True))
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
    drawn = {name: draw(FigureStyle()) for name, draw in _drawings(report).items()}
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


# -------- sweep_figures
# The figures of a comparison: before and after the attack, and rates against what it may spend.
#
# The same numbers give the same bytes.

_LINES = ("-", "--", ":")
_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class _Look:
    colour: str
    line: str
    marker: str
    width: float


def _looks(labels: Sequence[str], ink: FigureStyle) -> dict[str, _Look]:
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


def before_and_after(rows: Sequence[HeadlineRow], ink: FigureStyle | None = None) -> bytes | None:
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
    ink = ink or FigureStyle()
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


def _dumbbells(axes: Axes, rows: Sequence[HeadlineRow], ink: FigureStyle) -> None:
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
    rows: Sequence[HeadlineRow], cells: Sequence[Cell], ink: FigureStyle | None = None
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
    ink = ink or FigureStyle()
    looks = _looks(list(dict.fromkeys(row.mitigation for row in rows)), ink)
    with styled(ink):
        figure, grid = _sheet_sweep_figures(len(curves), ink)
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


def rate_against_radius(
    rows: Sequence[HeadlineRow], ink: FigureStyle | None = None
) -> bytes | None:
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
    ink = ink or FigureStyle()
    looks = _looks(list(dict.fromkeys(row.mitigation for row in rows)), ink)
    with styled(ink):
        figure, grid = _sheet_sweep_figures(len(panels), ink)
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


def _sheet_sweep_figures(count: int, ink: FigureStyle) -> tuple[Figure, list[Axes]]:
    """Make a figure of ``count`` panels, two beside each other."""
    columns = ink.columns(count)
    lines = math.ceil(count / columns)
    figure = new_figure(ink.width(8.8 if columns > 1 else 6.8), 3.0 * lines + 1.2)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, list(grid[:count])
