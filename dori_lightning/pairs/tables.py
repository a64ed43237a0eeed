"""Read text tables strictly: what is not certain is refused, and the mend is said."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dori_lightning.pairs.problems import Problem, quote
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["Line", "read_csv", "read_jsonl", "read_text", "require_columns"]

TAB_NAMES = ("tab", "\\t")
DELIMITERS = (",", ";", "\t", "|")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Line:
    """One record of a text table.

    Attributes:
        where: ``line N``, where the record begins; the file's first line is line 1.
        values: Column to value; strings out of a CSV, any JSON value out of a JSONL.
        problems: What kept the record from being taken apart; ``values`` is empty then.
    """

    where: str
    values: Mapping[str, object] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def read_text(path: Path) -> str:
    """Decode a UTF-8 file, with or without a byte order mark.

    Raises:
        InputError: No such file, unreadable, or not UTF-8; says which line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the list of pairs {path}: {error.strerror}") from error
    if data.startswith(UTF16_MARKS):
        raise InputError(f"{path} is UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}; save as UTF-8, "
            "for a list written on Windows: iconv -f WINDOWS-1252 -t UTF-8"
        ) from error
    if "\0" in text:
        raise InputError(
            f"{path} holds NUL bytes, so it is no text table; was it cut off or zipped?"
        )
    return text


def require_columns(
    header: Sequence[str],
    required: Sequence[Sequence[str]],
    *,
    path: Path,
    delimiter: str | None = None,
    top: str = "",
) -> None:
    """Require one column of each group of names.

    Args:
        header: Columns that the file has.
        required: Groups of names; the first of a group is its proper name, the others are aliases.
        path: The file.
        delimiter: What separates columns, of a CSV.
        top: First line of a CSV as it stands, to see whether another delimiter would do.

    Raises:
        InputError: A group has no column in the header; shows the header and the mend.
    """
    lacking = [group for group in required if not any(name in header for name in group)]
    if not lacking:
        return
    wanted = ", ".join(" or ".join(group) for group in lacking)
    text = f"{path} has no column {wanted}. It has: {', '.join(map(quote, header)) or 'none'}"
    if delimiter is not None:
        text += f" (columns separated by {delimiter!r})"
        for other in DELIMITERS:
            columns = [name.strip() for name in next(csv.reader([top], delimiter=other), [])]
            if other != delimiter and all(any(n in columns for n in g) for g in required):
                name = "tab" if other == "\t" else other
                mend = f"\"pairs.delimiter='{name}'\""  # a shell and Hydra each need their quotes
                raise InputError(f"{text}. They look separated by {other!r}: add {mend}")
    raise InputError(f"{text}. Add it, or rename the column that means it")


def read_csv(
    path: Path, *, delimiter: str, required: Sequence[Sequence[str]]
) -> tuple[list[str], list[Line]]:
    """Read a CSV with a header.

    Args:
        path: The file.
        delimiter: One character, or ``tab``.
        required: Groups of column names, as of ``require_columns``.

    Returns:
        The header and the records. A record with too many or too few fields carries the problem.

    Raises:
        InputError: Unreadable, not UTF-8, badly quoted, or a column is missing or there twice.
    """
    if delimiter in TAB_NAMES:
        delimiter = "\t"
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise InputError(f"pairs.delimiter must be one character or tab, got {delimiter!r}")
    # Not str.splitlines: it also splits at separators that a caption may hold.
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    records: list[tuple[int, list[str]]] = []
    begin = 1
    try:
        for record in reader:
            if record:
                records.append((begin, record))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}: the record that begins in line {begin} is badly quoted ({error}); put "
            'captions with a delimiter or a quote into "...", and write a quote inside as ""'
        ) from error
    if not records:
        raise InputError(f"{path} is empty: it needs a header line and at least one pair")
    header = [name.strip() for name in records[0][1]]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{path} has more than one column named {', '.join(map(quote, twice))}")
    require_columns(header, required, path=path, delimiter=delimiter, top=lines[0])
    return header, [_csv_line(header, f"line {number}", r) for number, r in records[1:]]


def _csv_line(header: list[str], where: str, record: list[str]) -> Line:
    if len(record) == len(header):
        return Line(where, dict(zip(header, record, strict=True)))
    what = f"{len(record)} fields, but the header has {len(header)}"
    mend = 'put captions that hold the delimiter into "..."'
    return Line(where, problems=(Problem(where, "(all)", what, mend),))


def read_jsonl(path: Path, *, required: Sequence[Sequence[str]]) -> tuple[list[str], list[Line]]:
    """Read a file with one JSON object in each line.

    Args:
        path: The file; blank lines are passed over.
        required: Groups of key names, as of ``require_columns``; some line must have each.

    Returns:
        All keys and the records. A line that is no object carries the problem.

    Raises:
        InputError: Unreadable, not UTF-8, or no line has a required key.
    """
    records = []
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        where = f"line {number}"
        try:
            value = json.loads(text)
            what = "" if isinstance(value, dict) else f"{quote(value)} is no object"
        except (ValueError, RecursionError) as error:
            value, what = None, f"no JSON: {error}"
        if what:
            mend = 'write {"column": "value", ...} in one line'
            records.append(Line(where, problems=(Problem(where, "(all)", what, mend),)))
        else:
            records.append(Line(where, value))
    header = list(dict.fromkeys(key for record in records for key in record.values))
    if header:  # otherwise no line could be read, and each says why
        require_columns(header, required, path=path)
    return header, records
