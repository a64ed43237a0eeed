"""Figures of a locality run, one for each question; None where there is nothing to draw."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from dori_lightning.locality.embeddings import EmbeddingFindings, Move, Place, Spread
from dori_lightning.locality.estimates import Estimate
from dori_lightning.locality.layers import (
    GROUPS,
    METHODS,
    ActivationFindings,
    GroupName,
    Method,
    WeightFindings,
    block_of,
)
from dori_lightning.locality.study import TransferFindings
from dori_lightning.report.figures import (
    ALARM,
    CALM,
    GROUND,
    KIND_LOOK,
    SERIES,
    TEXT,
    RatePoint,
    new_figure,
    plain_axes,
    rate_curves,
    styled,
    under_legend,
)
from dori_lightning.report.words import METHOD_WORDS, START_WORDS

GROUP_LOOK: dict[str, tuple[str, str, str]] = {
    "triggers": (SERIES[1], "o", "triggers of one image"),
    "starts": (KIND_LOOK["control"][0], "s", "their starts"),
    "control_ends": (SERIES[3], "v", "attacks on controls"),
    "memorized_prompts": (SERIES[0], "D", "memorized prompts"),
    "control_prompts": (SERIES[2], "^", "control prompts"),
}
"""Colour, marker and words of each group of embeddings."""

_SHORT_START = {"random": "random", "prompt": "own prompt", "control_prompt": "other prompt"}
_START_MARKERS = {"random": "o", "prompt": "s", "control_prompt": "^"}


def budget(found: TransferFindings, start: str) -> Figure | None:
    """Draw success against steps for memorized and control images."""
    looks = {
        f"{held} images": {"color": colour, "marker": marker}
        for held, (colour, marker, _) in (
            ("memorized", KIND_LOOK["vm"]), ("control", KIND_LOOK["control"]),
        )
    }  # fmt: skip
    points = [
        RatePoint("", f"{p.held} images", p.steps, p.rate.rate, p.rate.ci95)
        for p in found.budget
        if p.start == start
    ]
    xlabel = f"attack steps from {START_WORDS[start]}"
    return rate_curves(points, looks, "draw their image", xlabel, logarithmic=True)


def lines(found: TransferFindings) -> Figure | None:
    """Draw success along lines from triggers."""
    names = {
        "same_image": ("to another trigger of the image", "triggers"),
        "other_image": ("to a trigger of another image", "memorized_prompts"),
        "random": ("to a random embedding", "starts"),
    }
    looks = {
        name: dict(zip(("color", "marker"), GROUP_LOOK[group], strict=False))
        for name, group in names.values()
    }
    points = [
        RatePoint("", names[p.toward][0], p.place, p.rate.rate, p.rate.ci95) for p in found.lines
    ]
    xlabel = "share of the way; the trigger is at 0"
    return rate_curves(points, looks, "draw their image", xlabel)


@styled()
def transfer(found: TransferFindings) -> Figure | None:
    """Draw success on each model by where the search began."""
    if not found.transfers:
        return None
    models = list(dict.fromkeys(t.model for t in found.transfers))
    starts = list(dict.fromkeys(t.start for t in found.transfers))
    figure = new_figure(8.0, 0.85 * len(models) + 1.7)
    axes = figure.subplots()
    plain_axes(axes, grid="x")
    width = 0.76 / len(starts)
    for t in found.transfers:
        if not t.rate.n:
            continue
        row, k, memorized = models.index(t.model), starts.index(t.start), t.held == "memorized"
        colour = SERIES[k % len(SERIES)]
        place = row - 0.38 + width * (k + 0.5) + (0 if memorized else 0.06)
        words = START_WORDS[t.start]
        label = words if t.start == "prompt_itself" else f"attacked from {words}"
        alpha = 1.0 if memorized else 0.45
        axes.plot(t.rate.ci95, [place] * 2, color=colour, linewidth=1.6, alpha=alpha)
        axes.plot(
            t.rate.rate, place, linestyle="none", color=colour, clip_on=False,
            marker="o" if memorized else "^", markersize=8 if memorized else 6,
            markerfacecolor=colour if memorized else GROUND, label=label if memorized else None,
        )  # fmt: skip
    searched = {t.model for t in found.transfers if t.searched}
    names = [
        ("checkpoint\nas it is" if model == "none" else model)
        + ("\n(searched)" if model in searched else "")
        for model in models
    ]
    axes.set_yticks(range(len(models)), names)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("embeddings that draw their image; open triangles: control images")
    under_legend(figure, axes, columns=2)
    return figure


@styled()
def spread(found: EmbeddingFindings) -> Figure:
    """Draw how far embeddings of each group are apart, and whether attacks move alike."""
    rows = [(row.group, row.start, row) for row in found.spreads]
    moves = [
        ("triggers" if move.held == "memorized" else "control_ends", move.start, move)
        for move in found.moves
    ]
    figure = new_figure(11.4, 0.42 * max(len(rows), 6) + 1.3)
    left, middle, right = figure.subplots(1, 3)
    _bars(left, rows, "distance", "mean distance of two")
    _bars(middle, rows, "cosine", "mean cosine of two")
    _bars(right, moves, "cosine", "mean cosine of two moves")
    left.axvline(found.random_distance, color=ALARM, linestyle="--", linewidth=1.2)
    left.set_xlim(left=0)
    left.set_xlabel("dashed: random embeddings")
    middle.set_xlabel("filled: one image; open: two images")
    middle.set_yticklabels([])
    right.axvline(0, color=CALM, linewidth=0.8)
    return figure


def _bars(
    axes: Axes, rows: Sequence[tuple[str, str | None, Spread | Move]], name: str, title: str
) -> None:
    """Draw one mean a row, within an image (filled) and between images (open)."""
    plain_axes(axes, grid="x")
    for place, (group, _, row) in enumerate(rows):
        for shift, suffix in ((-0.12, ""), (0.2, "_between")):
            _mean(axes, getattr(row, name + suffix), place + shift, group, filled=not suffix)
    names = [
        GROUP_LOOK[group][2] + ("" if start is None else f"\n(from {_SHORT_START[start]})")
        for group, start, _ in rows
    ]
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.6)
    axes.set_title(title)


def _mean(
    axes: Axes,
    estimate: Estimate,
    place: float,
    group: str,
    *,
    filled: bool = True,
    upright: bool = False,
    **style: Any,
) -> None:
    """Draw a mean with its interval, lying or upright."""
    if math.isnan(estimate.value):
        return
    colour, marker, _ = GROUP_LOOK[group]
    interval, centre = ([estimate.low, estimate.high], [place] * 2), (estimate.value, place)
    if not math.isnan(estimate.low) and (filled or not upright):
        axes.plot(*(interval[::-1] if upright else interval), color=colour, linewidth=1.6)
    axes.plot(
        *(centre[::-1] if upright else centre), marker=marker, color=colour, markersize=6,
        linestyle="none", markerfacecolor=colour if filled else GROUND, clip_on=False, **style,
    )  # fmt: skip


@styled()
def map_of(found: EmbeddingFindings) -> Figure | None:
    """Draw embeddings in two dimensions; None where there are too few."""
    if not found.places:
        return None
    figure = new_figure(11.0, 5.4)
    grid = figure.subplots(1, 2)
    for axes, kind in zip(grid, ("pca", "tsne"), strict=True):
        _scatter(axes, found.places, kind)
        axes.set(xticks=[], yticks=[])
    grid[0].set_title("principal components")
    grid[1].set_title("t-SNE")
    under_legend(figure, grid[0], columns=3)
    return figure


def _scatter(axes: Axes, places: Sequence[Place], kind: str) -> None:
    """Draw prompts, starts and the triggers found from there."""
    images = list(dict.fromkeys(p.pair for p in places if p.what == "own_prompt"))
    colours = {image: SERIES[k % len(SERIES)] for k, image in enumerate(images)}
    starts = {(p.pair, p.start, p.restart): getattr(p, kind) for p in places if p.what == "start"}

    def point(at: tuple[float, float], colour: str, marker: str, **style: Any) -> None:
        axes.plot(*at, linestyle="none", color=colour, marker=marker, **style)

    for what, label, marker, colour in (
        ("control_prompt", "control prompts", "x", CALM),
        ("memorized_prompt", "other memorized prompts", "+", TEXT),
    ):
        for place in places:
            if place.what == what:
                at = getattr(place, kind)
                point(at, colour, marker, label=label, markersize=6, alpha=0.75)
    for place in places:
        at, colour = getattr(place, kind), colours.get(place.pair, CALM)
        if place.what == "own_prompt":
            style: dict[str, Any] = {"markersize": 15, "markeredgecolor": GROUND, "zorder": 5}
            point(at, colour, "*", label=f"{place.pair}: its prompt", **style)
        elif place.what == "end":
            start, marker = starts[place.pair, place.start, place.restart], str(place.start)
            axes.plot(*zip(start, at, strict=True), color=colour, linewidth=0.8, alpha=0.5)
            point(start, colour, _START_MARKERS[marker], markerfacecolor=GROUND, markersize=4.5)
            point(at, colour, _START_MARKERS[marker], markersize=6.5, zorder=4)
    for start in dict.fromkeys(str(start) for _, start, _ in starts):
        label = f"trigger found from {START_WORDS[start]}"
        axes.plot([], [], linestyle="none", marker=_START_MARKERS[start], color=TEXT, label=label)


def short_layer(name: str) -> str:
    """A layer's place in the network: ``down 1.0``, ``mid 0``."""
    parts = block_of(name).split(".")
    stage = parts[0].split("_")[0]
    return f"{stage} {'.'.join(part for part in parts[1:] if part.isdigit())}"


@styled()
def activations(found: ActivationFindings) -> Figure | None:
    """Draw mean distances of activations by layer and group, for each method's layers."""
    if not found.layers:
        return None
    places = _layer_places((row.method, row.layer) for row in found.layers)
    figure, panels = _layer_panels(places, "mean distance", "relative to size")
    for row in found.layers:
        upper, lower = panels[row.method]
        place = places[row.method].index(row.layer)
        _by_group(upper, row.distance, row.distance_between, place, row.group)
        _by_group(lower, row.relative, row.relative_between, place, row.group)
    for axes in figure.axes:
        axes.set_ylim(bottom=0)
    under_legend(figure, *figure.axes)
    return figure


@styled()
def weights(found: WeightFindings) -> Figure | None:
    """Draw agreement of selections by layer and group, with their sizes, for each method."""
    if not found.layers:
        return None
    places = _layer_places((row.method, row.parameter) for row in found.layers)
    figure, panels = _layer_panels(places, "intersection over union", "selected, % of layer")
    for row in found.layers:
        upper, lower = panels[row.method]
        place = places[row.method].index(row.parameter)
        _by_group(upper, row.iou, row.iou_between, place, row.group)
        at = place + _shift(row.group)
        if not math.isnan(row.chance):
            style: dict[str, Any] = {"color": TEXT, "markersize": 9, "linestyle": "none"}
            upper.plot(at, row.chance, marker="_", label="random selections", **style)
        lower.bar(at, 100 * row.size / row.units, width=0.17, color=GROUP_LOOK[row.group][0])
    for upper, lower in panels.values():
        upper.set_ylim(-0.03, 1.05)
        lower.set_ylim(bottom=0)
    under_legend(figure, *figure.axes)
    return figure


@styled()
def methods(found: WeightFindings) -> Figure | None:
    """Draw in which blocks the two methods select with triggers."""
    own = next((a for a in found.agreement if a.group == "triggers" and a.nemo), None)
    if own is None:
        return None
    figure = new_figure(8.0, 3.8)
    axes = figure.subplots()
    places = np.arange(len(own.blocks))
    for shift, values, group, label in (
        (-0.2, own.nemo, "triggers", "NeMo: value neurons"),
        (0.2, own.wanda, "memorized_prompts", "Wanda: feed-forward weights"),
    ):
        shares = [100 * value for value in values]
        axes.bar(places + shift, shares, width=0.38, label=label, color=GROUP_LOOK[group][0])
    _layer_axis(axes, own.blocks)
    axes.set_ylabel("% of the selection")
    under_legend(figure, axes, columns=2)
    return figure


def _layer_places(layers: Iterable[tuple[Method, str]]) -> dict[Method, list[str]]:
    """Layers of each method, in the order of its panels."""
    named = list(dict.fromkeys(layers))
    of = {method: [layer for own, layer in named if own == method] for method in METHODS}
    return {method: own for method, own in of.items() if own}


def _layer_panels(
    layers: Mapping[Method, Sequence[str]], upper_label: str, lower_label: str
) -> tuple[Figure, dict[Method, tuple[Axes, Axes]]]:
    """A figure with two panels above each other per method; methods beside each other."""
    widths = [len(own) for own in layers.values()]
    figure = new_figure(2.0 + 0.48 * sum(widths), 6.4)
    grid = figure.subplots(2, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    for (upper, lower), (method, own) in zip(grid.T, layers.items(), strict=True):
        _layer_axis(upper, [])
        _layer_axis(lower, own)
        upper.set_title(METHOD_WORDS[method])
    grid[0, 0].set_ylabel(upper_label)
    grid[1, 0].set_ylabel(lower_label)
    return figure, dict(zip(layers, map(tuple, grid.T), strict=True))


def _layer_axis(axes: Axes, layers: Sequence[str]) -> None:
    plain_axes(axes)
    axes.set_xticks(
        range(len(layers)), [short_layer(name) for name in layers],
        rotation=60, fontsize=9, ha="right", rotation_mode="anchor",
    )  # fmt: skip


def _shift(group: GroupName) -> float:
    """Place of a group's mark beside the middle of its layer."""
    return 0.19 * (GROUPS.index(group) - (len(GROUPS) - 1) / 2)


def _by_group(
    axes: Axes, within: Estimate, between: Estimate, layer: int, group: GroupName
) -> None:
    """Draw a layer's mean of one group; of triggers also that between images."""
    at = layer + _shift(group)
    _mean(axes, within, at, group, upright=True, label=GROUP_LOOK[group][2])
    if group == "triggers":
        words = "triggers of two images"
        _mean(axes, between, at + 0.07, group, upright=True, filled=False, label=words)
