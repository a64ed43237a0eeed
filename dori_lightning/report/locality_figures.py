"""Figures of where triggers lie, as files and for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from dori_lightning.locality.embeddings import GROUPS, EmbeddingFindings, Place
from dori_lightning.locality.estimates import Estimate, Rate
from dori_lightning.locality.layers import (
    ActivationFindings,
    LayerSelection,
    WeightFindings,
    block_of,
)
from dori_lightning.report.figures import (
    ALARM,
    CALM,
    GROUND,
    KIND_LOOK,
    SERIES,
    TEXT,
    new_figure,
    plain_axes,
    styled,
    under_legend,
)
from dori_lightning.report.words import METHOD_WORDS, START_WORDS

if TYPE_CHECKING:
    from dori_lightning.locality.study import Transfers


# -------- looks
# How groups of embeddings look in the figures on locality.

GROUP_LOOK: dict[str, tuple[str, str]] = {
    "triggers": (SERIES[1], "o"),
    "starts": (KIND_LOOK["control"][0], "s"),
    "control_ends": (SERIES[3], "v"),
    "memorized_prompts": (SERIES[0], "D"),
    "control_prompts": (SERIES[2], "^"),
}
"""Per group of embeddings: colour and marker."""

GROUP_WORDS = {
    "triggers": "triggers of one image",
    "starts": "their starts",
    "control_ends": "attacks on controls",
    "memorized_prompts": "memorized prompts",
    "control_prompts": "control prompts",
}


def colour_of(group: str) -> str:
    """Colour of a group."""
    return GROUP_LOOK[group][0]


def sideways(axes: Axes) -> None:
    """Plain axes for bars that lie: a faint vertical grid."""
    plain_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", linewidth=0.8)


# -------- figures

_SHORT_START = {"random": "random", "prompt": "own prompt", "control_prompt": "other prompt"}

_START_MARKERS = {"random": "o", "prompt": "s", "control_prompt": "^"}


def spread(found: EmbeddingFindings) -> Figure:
    """Draw how far embeddings of each group are apart, and whether attacks move alike."""
    rows = [
        (
            GROUP_WORDS[s.group]
            + (f"\n(from {_SHORT_START[s.start]})" if s.start is not None else ""),
            s,
        )
        for s in found.spreads
    ]
    with styled():
        high = 0.42 * max(len(rows), 6) + 1.3
        figure = new_figure(11.4, high)
        left, middle, right = figure.subplots(1, 3)
        for axes, name, title in (
            (left, "distance", "distance"),
            (middle, "cosine", "cosine"),
        ):
            sideways(axes)
            for place, (_, row) in enumerate(rows):
                colour = colour_of(row.group)
                _bar(axes, place - 0.12, getattr(row, name), colour, GROUP_LOOK[row.group][1])
                _bar(
                    axes, place + 0.2, getattr(row, f"{name}_between"), colour,
                    GROUP_LOOK[row.group][1], ground=GROUND,
                )  # fmt: skip
            axes.set_title(f"mean {title} of two")
            axes.set_ylim(len(rows) - 0.5, -0.6)
        left.axvline(found.random_distance, color=ALARM, linestyle="--", linewidth=1.2)
        left.set_xlim(left=0)
        left.set_xlabel("dashed: random embeddings")
        middle.set_xlabel("filled: one image; open: two images")
        left.set_yticks(range(len(rows)), [words for words, _ in rows], fontsize=9)
        middle.set_yticks(range(len(rows)), [""] * len(rows))
        _moves(right, found)
        return figure


def _moves(axes: Axes, found: EmbeddingFindings) -> None:
    sideways(axes)
    names = []
    for place, move in enumerate(found.moves):
        group = "triggers" if move.held == "memorized" else "control_ends"
        colour, marker = colour_of(group), GROUP_LOOK[group][1]
        _bar(axes, place - 0.12, move.cosine, colour, marker)
        _bar(axes, place + 0.2, move.cosine_between, colour, marker, ground=GROUND)
        names.append(f"{GROUP_WORDS[group].split(' of')[0]}\n(from {_SHORT_START[move.start]})")
    axes.axvline(0, color=CALM, linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.6)
    axes.set_title("mean cosine of two moves")


def map_of(found: EmbeddingFindings) -> Figure | None:
    """Draw embeddings in two dimensions; None where there are too few."""
    if not found.places:
        return None
    images = list(dict.fromkeys(p.pair for p in found.places if p.what == "own_prompt"))
    colours = {image: SERIES[k % len(SERIES)] for k, image in enumerate(images)}
    with styled():
        figure = new_figure(11.0, 5.4)
        grid = figure.subplots(1, 2)
        for axes, kind in zip(grid, ("pca", "tsne"), strict=True):
            _scatter(axes, found.places, kind, colours)
            axes.set_title({"pca": "principal components", "tsne": "t-SNE"}[kind])
            axes.set(xticks=[], yticks=[])
        under_legend(figure, grid[0], columns=3)
        return figure


def _scatter(axes: Axes, places: Sequence[Place], kind: str, colours: dict[str, str]) -> None:
    starts = {(p.pair, p.start, p.restart): getattr(p, kind) for p in places if p.what == "start"}
    said: set[str] = set()

    def point(at: tuple[float, float], label: str | None, **style: Any) -> None:
        fresh = label is not None and label not in said
        if fresh and label is not None:
            said.add(label)
        axes.plot(*at, linestyle="none", label=label if fresh else None, **style)

    for what, label, marker, colour in (
        ("control_prompt", "control prompts", "x", CALM),
        ("memorized_prompt", "other memorized prompts", "+", TEXT),
    ):
        for place in places:
            if place.what == what:
                point(
                    getattr(place, kind), label, marker=marker, color=colour, markersize=6,
                    alpha=0.75,
                )  # fmt: skip
    for place in places:
        if place.what not in ("end", "own_prompt"):
            continue
        colour = colours.get(place.pair, CALM)
        here = getattr(place, kind)
        if place.what == "own_prompt":
            point(
                here, f"{place.pair}: its prompt", marker="*", color=colour, markersize=15,
                markeredgecolor=GROUND, zorder=5,
            )  # fmt: skip
            continue
        there = starts[place.pair, place.start, place.restart]
        axes.plot(*zip(there, here, strict=True), color=colour, linewidth=0.8, alpha=0.5)
        marker = _START_MARKERS[str(place.start)]
        point(there, None, marker=marker, color=colour, markerfacecolor=GROUND, markersize=4.5)
        point(here, None, marker=marker, color=colour, markersize=6.5, zorder=4)
    for start in dict.fromkeys(start for _, start, _ in starts):
        axes.plot(
            [], [], linestyle="none", marker=_START_MARKERS[str(start)], color=TEXT,
            label=f"trigger found from {START_WORDS[str(start)]}",
        )  # fmt: skip


def _bar(
    axes: Axes, place: float, estimate: Estimate, colour: str, marker: str,
    ground: str | None = None,
) -> None:  # fmt: skip
    """Draw a mean with its interval, filled, or open on a ground."""
    if math.isnan(estimate.value):
        return
    if not math.isnan(estimate.low):
        axes.plot([estimate.low, estimate.high], [place] * 2, color=colour, linewidth=1.6)
    axes.plot(
        estimate.value, place, marker=marker, color=colour, markersize=6.5, linestyle="none",
        markerfacecolor=colour if ground is None else ground, clip_on=False,
    )  # fmt: skip


# -------- layers
# Figures of activations and selected weights by layer, as files and for the page.


def short_layer(name: str) -> str:
    """A layer's place in the network: ``down 1.0``, ``mid 0``."""
    parts = block_of(name).split(".")
    stage = parts[0].split("_")[0]
    return f"{stage} {'.'.join(part for part in parts[1:] if part.isdigit())}"


def activations(found: ActivationFindings) -> Figure | None:
    """Draw mean distances of activations by layer and group; None without layers."""
    panels = [method for method in METHOD_WORDS if any(r.method == method for r in found.layers)]
    if not panels:
        return None
    with styled():
        figure, grid = _sheet(
            [len({r.layer for r in found.layers if r.method == m}) for m in panels]
        )
        for method, both in zip(panels, grid, strict=True):
            rows = [row for row in found.layers if row.method == method]
            layers = list(dict.fromkeys(row.layer for row in rows))
            for axes, name in zip(both, ("distance", "relative"), strict=True):
                for group in GROUPS:
                    own = {row.layer: row for row in rows if row.group == group}
                    if not own:
                        continue
                    _marks(axes, [getattr(own[k], name) for k in layers], group)
                    if group == "triggers":
                        _marks(
                            axes, [getattr(own[k], f"{name}_between") for k in layers], group,
                            between=True,
                        )  # fmt: skip
                axes.set_ylim(bottom=0)
                _names(axes, layers if axes is both[1] else [])
            both[0].set_title(f"{METHOD_WORDS[method]}'s layers")
            if both is grid[0]:
                both[0].set_ylabel("mean distance")
                both[1].set_ylabel("relative to size")
        under_legend(figure, *(axes for both in grid for axes in both), columns=3)
        return figure


def weights(found: WeightFindings) -> Figure | None:
    """Draw agreement of selections by layer and group, with their sizes; None without layers."""
    panels = [method for method in METHOD_WORDS if any(r.method == method for r in found.layers)]
    if not panels:
        return None
    with styled():
        figure, grid = _sheet(
            [len({r.parameter for r in found.layers if r.method == m}) for m in panels]
        )
        for method, (upper, lower) in zip(panels, grid, strict=True):
            rows = [row for row in found.layers if row.method == method]
            layers = list(dict.fromkeys(row.parameter for row in rows))
            for group in GROUPS:
                own = {row.parameter: row for row in rows if row.group == group}
                if own:
                    _selections(upper, lower, [own[k] for k in layers], group)
            upper.set_ylim(-0.03, 1.05)
            lower.set_ylim(bottom=0)
            _names(upper, [])
            _names(lower, layers)
            upper.set_title(METHOD_WORDS[method])
            if upper is grid[0][0]:
                upper.set_ylabel("intersection over union")
                lower.set_ylabel("selected, % of layer")
        under_legend(figure, *(axes for both in grid for axes in both), columns=3)
        return figure


def _selections(upper: Axes, lower: Axes, rows: Sequence[LayerSelection], group: str) -> None:
    _marks(upper, [row.iou for row in rows], group)
    if group == "triggers":
        _marks(upper, [row.iou_between for row in rows], group, between=True)
    shift, colour = _shift(group), GROUP_LOOK[group][0]
    for place, row in enumerate(rows):
        if not math.isnan(row.chance):
            upper.plot(
                place + shift, row.chance, marker="_", color=TEXT, markersize=9,
                linestyle="none", label="random selections" if place == 0 else None,
            )  # fmt: skip
    lower.bar(
        np.arange(len(rows)) + shift, [100 * row.size / row.units for row in rows], width=0.17,
        color=colour,
    )  # fmt: skip


def methods(found: WeightFindings) -> Figure | None:
    """Draw in which blocks the two methods select with triggers; None where they do not."""
    own = next((a for a in found.agreement if a.group == "triggers" and a.nemo), None)
    if own is None:
        return None
    with styled():
        figure = new_figure(8.0, 3.8)
        axes = figure.subplots()
        plain_axes(axes)
        places = np.arange(len(own.blocks))
        for shift, values, group, label in (
            (-0.2, own.nemo, "triggers", "NeMo: value neurons"),
            (0.2, own.wanda, "memorized_prompts", "Wanda: feed-forward weights"),
        ):
            axes.bar(
                places + shift, [100 * value for value in values], width=0.38, label=label,
                color=GROUP_LOOK[group][0],
            )  # fmt: skip
        _names(axes, own.blocks)
        axes.set_ylabel("% of the selection")
        under_legend(figure, axes, columns=2)
        return figure


def _shift(group: str) -> float:
    return 0.19 * (GROUPS.index(group) - (len(GROUPS) - 1) / 2)


def _marks(
    axes: Axes,
    estimates: Sequence[Estimate],
    group: str,
    *,
    between: bool = False,
) -> None:
    colour, marker = GROUP_LOOK[group]
    label = "triggers of two images" if between else GROUP_WORDS[group]
    for place, estimate in enumerate(estimates):
        if math.isnan(estimate.value):
            continue
        at = place + _shift(group) + (0.07 if between else 0.0)
        if not between and not math.isnan(estimate.low):
            axes.plot([at] * 2, [estimate.low, estimate.high], color=colour, linewidth=1.6)
        axes.plot(
            at, estimate.value, marker=marker, color=colour, markersize=5.5, linestyle="none",
            markerfacecolor=GROUND if between else colour,
            label=label if place == 0 else None,
        )  # fmt: skip


def _names(axes: Axes, layers: Sequence[str]) -> None:
    plain_axes(axes)
    if layers:
        axes.set_xticks(
            range(len(layers)), [short_layer(name) for name in layers], rotation=60, fontsize=9,
            ha="right", rotation_mode="anchor",
        )  # fmt: skip
    else:
        axes.set_xticks([])


def _sheet(widths: Sequence[int]) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """A figure with two panels above each other per method; methods side by side where wide."""
    figure = new_figure(2.0 + 0.48 * sum(widths), 6.4)
    upper, lower = figure.subplots(
        2, len(widths), squeeze=False, gridspec_kw={"width_ratios": list(widths)}
    )
    return figure, list(zip(upper, lower, strict=True))


# -------- rates
# Figures of how often embeddings draw the image, as files and for the page.


def budget(found: Transfers, start: str) -> Figure | None:
    """Draw success against steps for memorized and control images; None without points."""
    points = [p for p in found.budget if p.start == start]
    if not points:
        return None
    with styled():
        figure = new_figure(6.8, 3.9)
        axes = figure.subplots()
        plain_axes(axes)
        for held, label, kind in (
            ("memorized", "memorized images", "vm"),
            ("control", "control images", "control"),
        ):
            own = sorted((p for p in points if p.held == held), key=lambda p: p.steps)
            if own:
                _curve(
                    axes, [p.steps for p in own], [p.rate for p in own],
                    KIND_LOOK["vm" if kind == "vm" else "control"][0],
                    f"{label} (n = {max(p.rate.n for p in own)})",
                    "o" if kind == "vm" else "^",
                )  # fmt: skip
        steps = sorted({p.steps for p in points})
        axes.set_xscale("symlog", linthresh=1.0)
        axes.xaxis.set_major_locator(FixedLocator(steps))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(steps, [str(s) for s in steps])
        axes.set_xlabel(f"attack steps from {START_WORDS[start]}")
        _share(axes)
        under_legend(figure, axes, columns=2)
        return figure


def lines(found: Transfers) -> Figure | None:
    """Draw success along lines from triggers; None without lines."""
    if not found.lines:
        return None
    with styled():
        figure = new_figure(6.8, 3.9)
        axes = figure.subplots()
        plain_axes(axes)
        for toward, label, group in (
            ("same_image", "another trigger of the image", "triggers"),
            ("other_image", "a trigger of another image", "memorized_prompts"),
            ("random", "a random embedding", "starts"),
        ):
            own = sorted((p for p in found.lines if p.toward == toward), key=lambda p: p.place)
            if own:
                _curve(
                    axes, [p.place for p in own], [p.rate for p in own], colour_of(group),
                    f"to {label} (n = {max(p.rate.n for p in own)})", GROUP_LOOK[group][1],
                )  # fmt: skip
        axes.set_xlim(0, 1)
        axes.set_xticks(sorted({p.place for p in found.lines} | {0.0, 1.0}))
        axes.set_xlabel("share of the way; the trigger is at 0")
        _share(axes)
        under_legend(figure, axes, columns=1)
        return figure


def transfer(found: Transfers) -> Figure | None:
    """Draw success on each model by where the search began; None without models."""
    if not found.transfers:
        return None
    models = list(dict.fromkeys(t.model for t in found.transfers))
    searched = {t.model for t in found.transfers if t.searched}
    starts = list(dict.fromkeys(t.start for t in found.transfers))
    with styled():
        figure = new_figure(8.0, 0.85 * len(models) + 1.7)
        axes = figure.subplots()
        sideways(axes)
        width = 0.76 / len(starts)
        for row, model in enumerate(models):
            for k, start in enumerate(starts):
                for held in ("memorized", "control"):
                    rate = next(
                        (
                            t.rate for t in found.transfers
                            if (t.model, t.start, t.held) == (model, start, held) and t.rate.n
                        ),
                        None,
                    )  # fmt: skip
                    if rate is None:
                        continue
                    colour = SERIES[k % len(SERIES)]
                    place = row - 0.38 + width * (k + 0.5) + (0 if held == "memorized" else 0.06)
                    filled = held == "memorized"
                    axes.plot(rate.ci95, [place] * 2, color=colour, linewidth=1.6,
                              alpha=1.0 if filled else 0.45)  # fmt: skip
                    axes.plot(
                        rate.rate, place, linestyle="none", color=colour, clip_on=False,
                        marker="o" if filled else "^", markersize=8 if filled else 6,
                        markerfacecolor=colour if filled else GROUND,
                        label=_way(start) if filled and row == 0 else None,
                    )  # fmt: skip
        names = {"none": "checkpoint\nas it is"}
        axes.set_yticks(
            range(len(models)),
            [names.get(m, m) + ("\n(searched)" if m in searched else "") for m in models],
        )
        axes.set_ylim(len(models) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("embeddings that draw their image; open triangles: control images")
        under_legend(figure, axes, columns=2)
        return figure


def _way(start: str) -> str:
    """How embeddings came about, for a legend."""
    words = START_WORDS[start]
    return words if start == "prompt_itself" else f"attacked from {words}"


def _curve(
    axes: Axes, at: Sequence[float], rates: Sequence[Rate], colour: str, label: str, marker: str
) -> None:
    low, high = zip(*(rate.ci95 for rate in rates), strict=True)
    axes.fill_between(at, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.plot(
        at, [rate.rate for rate in rates], color=colour, marker=marker, linewidth=2, label=label,
        clip_on=False,
    )  # fmt: skip


def _share(axes: Axes) -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("draw their image")
