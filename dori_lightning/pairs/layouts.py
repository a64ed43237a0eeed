"""Recognise what a folder of images is when it is not the one that was expected."""

import re
import shlex
from pathlib import Path

from dori_lightning.pairs.validation import SUFFIXES, image_files

CAPTION_SUFFIXES = (".txt", ".caption")
"""Files beside an image that hold its caption."""

REPEATED = re.compile(r"(\d+)_(.+)")
"""Name of a folder in kohya's layout: how often its images are repeated, and what they show."""

SHARD = re.compile(r"\d{5,}")
"""Name of a shard of img2dataset, as a folder or before ``.tar`` and ``.parquet``."""

_ARROW = (
    'python -c "import glob,sys,pyarrow as pa,pyarrow.parquet as pq; '
    "pq.write_table(pa.concat_tables([pa.ipc.open_stream(f).read_all() "
    "for f in sorted(glob.glob(sys.argv[1]+'/*.arrow'))]), sys.argv[2])\" {source} {target}"
)
_TABLE = (
    "python -c \"import csv,json,sys; [print(json.dumps(dict(file_name=r[0].split('#')[0], "
    "prompt=r[1].strip()))) for r in csv.reader(open(sys.argv[1],encoding='utf-8-sig'), "
    "delimiter={delimiter!r}, quoting={quoting}) if len(r)>1 and '.' in r[0]]\" "
    "{source} > {target}"
)
_LINES = (
    'python -c "import json,pathlib as p,sys; d=p.Path(sys.argv[1]); '
    "n=sorted(i.name for i in d.iterdir() if i.suffix.lower() in {suffixes} and i.name[0]!='.'); "
    "[print(json.dumps(dict(file_name=a,prompt=b))) for a,b in zip(n,"
    "(d/'captions.txt').read_text('utf-8-sig').splitlines(),strict=True)]\" {source} > {target}"
)


def layout_of(folder: Path) -> str:
    """Say what a folder without a list of pairs is, and how it can be read; empty if unknown."""
    advice = _data_set(folder) or _caption_table(folder)
    if not advice and is_img2dataset(folder):
        advice = f"This is what img2dataset writes: pairs=img2dataset pairs.path={folder}"
    if not advice and has_caption_files(folder):
        advice = (
            f"Captions are in files beside the images: pairs=caption_files pairs.path={folder}"
        )
    return advice


def is_img2dataset(folder: Path) -> bool:
    """Whether a folder holds shards of img2dataset: folders or tar files, or their tables."""
    return any(
        SHARD.fullmatch(path.stem) and (path.is_dir() or path.suffix in (".tar", ".parquet"))
        for path in folder.iterdir()
    )


def has_caption_files(folder: Path) -> bool:
    """Whether images have captions beside them, or lie in folders of kohya's layout."""
    inside = [p for p in folder.iterdir() if p.is_dir() and REPEATED.fullmatch(p.name)]
    return any(image_files(place) for place in inside) or any(
        image.with_suffix(suffix).is_file()
        for image in image_files(folder)
        for suffix in CAPTION_SUFFIXES
    )


def _data_set(folder: Path) -> str:
    """How to convert what ``save_to_disk`` of Hugging Face's datasets wrote."""
    splits = sorted({path.parent for path in (*folder.glob("*.arrow"), *folder.glob("*/*.arrow"))})
    notes = ("dataset_info.json", "dataset_dict.json", "state.json")
    if not splits or not any((folder / name).is_file() for name in notes):
        return ""
    first, target = splits[0], folder.parent / f"{folder.resolve().name}.parquet"
    parts = f" of {', '.join(path.name for path in splits)}, here {first.name}"
    line = _ARROW.format(source=shlex.quote(str(first)), target=shlex.quote(str(target)))
    return (
        f"This is a data set that save_to_disk wrote{parts if first != folder else ''}. "
        f"Convert it with\n    {line}\n  and give pairs=parquet pairs.path={target}"
    )


def _caption_table(folder: Path) -> str:
    """How to convert a ``captions.txt``: a table of names and captions, or a caption a line."""
    source, target = folder / "captions.txt", folder / "metadata.jsonl"
    if not source.is_file():
        return ""
    with source.open(encoding="utf-8-sig", errors="replace") as file:
        lines = [line.rstrip("\n") for line, _ in zip(file, range(20), strict=False)]
    places = {"target": shlex.quote(str(target))}
    for delimiter, quoting in (("\t", 3), (",", 0), ("|", 3)):
        names = [name.partition("#")[0] for line in lines for name in [line.split(delimiter)[0]]]
        if any(name and (folder / name).is_file() for name in names):
            line = _TABLE.format(
                delimiter=delimiter, quoting=quoting, source=shlex.quote(str(source)), **places
            )
            return f"Its captions.txt is a table: convert it with\n    {line}"
    line = _LINES.format(suffixes=SUFFIXES, source=shlex.quote(str(folder)), **places)
    return (
        "Its captions.txt names no image of the folder; if it has a caption a line, in the order "
        f"of the images by name, convert it with\n    {line}"
    )
