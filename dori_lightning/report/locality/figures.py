"""Figures of where triggers lie, as files and for the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dori_lightning.report.locality.looks import GROUP_LOOK, GROUP_WORDS, colour_of, sideways
from dori_lightning.report.locality.words import START_WORDS
from dori_lightning.report.style import SERIES, Ink, new_figure, rendered, styled, under_legend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from dori_lightning.locality.embeddings import EmbeddingFindings
    from dori_lightning.locality.estimates import Estimate
    from dori_lightning.locality.maps import Place

__all__ = ["map_of", "spread"]

_SHORT_START = {"random": "random", "prompt": "own prompt", "control_prompt": "other prompt"}

_START_MARKERS = {"random": "o", "prompt": "s", "control_prompt": "^"}


def spread(found: EmbeddingFindings, ink: Ink | None = None) -> bytes:
    """Draw how far embeddings of each group are apart, and whether attacks move alike."""
    ink = ink or Ink()
    rows = [
        (
            GROUP_WORDS[s.group]
            + (f"\n(from {_SHORT_START[s.start]})" if s.start is not None else ""),
            s,
        )
        for s in found.spreads
    ]
    with styled(ink):
        high = 0.42 * max(len(rows), 6) + 1.3
        figure = new_figure(ink.width(11.4), (3 if ink.narrow else 1) * high)
        left, middle, right = figure.subplots(*((3, 1) if ink.narrow else (1, 3)))
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
                    GROUP_LOOK[row.group][1], ground=ink.ground,
                )  # fmt: skip
            axes.set_title(f"mean {title} of two")
            axes.set_ylim(len(rows) - 0.5, -0.6)
        left.axvline(found.random_distance, color=ink.alarm, linestyle="--", linewidth=1.2)
        left.set_xlim(left=0)
        left.set_xlabel("dashed: random embeddings")
        middle.set_xlabel("filled: one image; open: two images")
        left.set_yticks(range(len(rows)), [words for words, _ in rows], fontsize=9)
        names = [words if ink.narrow else "" for words, _ in rows]
        middle.set_yticks(range(len(rows)), names, fontsize=9)
        _moves(right, found, ink)
        return rendered(figure, ink)


def _moves(axes: Axes, found: EmbeddingFindings, ink: Ink) -> None:
    sideways(axes)
    names = []
    for place, move in enumerate(found.moves):
        group = "triggers" if move.held == "memorized" else "control_ends"
        colour, marker = colour_of(group), GROUP_LOOK[group][1]
        _bar(axes, place - 0.12, move.cosine, colour, marker)
        _bar(axes, place + 0.2, move.cosine_between, colour, marker, ground=ink.ground)
        names.append(f"{GROUP_WORDS[group].split(' of')[0]}\n(from {_SHORT_START[move.start]})")
    axes.axvline(0, color=ink.calm, linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.6)
    axes.set_title("mean cosine of two moves")


def map_of(found: EmbeddingFindings, ink: Ink | None = None) -> bytes | None:
    """Draw embeddings in two dimensions; None where there are too few."""
    if not found.places:
        return None
    ink = ink or Ink()
    images = list(dict.fromkeys(p.pair for p in found.places if p.what == "own_prompt"))
    colours = {image: SERIES[k % len(SERIES)] for k, image in enumerate(images)}
    with styled(ink):
        figure = new_figure(ink.width(11.0), 9.0 if ink.narrow else 5.4)
        grid = figure.subplots(*((2, 1) if ink.narrow else (1, 2)))
        for axes, kind in zip(grid, ("pca", "tsne"), strict=True):
            _scatter(axes, found.places, kind, colours, ink)
            axes.set_title({"pca": "principal components", "tsne": "t-SNE"}[kind])
            axes.set(xticks=[], yticks=[])
        under_legend(figure, grid[0], columns=1 if ink.narrow else 3)
        return rendered(figure, ink)


def _scatter(
    axes: Axes, places: Sequence[Place], kind: str, colours: dict[str, str], ink: Ink
) -> None:
    starts = {(p.pair, p.start, p.restart): getattr(p, kind) for p in places if p.what == "start"}
    said: set[str] = set()

    def point(at: tuple[float, float], label: str | None, **style: Any) -> None:
        fresh = label is not None and label not in said
        if fresh and label is not None:
            said.add(label)
        axes.plot(*at, linestyle="none", label=label if fresh else None, **style)

    for what, label, marker, colour in (
        ("control_prompt", "control prompts", "x", ink.calm),
        ("memorized_prompt", "other memorized prompts", "+", ink.text),
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
        colour = colours.get(place.pair, ink.calm)
        here = getattr(place, kind)
        if place.what == "own_prompt":
            point(
                here, f"{place.pair}: its prompt", marker="*", color=colour, markersize=15,
                markeredgecolor=ink.ground, zorder=5,
            )  # fmt: skip
            continue
        there = starts[place.pair, place.start, place.restart]
        axes.plot(*zip(there, here, strict=True), color=colour, linewidth=0.8, alpha=0.5)
        marker = _START_MARKERS[str(place.start)]
        point(there, None, marker=marker, color=colour, markerfacecolor=ink.ground, markersize=4.5)
        point(here, None, marker=marker, color=colour, markersize=6.5, zorder=4)
    for start in dict.fromkeys(start for _, start, _ in starts):
        axes.plot(
            [], [], linestyle="none", marker=_START_MARKERS[str(start)], color=ink.text,
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
