"""Read pairs out of a parquet file, with pictures beside it or inside it."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dori_lightning.files import write_atomically
from dori_lightning.pairs.pictures import sniff
from dori_lightning.pairs.reading import (
    PROMPT_NAMES,
    ReaderOptions,
    known_kind,
    metadata_row,
    picture_folder,
    prompt_name,
)
from dori_lightning.pairs.rows import RawRow, default_id
from dori_lightning.pairs.tables import require_columns
from dori_lightning.types import InputError, Kind, Pair

__all__ = ["ParquetPairs"]

ROWS_AT_ONCE = 64
"""Rows held in memory together; each may hold a full picture."""


@dataclass(frozen=True)
class ParquetPairs(ReaderOptions):
    """A parquet file with the columns of ``FolderPairs``.

    Pictures are either files that ``file_name`` names, or the bytes of an ``image`` column of
    ``{bytes, path}`` structs as Hugging Face data sets have; those are written to ``cache``, named
    by their hash. Pictures in an ``image`` column whose id is not given are called after ``path``,
    or ``row_000001``.

    Attributes:
        path: The parquet file.
        root: Folder that ``file_name`` is relative to; None for the file's own.
        cache: Folder for pictures that the file holds; must be given for an ``image`` column.
        kind: Kind of rows that name none.
    """

    path: Path | str
    root: Path | str | None = None
    cache: Path | str | None = None
    kind: Kind = "vm"

    def read(self) -> tuple[Pair, ...]:
        """Read and validate the list.

        Raises:
            InputError: No parquet file, missing columns, an unusable type, or unusable rows.
        """
        import pyarrow as pa  # slow to import, and only this format needs it
        import pyarrow.parquet as pq

        self.check_options()
        kind, source = known_kind(self.kind), Path(self.path)
        if not source.is_file():
            raise InputError(f"pairs.path must be a parquet file, but there is no file {source}")
        try:
            with pq.ParquetFile(source) as file:
                schema = file.schema_arrow
                embedded = "image" in schema.names
                picture = ("image",) if embedded else ("file_name", "image")
                require_columns(schema.names, [picture, PROMPT_NAMES], path=source)
                prompt = prompt_name(schema.names, str(source))
                if embedded:
                    self._check_image_type(schema.field("image").type)
                root = self._root(source, embedded=embedded)
                wanted = ["image", "file_name", prompt, "id", "kind", "subject", "repeats", "role"]
                columns = [name for name in wanted if name in schema.names]
                batches = file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns)
                records = (record for batch in batches for record in batch.to_pylist())
                rows = list(self._rows(records, kind=kind, prompt=prompt, root=root))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{source} cannot be read as parquet: {error}") from error
        names = {"prompt": prompt, "image": "image" if embedded else "file_name"}
        return self.validate(rows, root=root, source=str(source), names=names)

    def _root(self, source: Path, *, embedded: bool) -> Path:
        if not embedded:
            return picture_folder(source.parent if self.root is None else self.root, "pairs.root")
        if self.cache is None:
            raise InputError(
                f"{source} holds its pictures; say where to write them: pairs.cache=..."
            )
        folder = Path(self.cache)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _check_image_type(self, kind: Any) -> None:
        import pyarrow.types as pt

        if not pt.is_struct(kind) or "bytes" not in [field.name for field in kind]:
            raise InputError(
                f"{self.path}: column image must be a struct of bytes and path, but is {kind}; "
                "if it holds paths, rename it file_name"
            )

    def _rows(
        self, records: Iterator[dict[str, Any]], *, kind: Kind, prompt: str, root: Path
    ) -> Iterator[RawRow]:
        for number, record in enumerate(records, start=1):
            where = f"row {number}"
            if "image" not in record:
                yield metadata_row(record, where=where, kind=kind, prompt=prompt)
                continue
            image = record.pop("image") or {}
            if record.get("file_name") in (None, ""):
                record["file_name"] = image.get("path") or f"row_{number:06d}"
            row = metadata_row(record, where=where, kind=kind, prompt=prompt)
            data = image.get("bytes")
            yield replace(
                row,
                id=row.id or default_id(str(record["file_name"])),
                image=_store(data, root) if data else None,
                looked_for="picture bytes in this row",
            )


def _store(data: bytes, folder: Path) -> str:
    """Write a picture under its hash, all at once; return its name."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"{digest}.{(sniff(data[:64]) or 'unknown').split()[0].lower()}"
    path = folder / name
    if not path.is_file():
        write_atomically(path, data)
    return name
