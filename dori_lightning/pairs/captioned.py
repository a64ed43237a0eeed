"""Read folders in which every image has its own caption, as trainers and downloaders make them.

Archives are read member by member and never unpacked, so no name in them reaches the disk.
"""

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dori_lightning.pairs.layouts import CAPTION_SUFFIXES, REPEATED, SHARD
from dori_lightning.pairs.readers import ListReader, image_folder, kind_of, read_text, store
from dori_lightning.pairs.validation import SUFFIXES, Problem, Row, default_id, image_files
from dori_lightning.types import InputError, Pairs

LARGEST_MEMBER = 2**28
"""Bytes of a file in an archive that are read into memory, at most."""


@dataclass(frozen=True)
class CaptionFilePairs(ListReader):
    """Images with a caption file beside each: ``3.jpg`` and ``3.txt`` or ``3.caption``.

    Images with the same stem, and those in a folder of that name, are reference images of one
    pair. Folders of kohya's layout, such as ``10_dog``, are read too: the number is the pair's
    ``repeats``, and the name is the caption of images without a file. Ids are stems, in such a
    folder after its name (``10_dog_3``).

    Attributes:
        path: The folder.
    """

    path: Path | str

    def _read(self) -> Pairs:
        folder = image_folder(self.path, "pairs.path")
        rows = [*self._rows(folder, "")]
        for place in sorted(folder.iterdir()):
            repeated = REPEATED.fullmatch(place.name)
            if place.is_dir() and repeated:
                repeats, caption = repeated.groups()
                rows += [
                    replace(
                        row,
                        values={
                            **row.values,
                            "prompt": row.values["prompt"] or caption,
                            "repeats": repeats,
                        },
                    )
                    for row in self._rows(place, f"{place.name}/")
                ]
        if not rows:
            raise InputError(
                f"{folder} has neither images with captions beside them ({{3.jpg, 3.txt}}) nor "
                f"folders of such images called after their repeats (10_dog)"
            )
        names = {"image": "(image)", "prompt": "(caption)", "id": "(file name)"}
        return self._validate(rows, root=folder, source=folder, names=names)

    def _rows(self, folder: Path, below: str) -> Iterator[Row]:
        images: dict[str, list[str]] = {}
        for image in image_files(folder):
            images.setdefault(image.stem, []).append(f"{below}{image.name}")
        captions: dict[str, list[Path]] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix in CAPTION_SUFFIXES and path.is_file() and path.name[0] != ".":
                captions.setdefault(path.stem, []).append(path)
                if (folder / path.stem).is_dir():
                    images.setdefault(path.stem, []).append(f"{below}{path.stem}")
        for stem in sorted({*images, *captions}):
            where = f"{below}{stem}"
            found = captions.get(stem, [])
            if len(found) > 1:
                names = " and ".join(path.name for path in found)
                problem = Problem(where, "(caption)", f"there are {names}", "keep one of them")
                yield Row(where, problems=(problem,))
                continue
            values = {
                "id": default_id(f"{where.replace('/', '_')}."),
                "kind": self.kind,
                "prompt": read_text(found[0]).strip() if found else "",
                "image": images.get(stem),
            }
            yield Row(where, values, looked_for=f"{stem}.jpg, .png or .webp in {folder}")


@dataclass(frozen=True)
class Img2datasetPairs(ListReader):
    """What img2dataset writes: shards of images, captions and records, in folders or tar files.

    A sample is ``000000012.jpg`` with ``.json`` or ``.txt``; its id is that number. The record's
    ``kind`` or ``overfit_type`` is read where a download kept it
    (``--save_additional_columns``). Downloads that failed are known from the shard's parquet file
    and are missing images (``on_missing``). Images of tar files that are taken are written to
    ``cache``, named by their hash.

    Attributes:
        path: The folder of shards, or one tar file.
        cache: Folder for images out of tar files.
    """

    path: Path | str
    cache: Path | str | None = None

    def _read(self) -> Pairs:
        source = Path(self.path)
        if source.is_file() and source.suffix == ".tar":
            shards = [source]
        else:
            shards = sorted(
                (
                    path
                    for path in image_folder(source, "pairs.path").iterdir()
                    if SHARD.fullmatch(path.stem) and (path.is_dir() or path.suffix == ".tar")
                ),
                key=lambda path: path.name,
            )
        if not shards:
            raise InputError(
                f"{source} has no shards of img2dataset: folders called 00000 or files 00000.tar "
                f"(--output_format files or webdataset)"
            )
        archives = [shard for shard in shards if shard.suffix == ".tar"]
        if archives and len(archives) < len(shards):
            raise InputError(f"{source} has shards in folders and in tar files; keep one of both")
        if archives and self.cache is None:
            raise InputError(
                f"{source} holds its images; say where to write them: pairs.cache=..."
            )
        root = Path(str(self.cache)) if archives else source
        root.mkdir(parents=True, exist_ok=True)
        read = partial(_archived, root=root) if archives else _loose
        rows = (
            self._row(sample, shard)
            for shard in shards
            for sample in (*read(shard), *_failed(shard.with_suffix(".parquet")))
        )
        names = {"image": "(image)", "prompt": "caption", "id": "key"}
        return self._validate(rows, root=root, source=source, names=names)

    def _row(self, sample: "_Sample", shard: Path) -> Row:
        where = f"{shard.name}/{sample.key}"
        record = sample.record
        if sample.problem:
            fix = "download this shard again"
            return Row(where, problems=(Problem(where, "(all)", sample.problem, fix),))
        return Row(
            where,
            {
                "id": default_id(f"{sample.key}."),
                "kind": kind_of(record, self.kind),
                "prompt": record.get("caption"),
                "image": list(sample.images),
            },
            looked_for=f"image of it{f': {sample.error}' if sample.error else ''}",
            fetch=sample.fetch,
        )


@dataclass(frozen=True)
class _Sample:
    """One sample of a shard.

    Attributes:
        key: Its number.
        record: Caption and further columns.
        images: Its images below the shards' folder.
        fetch: Writes the images of an archive.
        error: Why it has none.
        problem: Why it cannot be read.
    """

    key: str
    record: Mapping[str, Any]
    images: tuple[str, ...] = ()
    fetch: Callable[[], list[str]] | None = None
    error: str = ""
    problem: str = ""


def _loose(shard: Path) -> Iterator[_Sample]:
    """Samples of a folder."""
    files: dict[str, list[Path]] = {}
    for path in sorted(shard.iterdir()):
        if path.is_file() and path.name[0] != ".":
            files.setdefault(path.stem, []).append(path)
    for key, own in files.items():
        texts = {p.suffix: p for p in own if p.suffix in (".json", ".txt")}
        images = tuple(f"{shard.name}/{p.name}" for p in own if p.suffix.lower() in SUFFIXES)
        record, problem = _record({suffix: path.read_bytes for suffix, path in texts.items()})
        yield _Sample(key, record, images, problem=problem)


def _archived(shard: Path, *, root: Path) -> Iterator[_Sample]:
    """Samples of a tar file; ``root`` takes the images of those that are fetched."""
    try:
        with tarfile.open(shard, "r:") as archive:
            files: dict[str, list[tarfile.TarInfo]] = {}
            for member in archive.getmembers():
                name = member.name.rpartition("/")[2]
                if member.isfile() and not member.issparse() and not name.startswith("."):
                    files.setdefault(name.partition(".")[0], []).append(member)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(
            f"{shard} cannot be read as a tar file: {error}; download this shard again"
        ) from error
    for key, members in files.items():
        large = [member for member in members if member.size > LARGEST_MEMBER]
        if large:
            yield _Sample(key, {}, problem=f"{large[0].name} has {large[0].size:,} bytes")
            continue
        by_suffix = {f".{m.name.rpartition('.')[2].lower()}": m for m in members}
        texts = {
            suffix: partial(_content, shard, member)
            for suffix, member in by_suffix.items()
            if suffix in (".json", ".txt")
        }
        images = [member for suffix, member in by_suffix.items() if suffix in SUFFIXES]
        record, problem = _record(texts)
        fetch = partial(_stored, shard, images, root) if images else None
        yield _Sample(key, record, fetch=fetch, problem=problem)


def _content(shard: Path, member: tarfile.TarInfo) -> bytes:
    with shard.open("rb") as file:
        file.seek(member.offset_data)
        return file.read(member.size)


def _stored(shard: Path, images: list[tarfile.TarInfo], root: Path) -> list[str]:
    return [store(_content(shard, image), root) for image in images]


def _record(files: Mapping[str, Callable[[], bytes]]) -> tuple[dict[str, Any], str]:
    """A sample's record by its files' suffixes, and what is wrong with them."""
    try:
        record: Any = json.loads(files[".json"]()) if ".json" in files else {}
        if not isinstance(record, dict):
            return {}, "its json file holds no object"
        if not record.get("caption") and ".txt" in files:
            record["caption"] = files[".txt"]().decode("utf-8-sig").strip()
    except (ValueError, RecursionError) as error:
        return {}, f"unreadable caption or record: {error}"
    return record, ""


def _failed(table: Path) -> Iterator[_Sample]:
    """Rows of a shard's table whose download failed."""
    if not table.is_file():
        return
    import pyarrow as pa  # slow to import
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(table).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{table} cannot be read as parquet: {error}") from error
    for row in rows:
        if row.get("status", "success") != "success":
            message = row.get("error_message") or row["status"]
            yield _Sample(str(row.get("key")), row, error=str(message))
