"""The figure of a comparison that holds what is removed against what it costs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dori_lightning.report.belonging import BASELINE
from dori_lightning.report.style import Ink, new_figure, plain_axes, rendered, styled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from dori_lightning.report.headline import HeadlineRow

__all__ = ["removal_against_price"]


def removal_against_price(rows: Sequence[HeadlineRow], ink: Ink | None = None) -> bytes | None:
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
    ink = ink or Ink()
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
    known = attacked is not None and attacked.n > 0 and math.isfinite(row.price.loss_ratio)
    return known and row.mitigation != BASELINE


def _panel(axes: Axes, rows: Sequence[HeadlineRow], ink: Ink) -> None:
    plain_axes(axes)
    axes.axvline(0.0, color=ink.calm, linewidth=1.0)
    for place, row in enumerate(_by_height(rows)):
        assert row.main is not None
        assert row.main.vm is not None
        cell, ratio = row.main.vm, row.price.loss_ratio
        found = cell.hits > 0
        bounds = np.array([row.price.loss_ratio_ci95, cell.mr_ci95])
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
            row.price.loss_ratio,
        ),
    )
