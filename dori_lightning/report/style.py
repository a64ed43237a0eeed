"""Colours, type sizes and output that all figures share.

A figure goes to a file as PNG, or onto the page as SVG. On the page its colours are the page's own
variables, so that one drawing serves light and dark screens and paper, and its text is text.
"""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from dori_lightning.types import Kind

__all__ = [
    "KIND_LOOK",
    "SERIES",
    "Ink",
    "new_figure",
    "plain_axes",
    "rendered",
    "styled",
    "under_legend",
]

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


class Ink:
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
def styled(ink: Ink) -> Iterator[None]:
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


def rendered(figure: Figure, ink: Ink) -> bytes:
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
