"""Read the prompt lists that the literature shares: NeMo's CSV and Wen et al.'s JSONL."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from dori_lightning.pairs.problems import Problem, quote
from dori_lightning.pairs.reading import ReaderOptions, known_kind, picture_folder
from dori_lightning.pairs.rows import RawRow
from dori_lightning.pairs.tables import Line, read_csv, read_jsonl
from dori_lightning.types import Kind, Pair

__all__ = ["NemoCsvPairs", "WenJsonlPairs"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def _pictures(folder: Path) -> list[Path]:
    """Picture files of a folder by name; downloaders put captions and records beside them."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _number(line: Line, column: str) -> tuple[str, tuple[Problem, ...]]:
    """Take a number that names a file: digits only, since it becomes part of a path."""
    value = line.values.get(column)
    text = str(value)
    if isinstance(value, str | int) and re.fullmatch(r"[0-9]{1,20}", text):
        return text, ()
    name = column or "(first)"
    return "", (Problem(line.where, name, f"{quote(value)} is no row number", "write digits"),)


@dataclass(frozen=True)
class NemoCsvPairs(ReaderOptions):
    """NeMo's lists of LAION prompts: header ``;Caption;URL;type;mean_sscd;max_sscd;Index``.

    A row's picture is ``0001_*`` (row number of the first, unnamed column, four digits, from 0) or
    else ``{Index}.*``. Where several files have the prefix the first by name is used. Its id is
    ``vm_0001``, after kind and row number.

    Reference: Finding NeMo (Hintersdorf et al., 2024), https://arxiv.org/abs/2406.02366

    Attributes:
        path: The CSV.
        images: Folder of its pictures.
        delimiter: What separates columns: one character, or ``tab``.
        kind_column: Column that says VM or TM; None where there is none.
        kind: Kind of all rows where the header lacks the default ``kind_column``, as in the
            list of prompts that are not memorized.
        id_prefix: Put before each id; tells lists apart that are read together.
    """

    path: Path | str
    images: Path | str
    delimiter: str = ";"
    kind_column: str | None = "type"
    kind: Kind = "control"
    id_prefix: str = ""

    def read(self) -> tuple[Pair, ...]:
        """Read and validate the list.

        Raises:
            InputError: An unreadable list, or unusable rows.
        """
        self.check_options()
        kind = known_kind(self.kind)
        source, folder = Path(self.path), picture_folder(self.images, "pairs.images")
        required = [("Caption",), ("",)]
        if self.kind_column not in (None, "type"):  # named on purpose: its absence is a mistake
            required.append((str(self.kind_column),))
        header, lines = read_csv(source, delimiter=self.delimiter, required=required)
        typed = self.kind_column is not None and self.kind_column in header
        by_row: dict[str, list[str]] = defaultdict(list)
        by_index: dict[str, list[str]] = defaultdict(list)
        for picture in _pictures(folder):
            by_row[picture.name.partition("_")[0]].append(picture.name)
            by_index[picture.stem].append(picture.name)

        def row(line: Line) -> RawRow:
            number, problems = _number(line, "")
            if line.problems or problems:
                return RawRow(line.where, problems=line.problems or problems)
            four, index = f"{int(number):04d}", str(line.values.get("Index", ""))
            said = str(line.values[str(self.kind_column)]).lower() if typed else kind
            found = by_row.get(four) or by_index.get(index)
            searched = f"{four}_*" + (f" nor {index}.*" if index else "")
            return RawRow(
                where=line.where,
                id=f"{self.id_prefix}{said}_{four}",
                kind=said,
                prompt=line.values["Caption"],
                image=found[0] if found else None,
                looked_for=f"{searched} in {folder}",
            )

        names = {"prompt": "Caption", "kind": str(self.kind_column), "image": "picture"}
        rows = [row(line) for line in lines]
        return self.validate(rows, root=folder, source=str(source), names=names)


@dataclass(frozen=True)
class WenJsonlPairs(ReaderOptions):
    """Wen et al.'s lists: one ``{"caption": ..., "index": ..., "url": ...}`` in each line.

    A row's picture is in ``gt_images/{index}/`` or ``{index}/``, or is ``{index}.*``. A folder
    often holds several references; the first by name is the pair's picture and the others are not
    used. Its id is the index.

    Reference: Detecting, Explaining, and Mitigating Memorization in Diffusion Models (Wen et al.,
    2024), https://arxiv.org/abs/2407.21720

    Attributes:
        path: The JSONL.
        images: Folder of its pictures.
        kind: Kind of all rows; the list does not say.
        id_prefix: Put before each id; tells lists apart that are read together.
    """

    path: Path | str
    images: Path | str
    kind: Kind
    id_prefix: str = ""

    def read(self) -> tuple[Pair, ...]:
        """Read and validate the list.

        Raises:
            InputError: An unreadable list, or unusable rows.
        """
        self.check_options()
        kind = known_kind(self.kind)
        source, folder = Path(self.path), picture_folder(self.images, "pairs.images")
        _, lines = read_jsonl(source, required=[("caption",), ("index",)])
        files = {picture.stem: picture for picture in reversed(_pictures(folder))}

        def first(index: str) -> str | None:
            for inside in (folder / "gt_images" / index, folder / index):
                pictures = _pictures(inside) if inside.is_dir() else []
                if pictures:
                    return str(pictures[0].relative_to(folder))
            return files[index].name if index in files else None

        def row(line: Line) -> RawRow:
            index, problems = _number(line, "index")
            if line.problems or problems:
                return RawRow(line.where, problems=line.problems or problems)
            return RawRow(
                where=line.where,
                id=f"{self.id_prefix}{index}",
                kind=kind,
                prompt=line.values.get("caption"),
                image=first(index),
                looked_for=f"gt_images/{index}/*, {index}/* or {index}.* in {folder}",
            )

        rows = [row(line) for line in lines]
        names = {"prompt": "caption", "id": "index", "image": "picture"}
        return self.validate(rows, root=folder, source=str(source), names=names)
