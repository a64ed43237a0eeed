"""The figure of pictures: what was to be protected, beside what came back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dori_lightning.report.pictures import thumbnail
from dori_lightning.report.style import Ink, new_figure, rendered, styled
from dori_lightning.report.summary import STATUS_WORDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.summary import PairResult

__all__ = ["picture_grid"]


def picture_grid(
    rows: Sequence[tuple[PairResult | None, PairResult | None]],
    *,
    threshold: float,
    disclosure: Disclosure = "full",
) -> bytes | None:
    """Draw one row per pair: original, best picture from its prompt, best picture from the attack.

    A picture above the threshold has a thick frame and the word ``REPRODUCED``.

    Args:
        rows: Results from the prompt and from the attack, of the same pair.
        threshold: Similarity above which a picture counts as a replica.
        disclosure: ``none`` draws nothing.

    Returns:
        PNG bytes; None where there is nothing to draw or pictures are not to be shown.
    """
    known = [row for row in rows if row[0] is not None or row[1] is not None]
    if disclosure == "none" or not known:
        return None
    ink = Ink()
    with styled(ink):
        figure = new_figure(6.6, 2.35 * len(known) + 0.3)
        grid = figure.subplots(len(known), 3, squeeze=False)
        for axes, row in zip(grid, known, strict=True):
            pair = next(result.pair for result in row if result is not None)
            original = thumbnail(pair.image, disclosure)
            assert original is not None
            axes[0].imshow(np.asarray(original))
            axes[0].set_ylabel(f"{pair.id[:18]}\n({pair.kind})", fontsize=10)
            for panel, result in zip(axes[1:], row, strict=True):
                _grid_picture(panel, result, threshold, disclosure, ink)
            for panel in axes:
                panel.set_xticks([])
                panel.set_yticks([])
        for panel, title in zip(
            grid[0], ("original", "from its prompt", "from the attack"), strict=True
        ):
            panel.set_title(title)
        return rendered(figure, ink)


def _grid_picture(
    panel: Axes, result: PairResult | None, threshold: float, disclosure: Disclosure, ink: Ink
) -> None:
    shown = thumbnail(result.picture, disclosure) if result and result.picture else None
    if shown is not None:
        panel.imshow(np.asarray(shown))
    else:
        why = (
            "not run"
            if result is None
            else STATUS_WORDS[result.status]
            if result.status != "ok"
            else "not kept"
        )
        panel.text(0.5, 0.5, why, ha="center", va="center", transform=panel.transAxes)
        panel.set_aspect(1.0, adjustable="box")
    above = result is not None and result.best > threshold
    for spine in panel.spines.values():
        spine.set_color(ink.alarm if above else ink.calm)
        spine.set_linewidth(3.5 if above else 0.8)
    if result is not None and not math.isnan(result.best):
        mark = "REPRODUCED  " if above else ""
        panel.set_xlabel(
            f"{mark}{result.best:.2f}", color=ink.alarm if above else ink.text,
            fontsize=10, fontweight="bold" if above else "normal",
        )  # fmt: skip
