"""Read lists of pairs: the formats people have, and the embedded benchmark.

Nothing is ever fetched from the network; columns with addresses are ignored.
"""

import csv
import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

from dori_lightning.pairs.layouts import layout_of
from dori_lightning.pairs.validation import (
    NoneOfKindsError,
    OnMissing,
    Problem,
    Row,
    default_id,
    image_files,
    images_of,
    mark_duplicates,
    quote,
    select_pairs,
    sniff,
    some_of,
    validate_rows,
)
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.types import KINDS, InputError, Kind, Pair, Pairs, Skipped

logger = logging.getLogger(__name__)

PROMPT_NAMES = ("prompt", "text", "caption")
COLUMNS = ("file_name", *PROMPT_NAMES, "id", "kind", "overfit_type", "subject", "repeats", "role")
EXPECTED = "file_name,prompt[,id,kind,subject,repeats,role]"
"""Header of a ``metadata.csv``, for messages."""

OVERFIT_TYPES: Mapping[str, Kind] = {"MV": "vm", "RV": "vm", "TV": "tm", "N": "control"}
"""Webster's words for kinds: matching, retrieved and template verbatim, and none.

Reference: A Reproducible Extraction of Training Images from Diffusion Models (Webster, 2023),
https://arxiv.org/abs/2305.08694
"""

SamePrompt = Literal["pairs", "references"]


def kind_of(values: Mapping[str, object], default: Kind) -> object:
    """A row's kind, unchecked: its ``kind``, else its ``overfit_type``, else the default."""
    if values.get("kind") not in (None, ""):
        return values["kind"]
    overfit = values.get("overfit_type")
    return default if overfit in (None, "") else OVERFIT_TYPES.get(str(overfit), overfit)


class PairsReader(Protocol):
    """Anything that can be given as ``pairs``."""

    def read(self) -> Pairs:
        """Return validated pairs, audit and training, with unique ids.

        Raises:
            InputError: The list or an image is unusable.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which pairs of a list to take.

    Attributes:
        kinds: Kinds to take; rows of other kinds are left out unchecked.
        limit: Most audit pairs of each kind, the first of the list; None takes all. Training pairs
            are never cut. Images of rows beyond are not looked at.
        self_controls: Altered copies of the suspects that an audit adds as controls: some of
            ``mirrored``, ``turned`` and ``shifted``, or ``auto`` for the first two where the list
            has fewer than 20 controls.
    """

    kinds: Sequence[Kind] = KINDS
    limit: int | None = None
    self_controls: str | Sequence[str] = ()

    def check_options(self) -> None:
        """Refuse impossible options.

        Called by ``read``, not by the constructor: Hydra would wrap the error in its own.

        Raises:
            InputError: Unknown or no kinds, or a limit below 1.
        """
        if not self.kinds or any(kind not in KINDS for kind in self.kinds):
            raise InputError(f"pairs.kinds must be some of {list(KINDS)}, got {list(self.kinds)}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"pairs.limit must be at least 1 or null, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class ListReader(Selection, ABC):
    """A reader of one list in a file.

    Attributes:
        kind: Kind of rows that name none, neither as ``kind`` nor as Webster's ``overfit_type``.
        on_missing: ``error`` refuses a list with missing or damaged images; ``skip`` leaves those
            images out, and rows without another one.
        same_prompt: What rows of one kind with the same prompt are: ``pairs`` of their own, or
            ``references`` of one pair, called after the first of them.
    """

    kind: Kind = "vm"
    on_missing: OnMissing = "error"
    same_prompt: SamePrompt = "pairs"

    def check_options(self) -> None:
        """Refuse impossible options, as ``Selection`` does, of these too."""
        super().check_options()
        if self.on_missing not in get_args(OnMissing):
            raise InputError(f"pairs.on_missing must be error or skip, got {self.on_missing!r}")
        if self.same_prompt not in get_args(SamePrompt):
            raise InputError(
                f"pairs.same_prompt must be pairs or references, got {self.same_prompt!r}"
            )
        if self.kind not in KINDS:
            raise InputError(f"pairs.kind must be one of {list(KINDS)}, got {self.kind!r}")

    def read(self) -> Pairs:
        """Read and validate the list.

        Raises:
            InputError: Impossible options, no list, an unreadable one, or unusable rows.
        """
        self.check_options()
        return self._read()

    @abstractmethod
    def _read(self) -> Pairs: ...

    def _validate(
        self, rows: Iterable[Row], *, root: Path, source: Path, names: Mapping[str, str]
    ) -> Pairs:
        """Validate rows under these options; see ``validate_rows``."""
        return validate_rows(
            rows if self.same_prompt == "pairs" else _joined(rows),
            root=root,
            source=str(source),
            names=names,
            kinds=tuple(self.kinds),
            limit=self.limit,
            on_missing=self.on_missing,
        )

    def _by_fields(self, row: Row, prompt: str) -> Row:
        """A row with the columns of a ``metadata.csv``, the caption in ``prompt``, by fields."""
        values = row.values
        named = {
            "kind": kind_of(values, self.kind),
            "prompt": values.get(prompt),
            "image": values.get("file_name"),
        }
        return replace(row, values={**values, **named})


def _joined(rows: Iterable[Row]) -> list[Row]:
    """Rows with the same prompt, kind and role as one, in the order of the first."""
    groups: dict[object, list[Row]] = {}
    for place, row in enumerate(rows):
        same = tuple(str(row.values.get(name)) for name in ("prompt", "kind", "role"))
        groups.setdefault(place if row.problems else same, []).append(row)
    return [own[0] if len(own) == 1 else _as_one(own) for own in groups.values()]


def _as_one(rows: Sequence[Row]) -> Row:
    first = rows[0]
    images = [image for row in rows for image in images_of(row.values.get("image"))]
    fetches = [row.fetch for row in rows if row.fetch]
    empty = [row for row in rows if not row.fetch and not images_of(row.values.get("image"))]
    return Row(
        where=some_of([row.where for row in rows]),
        values={**first.values, "image": images},
        looked_for=first.looked_for,
        lost=tuple(f"{row.looked_for} ({row.where})" for row in empty),
        fetch=(lambda: [name for fetch in fetches for name in fetch()]) if fetches else None,
    )


def image_folder(path: Path | str, option: str) -> Path:
    """Require a folder.

    Raises:
        InputError: There is none, or it is a file; names the option to correct.
    """
    folder = Path(path)
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{option} must be a folder, but {folder} {state}")
    return folder


def prompt_name(header: Sequence[str], source: str) -> str:
    """Choose the caption's column: ``prompt``, or else the only alias there is.

    Raises:
        InputError: There are two aliases and no ``prompt``.
    """
    found = [name for name in PROMPT_NAMES if name in header]
    if "prompt" not in found and len(found) > 1:
        raise InputError(
            f"{source} has columns {' and '.join(found)}; rename the right one prompt"
        )
    ignored = [quote(name) for name in header if name not in COLUMNS and name != "image"]
    if ignored:
        logger.info("%s: columns that are not used: %s", source, ", ".join(ignored))
    return found[0]


TAB_NAMES = ("tab", "\\t")
DELIMITERS = (",", ";", "\t", "|")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


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
        InputError: A group has no column in the header; shows the header and what to do.
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
                fix = _delimiter_option(other)
                raise InputError(f"{text}. They look separated by {other!r}: add {fix}")
    raise InputError(f"{text}. Add it, or rename the column that means it")


def _delimiter_option(delimiter: str) -> str:
    """What to write on the command line; a shell and Hydra each need their quotes."""
    name = "tab" if delimiter == "\t" else delimiter
    return f"\"pairs.delimiter='{name}'\""


def read_csv(
    path: Path, *, delimiter: str, required: Sequence[Sequence[str]]
) -> tuple[list[str], list[Row]]:
    """Read a CSV with a header.

    Args:
        path: The file.
        delimiter: One character, or ``tab``.
        required: Groups of column names, as of ``require_columns``.

    Returns:
        The header and the records. A record with too many or too few fields carries the problem.

    Raises:
        InputError: Unreadable, not UTF-8, badly quoted, or a column is missing, there twice or
            one of several without a name.
    """
    if delimiter in TAB_NAMES:
        delimiter = "\t"
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise InputError(f"pairs.delimiter must be one character or tab, got {delimiter!r}")
    # Not str.splitlines: it also splits at separators that a caption may hold.
    lines = read_text(path).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    excel = re.fullmatch(r'"?sep=(.?)"?', lines[0].strip(" "), re.IGNORECASE)
    if excel:
        raise InputError(
            f"line 1 of {path} is a note to Excel ({lines[0].strip()}), not the header; delete it"
            + (
                f" and add {_delimiter_option(excel[1])}"
                if excel[1] not in ("", delimiter)
                else ""
            )
        )
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
    unnamed = [str(place) for place, name in enumerate(header, start=1) if not name]
    if len(unnamed) > 1:
        raise InputError(
            f"columns {', '.join(unnamed)} of {path} have no name: spreadsheets write such ones "
            f"where cells are empty; delete them, or name them in line {records[0][0]}"
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise InputError(f"{path} has more than one column named {', '.join(map(quote, twice))}")
    require_columns(header, required, path=path, delimiter=delimiter, top=lines[0])
    return header, [_csv_row(header, f"line {number}", r) for number, r in records[1:]]


def _csv_row(header: list[str], where: str, record: list[str]) -> Row:
    if len(record) == len(header):
        return Row(where, dict(zip(header, record, strict=True)))
    what = f"{len(record)} fields, but the header has {len(header)}"
    fix = 'put captions that hold the delimiter into "..."'
    return Row(where, problems=(Problem(where, "(all)", what, fix),))


def read_table(
    path: Path, *, delimiter: str, required: Sequence[Sequence[str]]
) -> tuple[list[str], list[Row]]:
    """Read a ``.jsonl``, or else a CSV; see ``read_jsonl`` and ``read_csv``."""
    if path.suffix == ".jsonl":
        return read_jsonl(path, required=required)
    return read_csv(path, delimiter=delimiter, required=required)


def read_jsonl(path: Path, *, required: Sequence[Sequence[str]]) -> tuple[list[str], list[Row]]:
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
            fix = 'write {"column": "value", ...} in one line'
            records.append(Row(where, problems=(Problem(where, "(all)", what, fix),)))
        else:
            records.append(Row(where, value))
    header = list(dict.fromkeys(key for record in records for key in record.values))
    if header:  # otherwise no line could be read, and each says why
        require_columns(header, required, path=path)
    return header, records


@dataclass(frozen=True)
class FolderPairs(ListReader):
    """A folder of images with a ``metadata.csv`` or ``metadata.jsonl``.

    Columns: ``file_name`` (relative to the folder; it may name a folder of reference images, and
    in JSON be a list of names) and ``prompt`` (or ``text``, or ``caption``); optional ``id``
    (default: the file's stem, with ``_`` for what ids cannot hold), ``kind`` or Webster's
    ``overfit_type`` (default: this reader's), ``subject``, ``repeats`` (default 1, and 0 for
    controls), ``role``.

    Attributes:
        path: The folder.
        delimiter: What separates a CSV's columns: one character, or ``tab``.
    """

    path: Path | str
    delimiter: str = ","

    def _read(self) -> Pairs:
        folder = image_folder(self.path, "pairs.path")
        found = [p for p in (folder / "metadata.csv", folder / "metadata.jsonl") if p.is_file()]
        if len(found) != 1:
            state = "both a" if found else "neither a"
            advice = "" if found else layout_of(folder)
            raise InputError(
                f"{folder} has {state} metadata.csv {'and' if found else 'nor'} a metadata.jsonl "
                f"but needs one. " + (advice or f"A metadata.csv begins with the line: {EXPECTED}")
            )
        (source,) = found
        required = (("file_name",), PROMPT_NAMES)
        header, lines = read_table(source, delimiter=self.delimiter, required=required)
        prompt = prompt_name(header, str(source))
        rows = [self._by_fields(line, prompt) for line in lines]
        names = {"prompt": prompt}
        if "kind" not in header and "overfit_type" in header:
            names["kind"] = "overfit_type"
        return self._validate(rows, root=folder, source=source, names=names)


@dataclass(frozen=True)
class ConcatPairs(Selection):
    """Several lists as one, such as memorized pairs and controls out of different files.

    Attributes:
        parts: Readers, in order.
    """

    parts: Sequence[PairsReader]

    def read(self) -> Pairs:
        """Read all parts.

        Raises:
            InputError: Anything that any part says, together; or an id in two parts.
        """
        self.check_options()
        if not self.parts:
            raise InputError("pairs.parts is empty: name at least one list")
        pairs: list[Pair] = []
        skipped: list[Skipped] = []
        errors: list[str] = []
        for part in self.parts:
            try:
                listed = self._selected(part).read()
                pairs += listed
                skipped += listed.skipped
            except NoneOfKindsError as error:
                if isinstance(part, Selection) and set(part.kinds) <= set(self.kinds):
                    errors.append(str(error))  # the part's own choice left nothing
            except InputError as error:
                errors.append(str(error))
        images: dict[str, list[Path]] = defaultdict(list)
        for pair in pairs:
            images[pair.id].append(pair.image)
        for name, paths in images.items():
            if len(paths) > 1:
                where = " and ".join(map(str, paths))
                errors.append(f"id {name!r} is in more than one list, for {where}: rename one")
        if errors:
            raise InputError("\n".join(errors))
        chosen = select_pairs(pairs, kinds=self.kinds, limit=self.limit)
        if not chosen:
            raise InputError(f"pairs.parts hold no pairs of kinds {list(self.kinds)}")
        return Pairs(mark_duplicates(chosen), skipped=skipped)

    def _selected(self, part: PairsReader) -> PairsReader:
        """A part without pairs that the whole would leave out: their images are not read."""
        if not isinstance(part, Selection):
            return part
        part.check_options()
        kinds = [kind for kind in part.kinds if kind in self.kinds]
        limits = [limit for limit in (part.limit, self.limit) if limit is not None]
        return cast(
            PairsReader,
            replace(part, kinds=kinds or part.kinds, limit=min(limits, default=None)),
        )


ROWS_AT_ONCE = 64
"""Rows held in memory together; each may hold a full image."""


@dataclass(frozen=True)
class ParquetPairs(ListReader):
    """A parquet file with the columns of ``FolderPairs``.

    Images are either files that ``file_name`` names, or the bytes of an ``image`` column of
    ``{bytes, path}`` structs as Hugging Face data sets have, or of lists of them; those that are
    taken are written to ``cache``, named by their hash. Images in an ``image`` column whose id is
    not given are called after ``path``, or ``row_000001``.

    Attributes:
        path: The parquet file.
        root: Folder that ``file_name`` is relative to; None for the file's own.
        cache: Folder for images that the file holds; must be given for an ``image`` column.
    """

    path: Path | str
    root: Path | str | None = None
    cache: Path | str | None = None

    def _read(self) -> Pairs:
        source = Path(self.path)
        if not source.is_file():
            raise InputError(f"pairs.path must be a parquet file, but there is no file {source}")
        schema = self._schema(source)
        embedded = "image" in schema.names
        image = ("image",) if embedded else ("file_name", "image")
        require_columns(schema.names, [image, PROMPT_NAMES], path=source)
        prompt = prompt_name(schema.names, str(source))
        if embedded:
            self._check_image_type(schema.field("image").type)
        root = self._root(source, embedded=embedded)
        columns = [name for name in ("image", *COLUMNS) if name in schema.names]
        rows = (
            self._row(number, record, prompt=prompt, root=root)
            for number, record in enumerate(_records(source, columns), start=1)
        )
        names = {"prompt": prompt, "image": "image" if embedded else "file_name"}
        return self._validate(rows, root=root, source=source, names=names)

    def _schema(self, source: Path) -> Any:
        import pyarrow as pa  # slow to import, and only this format needs it
        import pyarrow.parquet as pq

        try:
            return pq.read_schema(source)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(source, error) from error

    def _root(self, source: Path, *, embedded: bool) -> Path:
        if not embedded:
            return image_folder(source.parent if self.root is None else self.root, "pairs.root")
        if self.cache is None:
            raise InputError(
                f"{source} holds its images; say where to write them: pairs.cache=..."
            )
        folder = Path(self.cache)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _check_image_type(self, kind: Any) -> None:
        import pyarrow.types as pt

        one = kind.value_type if pt.is_list(kind) or pt.is_large_list(kind) else kind
        if not pt.is_struct(one) or "bytes" not in [field.name for field in one]:
            raise InputError(
                f"{self.path}: column image must be a struct of bytes and path, or a list of "
                f"them, but is {kind}; if it holds paths, rename it file_name"
            )

    def _row(self, number: int, record: dict[str, Any], *, prompt: str, root: Path) -> Row:
        row = self._by_fields(Row(f"row {number}", record), prompt)
        if "image" not in record:
            return row
        images = [image for image in images_of(record["image"]) if isinstance(image, dict)]
        paths = [path for image in images if (path := image.get("path"))]
        files = [data for image in images if (data := image.get("bytes"))]
        name = record.get("file_name") or next(iter(paths), f"row_{number:06d}")
        values = {**row.values, "id": record.get("id") or default_id(str(name)), "image": None}
        return replace(
            row,
            values=values,
            looked_for="image bytes in this row",
            fetch=(lambda: [store(data, root) for data in files]) if files else None,
        )


def _unreadable(source: Path, error: Exception) -> InputError:
    return InputError(f"{source} cannot be read as parquet: {error}")


def _records(source: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a parquet file, a few held at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(columns)):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise _unreadable(source, error) from error


def store(data: bytes, folder: Path) -> str:
    """Write an image under its hash, all at once; return its name."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"{digest}.{(sniff(data[:64]) or 'unknown').split()[0].lower()}"
    path = folder / name
    if not path.is_file():
        write_atomically(path, data)
    return name


@dataclass(frozen=True)
class NumberedPairs(ListReader):
    """A published list of LAION prompts, with a folder of images that are named by number.

    Attributes:
        path: The list.
        images: Folder of its images.
        id_prefix: Put before each id; tells lists apart that are read together.
    """

    path: Path | str
    images: Path | str
    id_prefix: str = field(default="", kw_only=True)

    @property
    def folder(self) -> Path:
        """The folder of images.

        Raises:
            InputError: There is none.
        """
        return image_folder(self.images, "pairs.images")

    def _numbered(
        self,
        lines: Sequence[Row],
        column: str,
        values_of: Callable[[Row, str], tuple[dict[str, object], str]],
        names: Mapping[str, str],
    ) -> Pairs:
        """Validate lines with a number in a column.

        Args:
            lines: Lines by the list's columns.
            column: Digits only, since they become part of a path.
            values_of: A line and its number to the values by field, and what was looked for.
            names: Field to column, as of ``validate_rows``.
        """
        rows, folder = [], self.folder
        for line in lines:
            value = line.values.get(column)
            digits = isinstance(value, str | int) and _is_number(str(value))
            if digits and not line.problems:
                values, looked_for = values_of(line, str(value))
                line = replace(line, values=values, looked_for=f"{looked_for} in {folder}")
            elif not line.problems:
                what, name = f"{quote(value)} is no row number", column or "(first)"
                line = Row(line.where, problems=(Problem(line.where, name, what, "write digits"),))
            rows.append(line)
        names = {**names, "image": "image"}
        return self._validate(rows, root=folder, source=Path(self.path), names=names)


@dataclass(frozen=True)
class NemoCsvPairs(NumberedPairs):
    """NeMo's lists of LAION prompts: header ``;Caption;URL;type;mean_sscd;max_sscd;Index``.

    A row's images are ``0001_*`` or ``img_0001_*`` (row number of the first, unnamed column, four
    digits, from 0), or else ``{Index}.*``; several are its reference images. Its id is
    ``vm_0001``, after kind and row number.

    Reference: Finding NeMo (Hintersdorf et al., 2024), https://arxiv.org/abs/2406.02366

    Attributes:
        delimiter: What separates columns: one character, or ``tab``.
        kind_column: Column that says VM or TM; None where there is none.
        kind: Kind of all rows where the header lacks the default ``kind_column``, as in the
            list of prompts that are not memorized.
        first_image: Number of the first row's images; 1 where images are counted from 1.
    """

    delimiter: str = ";"
    kind_column: str | None = "type"
    kind: Kind = field(default="control", kw_only=True)
    first_image: Literal[0, 1] = 0

    def _read(self) -> Pairs:
        by_row: dict[str, list[str]] = defaultdict(list)
        by_index: dict[str, list[str]] = defaultdict(list)
        for image in image_files(self.folder):
            by_row[image.name.removeprefix("img_").partition("_")[0]].append(image.name)
            by_index[image.stem].append(image.name)
        if self.first_image not in (0, 1):
            raise InputError(f"pairs.first_image must be 0 or 1, got {self.first_image!r}")
        required = [("Caption",), ("",)]
        if self.kind_column not in (None, "type"):  # named on purpose: its absence is a mistake
            required.append((str(self.kind_column),))
        header, lines = read_csv(Path(self.path), delimiter=self.delimiter, required=required)
        typed = self.kind_column is not None and self.kind_column in header
        self._check_numbers(lines, by_row, by_index)

        def values_of(line: Row, number: str) -> tuple[dict[str, object], str]:
            four = f"{int(number) + self.first_image:04d}"
            index = str(line.values.get("Index", ""))
            kind = str(line.values[str(self.kind_column)]).lower() if typed else self.kind
            values: dict[str, object] = {
                "id": f"{self.id_prefix}{kind}_{int(number):04d}",
                "kind": kind,
                "prompt": line.values["Caption"],
                "image": by_row.get(four) or by_index.get(index),
            }
            return values, f"{four}_*" + (f" nor {index}.*" if index else "")

        names = {"prompt": "Caption", "kind": str(self.kind_column)}
        return self._numbered(lines, "", values_of, names)

    def _check_numbers(
        self, lines: Sequence[Row], by_row: Mapping[str, object], by_index: Mapping[str, object]
    ) -> None:
        """Name images that belong to no row, and refuse images that are numbered one off.

        Raises:
            InputError: The images fit the rows better if they are counted from the other number.
        """
        rows = {int(n) for line in lines if _is_number(n := str(line.values.get("", "")))}
        indices = {str(line.values.get("Index", "")) for line in lines}
        # an image that an Index names may begin with digits, too
        numbers = {
            int(prefix): prefix
            for prefix in by_row
            if _is_number(prefix) and prefix not in by_index.keys() & indices
        }
        if not rows or not numbers:
            return
        first, other = self.first_image, 1 - self.first_image
        without = sorted(n for n in numbers if n - first not in rows)
        if not without:
            if first == 0 and 0 in rows and 0 not in numbers:
                logger.warning(
                    "%s: the first row has no image 0000_*; if the images of %s are counted from "
                    "1, set pairs.first_image=1",
                    self.path,
                    self.images,
                )
            return
        if all(n - other in rows for n in numbers):
            raise InputError(
                f"the images of {self.images} are counted from {other} and the rows of "
                f"{self.path} from 0: {numbers[without[-1]]}_* belongs to no row, but every image "
                f"to one if pairs.first_image is {other}; as it is, each prompt would get its "
                f"neighbour's image. Set pairs.first_image={other}, where several lists are read "
                f"pairs.parts.0.first_image={other}"
            )
        _tell_unlisted([f"{numbers[n]}_*" for n in without], self.images, self.path)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,20}", text) is not None


def _tell_unlisted(names: Sequence[str], folder: Path | str, source: Path | str) -> None:
    if names:
        logger.warning(
            "%d images of %s belong to no row of %s: %s",
            len(names),
            folder,
            source,
            some_of(names),
        )


@dataclass(frozen=True)
class WenJsonlPairs(NumberedPairs):
    """Wen et al.'s lists: one ``{"caption": ..., "index": ..., "url": ...}`` in each line.

    A row's images are in ``gt_images/{index}/`` or ``{index}/``, or are ``{index}.*``; several are
    its reference images. Its id is the index.

    Reference: Detecting, Explaining, and Mitigating Memorization in Diffusion Models (Wen et al.,
    2024), https://arxiv.org/abs/2407.21720

    Attributes:
        kind: Kind of rows that do not say it themselves, as ``overfit_type``.
    """

    kind: Kind = field(kw_only=True)

    def _read(self) -> Pairs:
        folder = self.folder
        files: dict[str, list[str]] = defaultdict(list)
        for image in image_files(folder):
            files[image.stem].append(image.name)
        _, lines = read_jsonl(Path(self.path), required=[("caption",), ("index",)])

        def found(index: str) -> list[str] | None:
            for inside in (folder / "gt_images" / index, folder / index):
                images = image_files(inside) if inside.is_dir() else []
                if images:
                    return [image.relative_to(folder).as_posix() for image in images]
            return files.get(index)

        def values_of(line: Row, index: str) -> tuple[dict[str, object], str]:
            values: dict[str, object] = {
                "id": f"{self.id_prefix}{index}",
                "kind": kind_of(line.values, self.kind),
                "prompt": line.values.get("caption"),
                "image": found(index),
            }
            return values, f"gt_images/{index}/*, {index}/* or {index}.*"

        indices = {str(line.values.get("index")) for line in lines}
        below = [place for place in (folder / "gt_images", folder) if place.is_dir()]
        named = {path.name for place in below for path in place.iterdir() if path.is_dir()}
        unlisted = [n for n in sorted({*named, *files} - indices) if _is_number(n)]
        _tell_unlisted([f"{name}/*" for name in unlisted], self.images, self.path)
        return self._numbered(lines, "index", values_of, {"prompt": "caption", "id": "index"})
