"""The figures of reports, each drawn once by matplotlib: an SVG on the page, a PNG beside it.

A drawing function returns a matplotlib figure, or None where there is nothing to draw.
``svg_element`` and ``png_bytes`` encode it; equal numbers give equal bytes. On the page the
colours are variables of the stylesheet, so that one drawing serves light and dark screens and
paper, its text is text, and CSS scales it to the screen.
"""

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from matplotlib.transforms import ScaledTranslation

from dori_lightning.metrics.evidence import COPY, Unseen
from dori_lightning.metrics.replication import PairResult
from dori_lightning.report.comparison import HeadlineRow
from dori_lightning.report.record import AuditRecord, AuditReport
from dori_lightning.report.tables import ball_words
from dori_lightning.report.words import INIT_NAMES, condition_words
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.types import BASELINE, KINDS, Calibration, Cell, Condition, Init, Kind, Norm

KIND_LOOK: dict[Kind, tuple[str, str, str]] = {
    "vm": ("#0072B2", "o", "-"),
    "tm": ("#B3600A", "s", "--"),
    "control": ("#5F6368", "^", ":"),
}
"""Colour (after Okabe and Ito), marker and line of each kind of pair."""

SERIES = ("#0B6FA8", "#C4500A", "#00785A", "#A8497F", "#8A6500", "#5B4DB2")
"""Colours of things that are compared, in turn."""

GROUND, TEXT, FAINT, ALARM, CALM = "#FFFFFF", "#1C2024", "#D9DDE1", "#B8420A", "#8A929A"

# The page's stylesheet defines these for light and for dark ground.
_VARIABLES = {
    GROUND: "panel",
    TEXT: "text",
    FAINT: "line",
    ALARM: "found",
    CALM: "calm",
    **{look[0]: kind for kind, look in KIND_LOOK.items()},
    **{colour: f"series-{place}" for place, colour in enumerate(SERIES, 1)},
}

_KIND_PLURALS: dict[Kind, str] = {
    "vm": "suspected images",
    "tm": "suspected template copies",
    "control": "controls",
}
_UNSEEN_LOOK: dict[Unseen, tuple[str, str, str]] = {
    "altered_copy": ("altered copies of the suspects", SERIES[3], "D"),
    "control": ("controls", *KIND_LOOK["control"][:2]),
    "reference": ("all images on the reference model", SERIES[5], "v"),
}
"""Label, colour and marker of images that the model cannot hold."""

_MARK, _TIERS = 5.5, 13
"""Points that a mark of a score takes each way, and tiers that marks are put into at most."""

_ENDS = (-0.5, 1.2)
"""Furthest ends of the axis of scores."""

_MOST_INTERVALS = 3
"""Curves of a panel that are drawn with their intervals; those of more hide each other."""


@contextmanager
def styled() -> Iterator[None]:
    """Use the style of all figures, whatever the user's matplotlibrc says; also a decorator."""
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
                "axes.facecolor": GROUND,
                "figure.facecolor": GROUND,
                "axes.edgecolor": CALM,
                "axes.labelcolor": TEXT,
                "axes.titlecolor": TEXT,
                "text.color": TEXT,
                "xtick.color": TEXT,
                "ytick.color": TEXT,
                "grid.color": FAINT,
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


def panel_grid(count: int, *, columns: int = 2, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels that share their vertical axis.

    Args:
        count: Panels.
        columns: Panels beside each other at most.
        height: Inches of a row of panels.
    """
    columns = min(count, columns)
    lines = math.ceil(count / columns)
    figure = new_figure(5.4 if columns == 1 else 7.6, height * lines + 0.6)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True).flat
    for axes in grid[count:]:
        axes.set_visible(False)
    return figure, list(grid[:count])


def plain_axes(axes: Axes, *, grid: Literal["x", "y"] = "y") -> None:
    """Leave two spines and a faint grid across one axis."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, linewidth=0.8)
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


@styled()
def png_bytes(figure: Figure) -> bytes:
    """Encode a figure as PNG, without version and date: equal figures give equal bytes."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


@styled()
def svg_element(figure: Figure, name: str) -> Markup:
    """Encode a figure as an ``<svg>`` element in the page's colours.

    Args:
        figure: The figure.
        name: Unique on the page; ids within the element begin with it.
    """
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    text = sink.getvalue().decode()
    text = text[text.index("<svg") :]
    # no header, no comments, and no stylesheet: matplotlib's one rule is in the page's
    for part in (r"<metadata>.*?</metadata>", r"<!--.*?-->", r"<style[^>]*>.*?</style>"):
        text = re.sub(part, "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    # the width stays as the natural one, which CSS limits to that of the screen
    text = re.sub(r'^<svg([^>]*?)\sheight="[^"]*"', r'<svg aria-hidden="true"\1', text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(
        r'\sid="([^"]+)"',
        lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "",
        text,
    )
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    for colour, variable in _VARIABLES.items():
        text = re.sub(rf"{colour}\b", f"var(--{variable})", text, flags=re.IGNORECASE)
    text = text.replace("'DejaVu Sans'", "var(--sans)")
    # drawn from numbers and names that matplotlib escaped: this is markup, not text
    return Markup(re.sub(r"\s*\n\s*", "\n", text))


def audit_figures(report: AuditReport) -> dict[str, Figure]:
    """Draw the figures of an audit, by name; those with nothing to show are left out."""
    spoken = (report.prompt_condition, report.headline_condition)
    conditions = [condition for condition in spoken if condition is not None]
    rule, results = report.calibration, report.pair_results
    return _drawn(
        image_scores=image_scores(report),
        rate_against_steps=rate_against_steps(report.own_cells),
        similarity_histograms=similarity_histograms(
            results, conditions=conditions, calibration=rule
        ),
        roc=roc(rule),
        memorization_against_repeats=memorization_against_repeats(
            results, conditions=conditions, threshold=rule.threshold
        ),
    )


def sweep_figures(rows: Sequence[HeadlineRow], cells: Sequence[Cell]) -> dict[str, Figure]:
    """Draw the figures of a comparison's table and cells, as ``audit_figures``."""
    return _drawn(
        before_and_after=before_and_after(rows),
        rates_against_steps=rates_against_steps(rows, cells),
        rate_against_radius=rate_against_radius(rows),
        removal_against_cost=removal_against_cost(rows),
    )


def _drawn(**figures: Figure | None) -> dict[str, Figure]:
    return {name: figure for name, figure in figures.items() if figure is not None}


def write_figures(figures: Mapping[str, Figure], folder: Path, *, prefix: str = "") -> None:
    """Write figures as PNG into ``folder/figures``; names of files begin with the prefix."""
    for name, figure in figures.items():
        write_atomically(folder / "figures" / f"{prefix}{name}.png", png_bytes(figure))


@dataclass(frozen=True)
class ScoreRow:
    """One group of images in the figure of scores.

    Attributes:
        label: What they are.
        colour: Of their marks.
        marker: The same.
        filled: Scores that are drawn as filled marks.
        hollow: Scores that are drawn as hollow marks.
    """

    label: str
    colour: str
    marker: str
    filled: Sequence[float]
    hollow: Sequence[float] = ()


def score_rows(report: AuditRecord) -> list[ScoreRow]:
    """Group the images of an audit that have scores, the suspects first."""
    found = []
    for kind in KINDS[:2]:
        own = [row for row in report.images if row.kind == kind]
        found.append(
            ScoreRow(
                _KIND_PLURALS[kind],
                *KIND_LOOK[kind][:2],
                [row.score for row in own if row.answer == "yes"],
                [row.score for row in own if row.answer != "yes"],
            )
        )
    for group, (label, colour, marker) in _UNSEEN_LOOK.items():
        scores = [image.score for image in report.unseen if image.group == group]
        found.append(ScoreRow(label, colour, marker, scores))
    planted = report.power.scores.values() if report.power is not None else ()
    found.append(ScoreRow("positive controls, planted for the test", SERIES[2], "P", [*planted]))
    return [row for row in map(_known, found) if row.filled or row.hollow]


def _known(row: ScoreRow) -> ScoreRow:
    """The row without missing scores."""
    filled, hollow = ([v for v in own if not math.isnan(v)] for own in (row.filled, row.hollow))
    return replace(row, filled=filled, hollow=hollow)


@styled()
def image_scores(report: AuditRecord) -> Figure | None:
    """Draw the scores of all images of an audit on one axis, a row for each group.

    A score is comparable between images, a similarity is not (``Scale``); above the dashed line is
    a copy. Filled marks of suspects are those answered yes. Scores beyond the ends of the axis are
    drawn at them. None where no suspect has a score.
    """
    if all(math.isnan(row.score) for row in report.images):
        return None
    rows = score_rows(report)
    scores = [value for row in rows for value in (*row.filled, *row.hollow)]
    low, high = max(min(0.0, *scores), _ENDS[0]) - 0.04, min(max(1.0, *scores), _ENDS[1]) + 0.04
    width = 5.4
    mark = _MARK * (high - low) / (72 * (width - 0.4))
    placed = [_side_by_side(np.clip([*r.filled, *r.hollow], low, high), mark) for r in rows]
    heights = [_MARK * (1 + max(tiers) - min(tiers)) + 30 for _, tiers in placed]
    figure = new_figure(width, sum(heights) / 72 + 0.75)
    axes = figure.subplots()
    plain_axes(axes, grid="x")
    axes.spines["left"].set_visible(False)
    axes.axvline(COPY, color=ALARM, linewidth=1.6, linestyle="--", zorder=1)
    top = float(sum(heights))
    axes.set(xlim=(low, high), ylim=(0, top), yticks=[])
    for row, (values, tiers), height in zip(rows, placed, heights, strict=True):
        middle = top - 18 - _MARK * (max(tiers) + 0.5)
        for chosen, face in (
            (slice(0, len(row.filled)), row.colour),
            (slice(len(row.filled), None), "none"),
        ):
            axes.scatter(
                values[chosen], middle + _MARK * tiers[chosen], s=0.75 * _MARK**2,
                marker=row.marker, facecolors=face, edgecolors=row.colour, linewidths=1.2,
                clip_on=False, zorder=3,
            )  # fmt: skip
        axes.annotate(
            f"{row.label} ({len(values)})", (0.0, top), xycoords=("axes fraction", "data"),
            xytext=(0, -4), textcoords="offset points", va="top", fontsize=10,
        )  # fmt: skip
        top -= height
    axes.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlabel("score of the closest image (a copy above 0.5)")
    return figure


def _side_by_side(values: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Put marks into tiers so that they do not cover each other, while there are tiers.

    Args:
        values: (N,) places along the axis.
        width: Of a mark, along the axis.

    Returns:
        The places, and (N,) whole numbers, 0 the middle tier.
    """
    tiers = [side * k for k in range(_TIERS // 2 + 1) for side in ((1, -1) if k else (1,))]
    ends = dict.fromkeys(tiers, -math.inf)
    chosen = np.zeros(len(values), int)
    for place in np.argsort(values, kind="stable"):
        free = [tier for tier in tiers if values[place] - ends[tier] >= width]
        tier = free[0] if free else min(tiers, key=ends.__getitem__)
        chosen[place], ends[tier] = tier, values[place]
    return values, chosen


@dataclass(frozen=True)
class RatePoint:
    """A rate with its 95 % interval, and where it is drawn: panel, curve, and place along it."""

    panel: str
    curve: str
    place: float
    rate: float
    ci95: tuple[float, float]


Look = Mapping[str, Any]
"""Colour, marker and line of a curve, as matplotlib names them."""


def rate_against_steps(cells: Sequence[Cell]) -> Figure | None:
    """Draw an audit's memorization rate against the attack's steps, by kind of pair.

    Each start and radius has a panel. None where no attack was run.
    """
    looks: dict[str, Look] = {}
    points: list[RatePoint] = []
    for kind, (colour, marker, line) in KIND_LOOK.items():
        own = [cell for cell in cells if cell.kind == kind]
        name = f"{_KIND_PLURALS[kind]} (n = {max((cell.n for cell in own), default=0)})"
        looks[name] = {"color": colour, "marker": marker, "linestyle": line, "linewidth": 1.8}
        points += _along_steps(own, name)
    return rate_curves(points, looks, "images reproduced", "attack steps", logarithmic=True)


def rates_against_steps(rows: Sequence[HeadlineRow], cells: Sequence[Cell]) -> Figure | None:
    """Draw each mitigation's rate of suspected images against the attack's steps.

    A panel for each checkpoint, initial point and radius. None where no attack was measured at
    several steps.
    """
    several = len({row.checkpoint for row in rows}) > 1
    points: list[RatePoint] = []
    for checkpoint, name in dict.fromkeys((row.checkpoint, row.mitigation) for row in rows):
        own = [
            cell
            for cell in cells
            if (cell.checkpoint, cell.mitigation, cell.kind) == (checkpoint, name, "vm")
        ]
        points += _along_steps(own, name, prefix=f"{checkpoint}: " if several else "")
    lengths = Counter((point.panel, point.curve) for point in points)
    curved = {panel for (panel, _), length in lengths.items() if length > 2}
    points = [point for point in points if point.panel in curved]
    ylabel = "suspected images reproduced"
    return rate_curves(points, _looks(rows), ylabel, "attack steps", logarithmic=True)


def _along_steps(cells: Sequence[Cell], curve: str, *, prefix: str = "") -> Iterator[RatePoint]:
    """Points of one curve in the panel of each attack.

    The rate from the prompts is that of the attack from there at 0 steps.
    """
    attacks = dict.fromkeys(_attack_of(c) for c in cells if c.condition.attack == "dori")
    for init, norm, eps in attacks:
        radius = "" if norm == "none" else f", {norm} radius {eps:.3g}"
        panel = f"{prefix}from {INIT_NAMES[init]}{radius}" if init else f"{prefix}attack"
        for cell in cells:
            start = init == "prompt" and cell.condition.attack == "prompt"
            if cell.n and (start or _attack_of(cell) == (init, norm, eps)):
                steps = cell.condition.budget.steps
                yield RatePoint(panel, curve, steps, cell.mr, cell.mr_ci95)


def _attack_of(cell: Cell) -> tuple[Init | None, Norm, float | None]:
    """Initial point, norm and radius: what the points of one curve have in common."""
    budget = cell.condition.budget
    return cell.condition.init, budget.norm, budget.eps


def rate_against_radius(rows: Sequence[HeadlineRow]) -> Figure | None:
    """Draw each mitigation's rate of suspected images against the attack's radius, at full steps.

    A panel for each checkpoint and initial point; the widest radius is on the right.
    None where all attacks had one radius.
    """
    attacked = [row for row in rows if row.inits]
    radii = sorted({(r.norm == "none", r.norm, r.eps or 0.0, ball_words(r)) for r in attacked})
    words = ["prompt", *(ball.replace(", ", "\n") for *_, ball in radii)]
    points: dict[tuple[str, str, int], RatePoint] = {}
    for row in attacked:
        own = {ball_words(r) for r in attacked if r.checkpoint == row.checkpoint}
        place = [ball for *_, ball in radii].index(ball_words(row)) + 1
        for init in row.inits if len(own) > 1 else ():
            panel = f"{row.checkpoint}: from {INIT_NAMES[init]}"
            found = {place: row.cells.get(("vm", init))}
            if init == "prompt":
                found[0] = row.prompted("vm")
            for at, cell in found.items():
                if cell is not None and cell.n:
                    point = RatePoint(panel, row.mitigation, at, cell.mr, cell.mr_ci95)
                    points[panel, row.mitigation, at] = point
    return rate_curves(
        points.values(), _looks(rows), "suspected images reproduced", "",
        words=lambda place: words[int(place)],
    )  # fmt: skip


def _looks(rows: Sequence[HeadlineRow]) -> dict[str, Look]:
    """The look of each mitigation; the baseline stands out."""
    names = dict.fromkeys(row.mitigation for row in rows if row.mitigation != BASELINE)
    lines, markers = ("-", "--", ":"), "osD^vPX"
    looks: dict[str, Look] = {
        BASELINE: {"color": TEXT, "linestyle": "-", "marker": "o", "linewidth": 2.6}
    }
    for place, name in enumerate(names):
        looks[name] = {
            "color": SERIES[place % len(SERIES)],
            "linestyle": lines[place // len(SERIES) % len(lines)],
            "marker": markers[place % len(markers)],
            "linewidth": 1.8,
        }
    return looks


@styled()
def rate_curves(
    points: Iterable[RatePoint],
    looks: Mapping[str, Look],
    ylabel: str,
    xlabel: str,
    *,
    logarithmic: bool = False,
    words: Callable[[float], str] = "{:g}".format,
) -> Figure | None:
    """Draw curves of rates; where there are few, with intervals a little apart.

    Args:
        points: Panels and curves appear in their order; None is drawn where there are none.
        looks: By curve.
        ylabel: What the rates are.
        xlabel: What the places are.
        logarithmic: Whether places are drawn so; 0 is then the prompt itself.
        words: What a place is called.
    """
    panels: dict[str, dict[str, list[RatePoint]]] = {}
    for point in points:
        panels.setdefault(point.panel, {}).setdefault(point.curve, []).append(point)
    if not panels:
        return None
    figure, grid = panel_grid(len(panels))
    for axes, (title, curves) in zip(grid, panels.items(), strict=True):
        plain_axes(axes)
        share_axis(axes)
        few = len(curves) <= _MOST_INTERVALS
        for number, (name, curve) in enumerate(curves.items()):
            curve.sort(key=lambda point: point.place)
            rates = np.array([point.rate for point in curve])
            bounds = np.array([point.ci95 for point in curve]).T
            aside = (number - (len(curves) - 1) / 2) * 5 / 72 if few else 0.0
            axes.errorbar(
                [point.place for point in curve], rates,
                yerr=np.clip(abs(bounds - rates), 0, None) if few else None,
                **looks[name], elinewidth=1.2, capsize=2.5, markersize=5.5,
                transform=axes.transData + ScaledTranslation(aside, 0, figure.dpi_scale_trans),
                clip_on=False, label=name,
            )  # fmt: skip
        places = sorted({point.place for curve in curves.values() for point in curve})
        if logarithmic:
            axes.set_xscale("symlog", linthresh=1.0)
            axes.set_xlim(0.8 * places[0] or -0.25, 1.2 * places[-1] or 0.25)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(places, [words(place) for place in places])
        axes.tick_params(axis="x", labelsize=8.5 if len(places) > 6 else 10)
        axes.set_xlabel(f"{xlabel} (0: the prompt itself)" if logarithmic and not places[0]
                        else xlabel)  # fmt: skip
        axes.set_title(title)
    figure.supylabel(ylabel, fontsize=10)
    under_legend(figure, *grid)
    return figure


def share_axis(axes: Axes) -> None:
    """Let a panel's vertical axis be a share, 0 to 100 %."""
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


@styled()
def similarity_histograms(
    results: Sequence[PairResult], *, conditions: Sequence[Condition], calibration: Calibration
) -> Figure | None:
    """Draw how similar images are to their originals, by kind and condition; None without any."""
    shown = [r for r in results if r.condition in conditions and not math.isnan(r.statistic)]
    if not shown:
        return None
    kinds = [kind for kind in KINDS if any(r.pair.kind == kind for r in shown)]
    values = [r.statistic for r in shown]
    bins = np.linspace(math.floor(min(0.0, *values) * 10) / 10, max(1.0, *values), 25)
    figure = new_figure(7.6 if len(conditions) > 1 else 5.4, 1.5 * len(kinds) + 0.6)
    grid = figure.subplots(len(kinds), len(conditions), squeeze=False, sharex=True, sharey="row")
    for row, kind in zip(grid, kinds, strict=True):
        for axes, condition in zip(row, conditions, strict=True):
            plain_axes(axes)
            own = [r.statistic for r in shown if (r.pair.kind, r.condition) == (kind, condition)]
            colour = KIND_LOOK[kind][0]
            axes.hist(own, bins=bins, color=colour, edgecolor=GROUND, linewidth=0.6)
            axes.axvline(calibration.threshold, color=ALARM, linewidth=1.6, linestyle="--")
            axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)
        row[0].set_ylabel(_KIND_PLURALS[kind].replace("suspected ", "suspected\n"))
    for axes, condition in zip(grid[0], conditions, strict=True):
        words = condition_words(condition).split(",")[0]
        axes.set_title("from the prompts" if condition.attack == "prompt" else words)
    grid[0][0].annotate(
        f"threshold {calibration.threshold:.2f}", (calibration.threshold, 0.96),
        xycoords=("data", "axes fraction"), xytext=(-5, 0), textcoords="offset points",
        color=ALARM, ha="right", va="top", fontsize=9.5,
    )  # fmt: skip
    figure.supxlabel(f"similarity to the original ({calibration.descriptor})", fontsize=10)
    return figure


@styled()
def roc(calibration: Calibration) -> Figure | None:
    """Draw how well the descriptor tells suspected images from controls; None without both."""
    if not calibration.roc:
        return None
    figure = new_figure(4.4, 4.2)
    axes = figure.subplots()
    plain_axes(axes)
    false, true, thresholds = (np.array(column) for column in zip(*calibration.roc, strict=True))
    axes.plot([0, 1], [0, 1], color=CALM, linestyle=":", linewidth=1.2)
    axes.plot(false, true, color=KIND_LOOK["vm"][0], linewidth=2.2, drawstyle="steps-post")
    passing = np.flatnonzero(thresholds >= calibration.threshold)
    if passing.size:
        place = passing[np.argmin(thresholds[passing])]
        point = (float(false[place]), float(true[place]))
        axes.plot(*point, marker="D", markersize=8, color=ALARM, clip_on=False, zorder=5)
        axes.annotate(
            f"threshold {calibration.threshold:.2f}", point, xytext=(12, -16),
            textcoords="offset points", color=ALARM, fontsize=9.5,
        )  # fmt: skip
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set_xlabel("controls above the threshold")
    axes.set_ylabel("suspected images above it")
    axes.set_title("AUC n/a" if math.isnan(calibration.auc) else f"AUC {calibration.auc:.3f}")
    return figure


@styled()
def memorization_against_repeats(
    results: Sequence[PairResult], *, conditions: Sequence[Condition], threshold: float
) -> Figure | None:
    """Draw similarity of suspected images against how often each was repeated in training.

    None where no pair has repetitions. Filled marks are images from prompts, open ones those of
    the attack; a dash is the median of a number of repetitions; an image above ``threshold``
    counts as a replica.
    """
    shown = [
        result
        for result in results
        if result.pair.kind == "vm"
        and result.pair.repeats > 0
        and result.condition in conditions
        and not math.isnan(result.statistic)
    ]
    if not shown:
        return None
    figure = new_figure(5.4, 3.5)
    axes = figure.subplots()
    plain_axes(axes)
    axes.axhline(
        threshold, color=ALARM, linewidth=1.5, linestyle="--", label=f"threshold {threshold:.2f}"
    )
    _repeat_marks(axes, [r for r in shown if r.condition.attack == "prompt"], attacked=False)
    _repeat_marks(axes, [r for r in shown if r.condition.attack == "dori"], attacked=True)
    levels = sorted({result.pair.repeats for result in shown})
    margin = 0.15 * ((levels[-1] - levels[0]) or 1.0)
    axes.set_xlim(levels[0] - margin, levels[-1] + margin)
    if len(levels) <= 8:
        axes.set_xticks(levels, [f"{level:g}" for level in levels])
    axes.set_ylim(min(0.0, *(result.statistic for result in shown)) - 0.05, 1.05)
    axes.set_xlabel("relative number of repetitions")
    axes.set_ylabel("similarity to the original")
    under_legend(figure, axes)
    return figure


def _repeat_marks(axes: Axes, results: Sequence[PairResult], *, attacked: bool) -> None:
    """Draw results and their medians, prompts and attack a little apart."""
    if not results:
        return
    aside = ScaledTranslation((7 if attacked else -7) / 72, 0, axes.figure.dpi_scale_trans)
    colour = KIND_LOOK["vm"][0]
    axes.scatter(
        [r.pair.repeats for r in results], [r.statistic for r in results],
        s=26, marker="D" if attacked else "o", linewidths=1.3, alpha=0.85,
        facecolors="none" if attacked else colour, edgecolors=colour,
        label="from the attack" if attacked else "from the prompts",
        transform=axes.transData + aside,
    )  # fmt: skip
    levels: dict[float, list[float]] = {}
    for result in results:
        levels.setdefault(result.pair.repeats, []).append(result.statistic)
    axes.plot(
        list(levels), [np.median(values) for values in levels.values()], linestyle="none",
        marker="_", markersize=13, color=TEXT, markeredgewidth=1.6,
        transform=axes.transData + aside,
    )  # fmt: skip


@styled()
def before_and_after(rows: Sequence[HeadlineRow]) -> Figure | None:
    """Draw, for every mitigation, what its prompts bring back beside what the attack does.

    A mitigation that is attacked within several radii is shown in the widest. None
    where no suspected image was measured.
    """
    groups = _by_checkpoint(rows, lambda row: row.prompted("vm") is not None or bool(row.inits))
    if not groups:
        return None
    heights = [len(group) + 0.8 for group in groups.values()]
    figure = new_figure(7.0, 0.38 * sum(heights) + 0.9 + 0.35 * len(heights))
    grid = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (checkpoint, group) in zip(grid[:, 0], groups.items(), strict=True):
        _dumbbells(axes, group)
        if len(groups) > 1:
            axes.set_title(checkpoint)
    under_legend(figure, *grid[:, 0])
    grid[-1, 0].set_xlabel("suspected images reproduced")
    return figure


def _dumbbells(axes: Axes, rows: Sequence[HeadlineRow]) -> None:
    plain_axes(axes, grid="x")
    for place, row in enumerate(rows):
        ends = []
        for cell, shift, colour, face, label in (
            (row.prompted("vm"), -0.14, KIND_LOOK["vm"][0], GROUND, "from their prompts"),
            (row.attacked("vm"), 0.14, ALARM, ALARM, "from the attack"),
        ):
            if cell is None or not cell.n:
                continue
            ends.append(cell.mr)
            axes.plot(cell.mr_ci95, [place + shift] * 2, color=colour, linewidth=1.4, zorder=2)
            axes.plot(
                cell.mr, place, marker="o", markersize=9, linestyle="none", color=colour,
                markerfacecolor=face, markeredgewidth=1.8, label=label, zorder=3, clip_on=False,
            )  # fmt: skip
        if len(ends) == 2:
            axes.plot(ends, [place, place], color=FAINT, linewidth=5, zorder=1)
        for published in (row.published.prompt, row.published.attacked) if row.published else ():
            if published is not None:
                axes.plot(
                    published.rate, place + 0.36, marker=2, markersize=8, linestyle="none",
                    color=CALM, label="the paper, on Stable Diffusion", zorder=2, clip_on=False,
                )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.mitigation for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))


@styled()
def removal_against_cost(rows: Sequence[HeadlineRow]) -> Figure | None:
    """Draw what the attack still finds against what the mitigation costs on ordinary images.

    A mitigation that is attacked within several radii is shown in the widest. Both intervals are
    95 %; a panel for each checkpoint. None where no mitigation has both numbers.
    """
    groups = _by_checkpoint(
        rows,
        lambda row: (
            row.mitigation != BASELINE
            and (cell := row.attacked("vm")) is not None
            and cell.n > 0
            and math.isfinite(row.loss_ratio)
        ),
    )
    if not groups:
        return None
    figure, grid = panel_grid(len(groups), height=3.9)
    for axes, (checkpoint, group) in zip(grid, groups.items(), strict=True):
        plain_axes(axes)
        axes.axvline(0.0, color=CALM, linewidth=1.0)
        points = [(cell, row) for row in group if (cell := row.attacked("vm"))]
        points.sort(key=lambda point: (point[0].mr, point[1].loss_ratio))
        for place, (cell, row) in enumerate(points):
            ratio = row.loss_ratio
            spread = abs(np.array([row.loss_ratio_ci95, cell.mr_ci95]) - [[ratio], [cell.mr]])
            axes.errorbar(
                ratio - 1.0, cell.mr,
                xerr=np.nan_to_num(spread[0])[:, None], yerr=np.nan_to_num(spread[1])[:, None],
                color=ALARM if cell.hits else KIND_LOOK["vm"][0], marker="o", markersize=8,
                elinewidth=1.2, linestyle="none", clip_on=False, zorder=3,
            )  # fmt: skip
            # names of marks at one height go up and down in turn
            axes.annotate(
                row.mitigation, (ratio - 1.0, cell.mr), fontsize=9, color=TEXT,
                xytext=(8, 8 if place % 2 == 0 else -14), textcoords="offset points",
            )  # fmt: skip
        share_axis(axes)
        axes.margins(x=0.25)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        if len(groups) > 1:
            axes.set_title(checkpoint)
    figure.supxlabel("denoising loss on ordinary images, change", fontsize=10)
    figure.supylabel("suspected images found by the attack", fontsize=10)
    return figure


def _by_checkpoint(
    rows: Sequence[HeadlineRow], drawn: Callable[[HeadlineRow], bool]
) -> dict[str, list[HeadlineRow]]:
    """The rows to draw by checkpoint, of each mitigation the last, which has the widest radius."""
    groups: dict[str, list[HeadlineRow]] = {}
    for row in {(row.checkpoint, row.mitigation): row for row in rows}.values():
        if drawn(row):
            groups.setdefault(row.checkpoint, []).append(row)
    return groups
