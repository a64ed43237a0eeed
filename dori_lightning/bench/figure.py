"""The figure of a measurement of speed: the ladder, the other parts, and growth."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter, StrMethodFormatter

from dori_lightning.report.style import Ink, new_figure, plain_axes, rendered, styled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from matplotlib.axes import Axes

    from dori_lightning.bench.record import Family, Row

__all__ = ["speed_figure"]

_LADDERS = {"attack": "attack", "sd14": "attack, SD 1.4's shape"}
_PARTS = {
    "sampling": "drawing",
    "nemo": "NeMo",
    "wanda": "Wanda",
    "finetuning": "tuning epoch",
}


def speed_figure(families: Mapping[str, Family], ink: Ink | None = None) -> bytes | None:
    """Draw what was measured; None where there is nothing to draw.

    Args:
        families: By name.
        ink: How to draw.
    """
    ink = ink or Ink()
    panels: list[tuple[str, Callable[[Axes], None]]] = []
    for name, title in _LADDERS.items():
        family = families.get(name)
        if family is not None and any(row.seconds for row in family.rows):
            panels.append((f"{title}: seconds per pair", _ladder(family, ink)))
            if family.limits is not None:
                panels.append((f"{title}: share of the limits", _shares(family, ink)))
    parts = [families[name] for name in _PARTS if name in families]
    if any(row.seconds for family in parts for row in family.rows):
        panels.append(("other parts: times as fast as the first way", _ratios(parts, ink)))
    growth = families.get("scaling")
    if growth is not None:
        panels.append(("growth: cost per pair", _growth(growth, ink)))
    if not panels:
        return None
    with styled(ink):
        columns = ink.columns(len(panels))
        lines = -(-len(panels) // columns)
        figure = new_figure(ink.width(10.4), 2.9 * lines)
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, draw) in zip(grid.flat, panels, strict=False):
            plain_axes(axes)
            draw(axes)
            axes.set_title(title)
        return rendered(figure, ink)


def _measured(family: Family) -> list[Row]:
    return [row for row in family.rows if row.seconds]


def _colour(row: Row, ink: Ink) -> str:
    return ink.kind("vm") if row.name == "ours" else ink.calm


def _ladder(family: Family, ink: Ink) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for place, row in enumerate(_measured(family)):
            low, high = (f(row.seconds) / row.pairs for f in (min, max))
            axes.bar(place, row.per_pair, width=0.62, color=_colour(row, ink))
            axes.plot([place, place], [low, high], color=ink.text, linewidth=1.4)
            axes.annotate(
                f"{row.per_pair:.3g}", (place, high), xytext=(0, 3), ha="center",
                textcoords="offset points", fontsize=9,
            )  # fmt: skip
        _name(axes, family)
        axes.margins(y=0.15)

    return draw


def _shares(family: Family, ink: Ink) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for place, row in enumerate(_measured(family)):
            for share, marker, filled in (
                (row.peak_share, "o", True), (row.alone_share, "s", False),
            ):  # fmt: skip
                if share is not None:
                    axes.plot(
                        place, share, marker=marker, linestyle="none", markersize=7,
                        color=_colour(row, ink), clip_on=False,
                        markerfacecolor=_colour(row, ink) if filled else ink.ground,
                    )  # fmt: skip
        axes.axhline(1.0, color=ink.calm, linewidth=0.8, linestyle=":")
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel("filled: one large product; open: its own layers alone", fontsize=9)
        _name(axes, family)

    return draw


def _name(axes: Axes, family: Family) -> None:
    names = [row.name for row in _measured(family)]
    axes.set_xticks(range(len(names)), names)


def _ratios(parts: list[Family], ink: Ink) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        labels: list[str] = []
        for family in parts:
            rows = _measured(family)
            for row in rows[1:]:
                place = len(labels)
                ratio = rows[0].per_pair / row.per_pair
                axes.bar(place, ratio, width=0.62, color=ink.kind("vm"))
                axes.annotate(
                    f"{ratio:.3g}", (place, ratio), xytext=(0, 3), ha="center",
                    textcoords="offset points", fontsize=9,
                )  # fmt: skip
                labels.append(f"{_PARTS[family.name]}\n{row.name}")
        axes.axhline(1.0, color=ink.calm, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(labels)), labels, fontsize=9)
        axes.margins(y=0.18)

    return draw


def _growth(family: Family, ink: Ink) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        ticks: set[int] = set()
        for word, marker, colour in (
            ("pairs", "o", ink.kind("vm")),
            ("budget", "s", ink.kind("tm")),
        ):
            points = [
                (int(row.name.split()[0]), row.per_pair)
                for row in _measured(family)
                if row.name.split()[1].startswith(word)
            ]
            if points:
                first = points[0][1]
                axes.plot(
                    [n for n, _ in points], [cost / first for _, cost in points],
                    marker=marker, color=colour, label=f"number of {word.rstrip('s')}s",
                )  # fmt: skip
                ticks.update(n for n, _ in points)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.set_ylim(0, None)
        axes.set_ylabel("times the first")
        axes.legend(loc="lower right")

    return draw
