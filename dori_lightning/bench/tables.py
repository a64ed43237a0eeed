"""The table of a measurement of speed, for the console and for a record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from dori_lightning.bench.record import Family, Row

__all__ = ["family_table", "markdown"]


def _spread(row: Row) -> str:
    low, high = min(row.seconds), max(row.seconds)
    return f"{row.per_pair:.4g} [{low / row.pairs:.4g}, {high / row.pairs:.4g}]"


def _ratio(row: Row, first: Row | None) -> str:
    return f"{first.per_pair / row.per_pair:.2f}" if first is not None and row.per_pair else "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _memory(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f}"


def _values(row: Row) -> str:
    parts = []
    for name, value in row.values.items():
        if name == "memorization":
            low, high = value["ci95"]
            parts.append(f"MR {value['hits']}/{value['n']} [{low:.0%}, {high:.0%}]")
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"{name.replace('_', ' ')} {shown}")
    return "; ".join(parts)


_COLUMNS: tuple[tuple[str, Callable[[Row, Row | None], str]], ...] = (
    ("way", lambda row, _: row.name),
    ("s per unit, median [min, max]", lambda row, _: _spread(row)),
    ("times as fast", _ratio),
    ("samples/s", lambda row, _: _number(row.samples_per_second)),
    ("GFLOP", lambda row, _: _number(row.gflop)),
    ("of peak", lambda row, _: _share(row.peak_share)),
    ("of layers alone", lambda row, _: _share(row.alone_share)),
    ("MiB", lambda row, _: _memory(row.peak_bytes)),
    ("warm-up s", lambda row, _: f"{row.warm_up:.3g}" if row.warm_up else "-"),
    ("found", lambda row, _: _values(row)),
)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _cells(family: Family) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the columns that say anything."""
    # speed-ups are against the fair loop; only fine-tuning has no such, and two methods of its own
    first = family.row("B1") or family.row("paper")
    rows = [
        [column(row, first) for _, column in _COLUMNS]
        if row.seconds
        else [row.name, f"not measured: {row.skipped}", *["-"] * (len(_COLUMNS) - 2)]
        for row in family.rows
    ]
    kept = [
        k for k in range(len(_COLUMNS)) if k < 2 or any(row[k] not in ("-", "") for row in rows)
    ]
    return [_COLUMNS[k][0] for k in kept], [[row[k] for k in kept] for row in rows]


def family_table(family: Family) -> Table:
    """Table for the console."""
    table = Table(title=family.title, title_justify="left")
    headings, rows = _cells(family)
    for heading in headings:
        left = heading in (_COLUMNS[0][0], _COLUMNS[-1][0])
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for cells in rows:
        table.add_row(*map(escape, cells))
    return table


def markdown(families: list[Family]) -> str:
    """The same tables as Markdown, a heading each."""
    parts = []
    for family in families:
        headings, cells = _cells(family)
        head, rule = " | ".join(headings), " | ".join("---" for _ in headings)
        rows = "\n".join(f"| {' | '.join(own)} |" for own in cells)
        ways = "\n".join(f"- {row.name}: {row.what}" for row in family.rows)
        parts.append(f"## {family.title}\n\n| {head} |\n| {rule} |\n{rows}\n\n{ways}\n")
    return "\n".join(parts)
