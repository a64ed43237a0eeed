"""Figures of how often embeddings draw the image, as files and for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from dori_lightning.report.locality.looks import GROUP_LOOK, colour_of, sideways
from dori_lightning.report.locality.words import START_WORDS
from dori_lightning.report.style import (
    SERIES,
    Ink,
    new_figure,
    plain_axes,
    rendered,
    styled,
    under_legend,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from dori_lightning.locality.estimates import Rate
    from dori_lightning.locality.large import AtLarge

__all__ = ["budget", "lines", "transfer"]


def budget(found: AtLarge, start: str, ink: Ink | None = None) -> bytes | None:
    """Draw success against steps for memorized and control images; None without points."""
    points = [p for p in found.budget if p.start == start]
    if not points:
        return None
    ink = ink or Ink()
    with styled(ink):
        figure = new_figure(ink.width(6.8), 3.9)
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
                    ink.kind("vm" if kind == "vm" else "control"),
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
        under_legend(figure, axes, columns=1 if ink.narrow else 2)
        return rendered(figure, ink)


def lines(found: AtLarge, ink: Ink | None = None) -> bytes | None:
    """Draw success along lines from triggers; None without lines."""
    if not found.lines:
        return None
    ink = ink or Ink()
    with styled(ink):
        figure = new_figure(ink.width(6.8), 3.9)
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
        return rendered(figure, ink)


def transfer(found: AtLarge, ink: Ink | None = None) -> bytes | None:
    """Draw success on each model by where the search began; None without models."""
    if not found.transfers:
        return None
    ink = ink or Ink()
    models = list(dict.fromkeys(t.model for t in found.transfers))
    searched = {t.model for t in found.transfers if t.searched}
    starts = list(dict.fromkeys(t.start for t in found.transfers))
    with styled(ink):
        figure = new_figure(ink.width(), 0.85 * len(models) + (2.4 if ink.narrow else 1.7))
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
                        markerfacecolor=colour if filled else ink.ground,
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
        under_legend(figure, axes, columns=1 if ink.narrow else 2)
        return rendered(figure, ink)


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
