"""The cells as a table, for the console and as Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.markup import escape as plain_text
from rich.table import Table

from dori_lightning.report.summary import interval_words, percent_words
from dori_lightning.types import KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.types import Cell

__all__ = ["cell_rows", "cells_markdown", "cells_table", "ranked_cells"]

_HEADER = (
    "kind",
    "attack",
    "init",
    "budget",
    "n",
    "MR (95 % interval)",
    "similarity",
    "threshold",
)
_NUMERIC = {"n", "MR (95 % interval)", "similarity", "threshold"}


def ranked_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Sort cells by mitigation as they come, then by kind, attack and budget."""
    order = list(dict.fromkeys(cell.mitigation for cell in cells))
    return sorted(
        cells,
        key=lambda cell: (
            order.index(cell.mitigation),
            KINDS.index(cell.kind),
            cell.condition.attack == "dori",
            cell.condition.init or "",
            cell.condition.budget.norm,
            cell.condition.budget.eps or 0.0,
            cell.condition.budget.steps,
        ),
    )


def cell_rows(cells: Sequence[Cell]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Format cells as text: the header, and one row per cell in the order of ``ranked_cells``.

    The column ``mitigation`` appears only where the cells differ in it. ``n`` names failed pairs
    beside the denominator. ``similarity`` is the median over pairs with its median absolute
    deviation.
    """
    ranked = ranked_cells(cells)
    rows = [_row(cell) for cell in ranked]
    if len({cell.mitigation for cell in cells}) < 2:
        return _HEADER, rows
    named = zip(ranked, rows, strict=True)
    return ("mitigation", *_HEADER), [(cell.mitigation, *row) for cell, row in named]


def _row(cell: Cell) -> tuple[str, ...]:
    budget = cell.condition.budget
    radius = "" if budget.norm == "none" else f", {budget.norm} {budget.eps:g}"
    steps = f"{budget.steps} step{'' if budget.steps == 1 else 's'}"
    if cell.counted == "up_to_budget":
        steps = f"up to {steps}"
    similarity = (
        "n/a"
        if math.isnan(cell.similarity_median)
        else f"{cell.similarity_median:.2f} ± {cell.similarity_mad:.2f}"
    )
    interval = "" if cell.n == 0 else f" ({interval_words(cell.mr_ci95)})"
    return (
        cell.kind,
        cell.condition.attack,
        cell.condition.init or "-",
        f"{steps}{radius}" if cell.condition.attack == "dori" else "-",
        f"{cell.hits}/{cell.n}" + (f" +{cell.failed} failed" if cell.failed else ""),
        f"{percent_words(cell.mr)}{interval}",
        similarity,
        f"{cell.threshold:.2f}",
    )


def cells_table(cells: Sequence[Cell], *, title: str | None = None) -> Table:
    """Build the one table that the console shows at the end."""
    header, rows = cell_rows(cells)
    table = Table(title=title, title_justify="left")
    for name in header:
        label = "hits/n" if name == "n" else name
        table.add_column(
            label, justify="right" if name in _NUMERIC else "left", no_wrap=name != "budget"
        )
    for row in rows:
        table.add_row(*map(plain_text, row))
    return table


def cells_markdown(cells: Sequence[Cell]) -> str:
    """Build the same table as Markdown."""
    header, rows = cell_rows(cells)
    labels = ["hits/n" if name == "n" else name for name in header]
    rule = ["---:" if name in _NUMERIC else "---" for name in header]
    lines = [labels, rule, *([text.replace("|", "\\|") for text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
