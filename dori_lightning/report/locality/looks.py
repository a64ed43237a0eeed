"""How groups of embeddings look in the figures on locality."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dori_lightning.report.style import KIND_LOOK, SERIES, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["GROUP_LOOK", "GROUP_WORDS", "colour_of", "sideways"]

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
