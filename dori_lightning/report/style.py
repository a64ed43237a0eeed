"""Colours, type sizes and PNG output that all figures share."""

from __future__ import annotations

import io
from contextlib import contextmanager
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes

    from dori_lightning.types import Kind

__all__ = ["KIND_STYLE", "Ink", "figure_png", "new_figure", "plain_axes", "styled"]

KIND_STYLE: dict[Kind, tuple[str, str, str, str]] = {
    "vm": ("#0072B2", "#56B4E9", "o", "-"),
    "tm": ("#B3600A", "#E69F00", "s", "--"),
    "control": ("#5F6368", "#B8BCC2", "^", ":"),
}
"""Per kind: colour on light and on dark ground (after Okabe and Ito), marker and line."""


class Ink:
    """Colours of one theme.

    Args:
        dark: Whether the ground is dark.
    """

    def __init__(self, *, dark: bool) -> None:
        self.dark = dark
        self.ground = "#171A1E" if dark else "#FFFFFF"
        self.text = "#E6E8EB" if dark else "#1C2024"
        self.faint = "#3A4048" if dark else "#D9DDE1"
        self.alarm = "#FF9A5C" if dark else "#B8420A"
        self.calm = "#7A828C" if dark else "#8A929A"

    def kind(self, kind: Kind) -> str:
        """Colour of a kind of pair."""
        return KIND_STYLE[kind][1 if self.dark else 0]


@contextmanager
def styled(ink: Ink) -> Iterator[None]:
    """Draw in one theme, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.family": "DejaVu Sans",
                "font.size": 11,
                "axes.titlesize": 12,
                "axes.titlelocation": "left",
                "axes.titleweight": "bold",
                "axes.labelsize": 11,
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
                "legend.fontsize": 10,
            }
        )
        yield


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of a fixed size in inches that no window system knows of."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes) -> None:
    """Leave two spines and a faint horizontal grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)


def figure_png(figure: Figure) -> bytes:
    """Encode a figure; equal figures give equal bytes, since no version and no date is written."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()
