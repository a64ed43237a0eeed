"""Collect what is wrong with a list of pairs and say all of it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SHOWN", "Problem", "quote", "raise_problems", "some_of"]

SHOWN = 20
"""Problems, or names, that one message lists before it only counts."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one row.

    Attributes:
        where: Row as its file counts it: ``line 3`` of a text file (the header is line 1),
            ``row 3`` of a parquet file (the first is row 1).
        column: Column as the file names it.
        what: What is wrong.
        mend: How to mend it.
        missing: The picture is not there, which ``on_missing="skip"`` forgives.
    """

    where: str
    column: str
    what: str
    mend: str
    missing: bool = False


def quote(value: object, width: int = 80) -> str:
    """Show a raw value in one line: control characters escaped, long values cut."""
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]}...{text[-1]}"


def some_of(names: Sequence[str]) -> str:
    """Join names, at most ``SHOWN`` of them, and count the rest."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def raise_problems(problems: Sequence[Problem], *, source: str, rows: int) -> None:
    """Raise one error with a readable table of all problems; do nothing where there are none.

    Args:
        problems: What was found, in the order of the file.
        source: The file, as the user knows it.
        rows: How many rows were checked.

    Raises:
        InputError: There is at least one problem.
    """
    if not problems:
        return
    cells = [("where", "column", "what is wrong", "how to mend it")]
    cells += [(p.where, p.column, p.what, p.mend) for p in problems[:SHOWN]]
    widths = [max(len(line[k]) for line in cells) for k in range(3)]
    lines = [
        "  ".join([*(line[k].ljust(widths[k]) for k in range(3)), line[3]]).rstrip()
        for line in cells
    ]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise InputError("\n  ".join([f"{source}: {count} in {rows} rows", *lines]))
