"""Read lists of pairs: the formats people have, and the embedded benchmark.

Nothing is ever fetched from the network; columns with addresses are ignored.
"""

import hashlib
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dori_lightning.pairs import photographs, planted, scenes, templates
from dori_lightning.pairs.manifest import mark_duplicates, select_pairs
from dori_lightning.pairs.parquet import ParquetPairs
from dori_lightning.pairs.published import NemoCsvPairs, WenJsonlPairs
from dori_lightning.pairs.reading import (
    EXPECTED,
    PROMPT_NAMES,
    PairsReader,
    ReaderOptions,
    Selection,
    known_kind,
    metadata_row,
    picture_folder,
    prompt_name,
)
from dori_lightning.pairs.tables import read_csv, read_jsonl
from dori_lightning.types import InputError, Kind, Pair

__all__ = [
    "ConcatPairs",
    "FolderPairs",
    "NemoCsvPairs",
    "PairsReader",
    "ParquetPairs",
    "PlantedPairs",
    "WenJsonlPairs",
]


@dataclass(frozen=True)
class FolderPairs(ReaderOptions):
    """A folder of pictures with a ``metadata.csv`` or ``metadata.jsonl``.

    Columns: ``file_name`` (relative to the folder) and ``prompt`` (or ``text``, or ``caption``);
    optional ``id`` (default: the file's stem, with ``_`` for what ids cannot hold), ``kind``
    (default: this reader's), ``subject``, ``repeats`` (default 1, and 0 for controls), ``role``.

    Attributes:
        path: The folder.
        kind: Kind of rows that name none.
        delimiter: What separates a CSV's columns: one character, or ``tab``.
    """

    path: Path | str
    kind: Kind = "vm"
    delimiter: str = ","

    def read(self) -> tuple[Pair, ...]:
        """Read and validate the list.

        Raises:
            InputError: No list, two lists, an unreadable one, or unusable rows.
        """
        self.check_options()
        kind = known_kind(self.kind)
        folder = picture_folder(self.path, "pairs.path")
        found = [p for p in (folder / "metadata.csv", folder / "metadata.jsonl") if p.is_file()]
        if len(found) != 1:
            state = "both a" if found else "neither a"
            raise InputError(
                f"{folder} has {state} metadata.csv {'and' if found else 'nor'} a metadata.jsonl "
                f"but needs one. A metadata.csv begins with the line: {EXPECTED}"
            )
        source, required = found[0], (("file_name",), PROMPT_NAMES)
        if source.suffix == ".csv":
            header, lines = read_csv(source, delimiter=self.delimiter, required=required)
        else:
            header, lines = read_jsonl(source, required=required)
        prompt = prompt_name(header, str(source))
        rows = [
            metadata_row(n.values, where=n.where, kind=kind, prompt=prompt, problems=n.problems)
            for n in lines
        ]
        return self.validate(rows, root=folder, source=str(source), names={"prompt": prompt})


@dataclass(frozen=True)
class PlantedPairs(Selection):
    """The embedded benchmark: photographs out of installed packages and drawn pictures.

    Attributes:
        cache: Folder that the pictures are written below, once.
    """

    cache: Path | str

    @property
    def folder(self) -> Path:
        """Where the pictures are, named after the code that draws them: never outdated."""
        modules = (photographs, planted, scenes, templates)
        code = b"".join(Path(str(m.__file__)).read_bytes() for m in modules)
        return Path(self.cache) / f"planted-{hashlib.sha256(code).hexdigest()[:12]}"

    def read(self) -> tuple[Pair, ...]:
        """Write the pictures where they are not there yet, and read them like anybody else's.

        Raises:
            InputError: A package lacks a photograph, or the written folder was damaged since.
        """
        self.check_options()
        folder = self.folder
        if not folder.is_dir():
            self._write(folder)
        try:
            return FolderPairs(folder, kinds=self.kinds, limit=self.limit).read()
        except InputError as error:
            raise InputError(f"{error}\nDelete {folder} to have it drawn again") from error

    def _write(self, folder: Path) -> None:
        """Write to a folder of this process, then rename it: no other process sees half of it."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".planted-", dir=folder.parent))
        try:
            planted.write_planted_pairs(partial)
            partial.rename(folder)
        except FileNotFoundError as error:
            raise InputError(str(error)) from error
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same pictures
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class ConcatPairs(Selection):
    """Several lists as one, such as memorized pairs and controls out of different files.

    Attributes:
        parts: Readers, in order.
    """

    parts: Sequence[PairsReader]

    def read(self) -> tuple[Pair, ...]:
        """Read all parts.

        Raises:
            InputError: Anything that any part says, together; or an id in two parts.
        """
        self.check_options()
        if not self.parts:
            raise InputError("pairs.parts is empty: name at least one list")
        pairs: list[Pair] = []
        errors: list[str] = []
        for part in self.parts:
            try:
                pairs.extend(part.read())
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
        return mark_duplicates(chosen)
