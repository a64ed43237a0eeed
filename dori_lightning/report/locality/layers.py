"""Figures of activations and selected weights by layer, as files and for the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dori_lightning.locality.groups import GROUPS
from dori_lightning.locality.weights import block_of
from dori_lightning.report.locality.looks import GROUP_LOOK, GROUP_WORDS
from dori_lightning.report.locality.words import METHOD_WORDS
from dori_lightning.report.style import Ink, new_figure, plain_axes, rendered, styled, under_legend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dori_lightning.locality.activations import ActivationFindings
    from dori_lightning.locality.estimates import Estimate
    from dori_lightning.locality.weights import LayerSelection, WeightFindings

__all__ = ["activations", "methods", "short_layer", "weights"]


def short_layer(name: str) -> str:
    """A layer's place in the network: ``down 1.0``, ``mid 0``."""
    parts = block_of(name).split(".")
    stage = parts[0].split("_")[0]
    return f"{stage} {'.'.join(part for part in parts[1:] if part.isdigit())}"


def activations(found: ActivationFindings, ink: Ink | None = None) -> bytes | None:
    """Draw mean distances of activations by layer and group; None without layers."""
    panels = [method for method in METHOD_WORDS if any(r.method == method for r in found.layers)]
    if not panels:
        return None
    ink = ink or Ink()
    with styled(ink):
        figure, grid = _sheet(
            [len({r.layer for r in found.layers if r.method == m}) for m in panels], ink
        )
        for method, both in zip(panels, grid, strict=True):
            rows = [row for row in found.layers if row.method == method]
            layers = list(dict.fromkeys(row.layer for row in rows))
            for axes, name in zip(both, ("distance", "relative"), strict=True):
                for group in GROUPS:
                    own = {row.layer: row for row in rows if row.group == group}
                    if not own:
                        continue
                    _marks(axes, [getattr(own[k], name) for k in layers], group, ink)
                    if group == "triggers":
                        _marks(
                            axes, [getattr(own[k], f"{name}_between") for k in layers], group,
                            ink, between=True,
                        )  # fmt: skip
                axes.set_ylim(bottom=0)
                _names(axes, layers if axes is both[1] else [])
            both[0].set_title(f"{METHOD_WORDS[method]}'s layers")
            if ink.narrow or both is grid[0]:
                both[0].set_ylabel("mean distance")
                both[1].set_ylabel("relative to size")
        under_legend(figure, *(axes for both in grid for axes in both), columns=_columns(ink))
        return rendered(figure, ink)


def weights(found: WeightFindings, ink: Ink | None = None) -> bytes | None:
    """Draw agreement of selections by layer and group, with their sizes; None without layers."""
    panels = [method for method in METHOD_WORDS if any(r.method == method for r in found.layers)]
    if not panels:
        return None
    ink = ink or Ink()
    with styled(ink):
        figure, grid = _sheet(
            [len({r.parameter for r in found.layers if r.method == m}) for m in panels], ink
        )
        for method, (upper, lower) in zip(panels, grid, strict=True):
            rows = [row for row in found.layers if row.method == method]
            layers = list(dict.fromkeys(row.parameter for row in rows))
            for group in GROUPS:
                own = {row.parameter: row for row in rows if row.group == group}
                if own:
                    _selections(upper, lower, [own[k] for k in layers], group, ink)
            upper.set_ylim(-0.03, 1.05)
            lower.set_ylim(bottom=0)
            _names(upper, [])
            _names(lower, layers)
            upper.set_title(METHOD_WORDS[method])
            if ink.narrow or upper is grid[0][0]:
                upper.set_ylabel("intersection over union")
                lower.set_ylabel("selected, % of layer")
        under_legend(figure, *(axes for both in grid for axes in both), columns=_columns(ink))
        return rendered(figure, ink)


def _selections(
    upper: Axes, lower: Axes, rows: Sequence[LayerSelection], group: str, ink: Ink
) -> None:
    _marks(upper, [row.iou for row in rows], group, ink)
    if group == "triggers":
        _marks(upper, [row.iou_between for row in rows], group, ink, between=True)
    shift, colour = _shift(group), GROUP_LOOK[group][0]
    for place, row in enumerate(rows):
        if not math.isnan(row.chance):
            upper.plot(
                place + shift, row.chance, marker="_", color=ink.text, markersize=9,
                linestyle="none", label="random selections" if place == 0 else None,
            )  # fmt: skip
    lower.bar(
        np.arange(len(rows)) + shift, [100 * row.size / row.units for row in rows], width=0.17,
        color=colour,
    )  # fmt: skip


def methods(found: WeightFindings, ink: Ink | None = None) -> bytes | None:
    """Draw in which blocks the two methods select with triggers; None where they do not."""
    own = next((a for a in found.agreement if a.group == "triggers" and a.nemo), None)
    if own is None:
        return None
    ink = ink or Ink()
    with styled(ink):
        figure = new_figure(ink.width(), 3.8)
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
        under_legend(figure, axes, columns=1 if ink.narrow else 2)
        return rendered(figure, ink)


def _columns(ink: Ink) -> int:
    return 1 if ink.narrow else 3


def _shift(group: str) -> float:
    return 0.19 * (GROUPS.index(group) - (len(GROUPS) - 1) / 2)


def _marks(
    axes: Axes, estimates: Sequence[Estimate], group: str, ink: Ink, *, between: bool = False
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
            markerfacecolor=ink.ground if between else colour,
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


def _sheet(widths: Sequence[int], ink: Ink) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """A figure with two panels above each other per method; methods side by side where wide."""
    if ink.narrow:
        figure = new_figure(ink.width(), 4.6 * len(widths) + 1.6)
        column = list(figure.subplots(2 * len(widths), 1))
        return figure, [(column[k], column[k + 1]) for k in range(0, len(column), 2)]
    figure = new_figure(2.0 + 0.48 * sum(widths), 6.4)
    upper, lower = figure.subplots(
        2, len(widths), squeeze=False, gridspec_kw={"width_ratios": list(widths)}
    )
    return figure, list(zip(upper, lower, strict=True))
