"""Turn the raw rows of a list into pairs, or say everything that is wrong with them at once.

This runs before any model loads and imports no torch, so that a bad list costs a second.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import struct
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageOps

from dori_lightning.runtime.logging import with_progress
from dori_lightning.types import KINDS, InputError, Kind, Pair, Pairs, Reference, Skipped

if TYPE_CHECKING:
    import torch

    from dori_lightning.models.protocol import TextToImage

logger = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats whose parsers may run; the file's content decides, not its name."""


_ORIENTATION = 0x0112
"""EXIF tag; 1 is upright."""


def _is_deep(mode: str) -> bool:
    return mode.startswith("I;16") or mode in ("I", "F")


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def conversions(path: Path) -> tuple[str, ...]:
    """Name what happens to an image before it is attacked and compared; reads its header only.

    Raises:
        OSError: Unreadable, or none of ``FORMATS``.
    """
    with Image.open(path, formats=FORMATS) as file:
        applied = {
            "turned upright (EXIF)": file.getexif().get(_ORIENTATION, 1) != 1,
            "scaled from 16 bits to 8": _is_deep(file.mode),
            "laid over white (transparency)": _is_transparent(file),
            "greyscale to RGB": file.mode in ("1", "L", "LA"),
            "CMYK to RGB": file.mode == "CMYK",
            "cut to the centred square": file.width != file.height,
            "first frame of an animation": getattr(file, "n_frames", 1) > 1,
        }
    return tuple(words for words, happens in applied.items() if happens)


def open_image(path: Path) -> Image.Image:
    """Decode an image completely: EXIF orientation applied, transparency over white, RGB.

    Pixels are all that is kept of the file; of 16 bits a channel the upper eight, of an animation
    the first frame.

    Raises:
        OSError: Unreadable, truncated, or none of ``FORMATS``.
        PIL.Image.DecompressionBombError: More pixels than Pillow's limit allows.
    """
    with Image.open(path, formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)
        if _is_deep(image.mode):
            # by the format's range: stretching a picture's own range would change its contrast
            image = Image.fromarray(np.uint8(np.round(np.asarray(image, np.float64) / 257)))
        if _is_transparent(image):
            image = image.convert("RGBA")
            background = Image.new("RGBA", image.size, "white")
            background.alpha_composite(image)
            image = background
        image = image.convert("RGB")
        # comments and profiles would go into every file that is made of the image
        image.info = {}
        return image


def square_image(path: Path) -> Image.Image:
    """Decode and cut the largest centred square."""
    image = open_image(path)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def image_tensor(image: Image.Image, size: int | None = None) -> torch.Tensor:
    """Turn an image into a (3, H, W) float tensor in [0, 1].

    Args:
        image: RGB image.
        size: Side in pixels to scale to with Lanczos; None keeps the image's own size.
    """
    import torch  # lists are read without

    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1).float().div_(255)


SHOWN = 20
"""Problems, or names, that one message lists before it only counts."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one row.

    Attributes:
        where: The row's.
        column: Column as the file names it.
        what: What is wrong.
        fix: What to do.
        skippable: The image is missing or damaged, which ``on_missing="skip"`` forgives.
    """

    where: str
    column: str
    what: str
    fix: str
    skippable: bool = False


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
    cells += [(p.where, p.column, p.what, p.fix) for p in problems[:SHOWN]]
    widths = [max(len(line[k]) for line in cells) for k in range(3)]
    lines = [
        "  ".join([*(line[k].ljust(widths[k]) for k in range(3)), line[3]]).rstrip()
        for line in cells
    ]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise InputError("\n  ".join([f"{source}: {count} in {rows} rows", *lines]))


SMALLEST_SIDE = 16
"""Pixels below which an image is a thumbnail or a tracking pixel, not a memorized image."""

SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\0\x05\x16\x07", "a macOS resource file (._NAME), not the image beside it"),
    (b"version https://git-lfs", "a Git LFS pointer"),
)

PARSER_ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""Everything Pillow's parsers are known to raise on crafted files."""


class ImageError(Exception):
    """One image cannot be used.

    Attributes:
        what: What is wrong.
        fix: What to do.
        skippable: The file is missing or damaged, rather than named wrongly.
    """

    def __init__(self, what: str, fix: str, *, skippable: bool = False) -> None:
        """Keep what is wrong and what to do."""
        super().__init__(what)
        self.what, self.fix, self.skippable = what, fix, skippable


OR_SKIP = "or drop such rows: pairs.on_missing=skip"


def sniff(head: bytes) -> str:
    """Name a file's format by its first bytes (at least 32 where the file has them), or ``""``."""
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<script")):
        return "HTML"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        return "AVIF, HEIC or a video"
    return next((name for start, name in SIGNATURES if head.startswith(start)), "")


def resolve_inside(root: Path, name: str) -> Path:
    """Follow a row's relative path; it must end at a regular file or a folder inside ``root``.

    Args:
        root: Folder that the list may use images of.
        name: Path as the row has it.

    Raises:
        ImageError: Absolute, leads outside (``..`` or a symbolic link), or no file or folder.
    """
    base = root.resolve()
    if Path(name).is_absolute() or name.startswith("~"):
        raise ImageError(f"absolute path {quote(name)} refused", f"write it relative to {base}")
    try:
        path = (base / name).resolve()
        inside = path.is_relative_to(base)
        found = inside and (path.is_file() or path.is_dir())
        special = inside and path.exists() and not found
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a NUL
        raise ImageError(
            f"{quote(name)} is no usable path ({error})", "correct the path"
        ) from error
    if not inside:
        raise ImageError(
            f"{quote(name)} leads outside {base}, to {path}: refused",
            "copy the image (not a link to it) into the folder",
        )
    if special:
        raise ImageError(f"{path} is not a regular file", "name an image file")
    if not found:
        raise ImageError(
            f"no such file: {path}",
            f"correct the path, add the file, {OR_SKIP}",
            skippable=True,
        )
    return path


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder by name; downloaders put captions and records beside them.

    Names that begin with a dot are no images: macOS writes such files beside the real ones.
    """
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


class Spellings:
    """What a folder has in place of a name that is not there, each folder read once."""

    def __init__(self, root: Path) -> None:
        """Begin with no folder read."""
        self.root = root
        self._names: dict[Path, dict[str, str]] = {}

    def explain(self, name: str) -> ImageError | None:
        """Say how a path that was not found differs from one that is there; None for no such.

        Told apart: backslashes, Unicode forms of the same letters, and case.
        """
        place, differs = self.root, set[str]()
        plain = name.replace("\\", "/")
        if plain != name and not (self.root / name).exists():
            differs.add("the list has \\ where paths have /")
        for part in Path(plain).parts:
            if not (place / part).exists():
                own = self._in(place).get(_folded(part))
                if own is None:
                    return None
                same = unicodedata.normalize("NFC", own) == unicodedata.normalize("NFC", part)
                differs.add(
                    f"the list spells {part!a}, the disk {own!a}: "
                    + ("two Unicode forms (NFC, NFD) of the same letters" if same else "case")
                )
                part = own
            place /= part
        if not differs:
            return None
        return ImageError(
            f"no such file: {quote(name)}, but there is {place} ({'; '.join(sorted(differs))})",
            "write the path as the disk has it, or rename the file",
        )

    def _in(self, folder: Path) -> dict[str, str]:
        if folder not in self._names:
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
            self._names[folder] = {_folded(name): name for name in names}
        return self._names[folder]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _explain(error: Exception, head: bytes) -> ImageError:
    """Say what a file that did not decode really is."""
    name, start = sniff(head), f"starts with {head[:16]!r}"
    if not head:
        return ImageError("the file is empty", _AGAIN, skippable=True)
    if name == "HTML":
        return ImageError(
            f"a web page saved as an image ({start})",
            f"download it again (the link may be dead or ask for a login), {OR_SKIP}",
            skippable=True,
        )
    if name in FORMATS:
        return ImageError(
            f"damaged or truncated {name} ({error}; {start})", _AGAIN, skippable=True
        )
    return ImageError(
        f"not an image of a known format: {name or 'unknown content'} ({start})",
        f"convert it to {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, {OR_SKIP}",
        skippable=True,
    )


_AGAIN = f"download or copy it again, {OR_SKIP}"


_names_only: ContextVar[bool] = ContextVar("names_only", default=False)


@contextmanager
def names_only() -> Iterator[None]:
    """Read lists, columns and names of files while open, and no image.

    Remarks are left out too: they come when the list is read for good.
    """
    remarks = logging.getLogger(__package__)
    level, token = remarks.level, _names_only.set(True)
    remarks.setLevel(logging.ERROR)
    try:
        yield
    finally:
        remarks.setLevel(level)
        _names_only.reset(token)


def check_image(path: Path) -> str:
    """Decode an image completely and hash its file.

    Args:
        path: A regular file.

    Returns:
        SHA-256 of the file, in hexadecimal; empty within `names_only`.

    Raises:
        ImageError: Unreadable, not a known format, damaged, too many pixels, or too small.
    """
    if _names_only.get():
        return ""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(f"unreadable: {error}", "make the file readable") from error
    try:
        with warnings.catch_warnings():
            # Pillow refuses from twice its limit on, but only warns before.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            size = open_image(path).size
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise ImageError(
            f"more than {limit:,} pixels, perhaps a decompression bomb ({error})",
            f"scale the image down to at most {limit:,} pixels",
        ) from error
    except PARSER_ERRORS as error:
        raise _explain(error, head) from error
    if min(size) < SMALLEST_SIDE:
        raise ImageError(
            f"{size[0]} x {size[1]} pixels, but both sides need {SMALLEST_SIDE}",
            f"use the full image, not a thumbnail, {OR_SKIP}",
            skippable=True,
        )
    return digest


Role = Literal["audit", "training"]
ROLES: tuple[Role, ...] = ("audit", "training")
ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


@dataclass(frozen=True)
class Row:
    """One row of a list, nothing checked.

    Attributes:
        where: Row as its file counts it: ``line 3`` of a text file (the header is line 1),
            ``row 3`` of a parquet file (the first is row 1).
        values: Column to value, as the file has it; to be checked, by the fields of ``Pair``: None
            or ``""`` where the file says nothing, ``image`` relative to the list's folder: a file,
            a folder of reference images, or a list of files and folders.
        looked_for: What a reader searched in vain, where it looks for images itself.
        problems: What kept the reader from taking the row apart; it is not checked further then.
        fetch: Writes images that are no files yet and returns their paths relative to the list's
            folder; called for rows that are taken, in place of ``image``.
        lost: What a reader searched in vain, of a row that has other images.
    """

    where: str
    values: Mapping[str, object] = field(default_factory=dict)
    looked_for: str = ""
    problems: tuple[Problem, ...] = ()
    fetch: Callable[[], Sequence[str]] | None = None
    lost: tuple[str, ...] = ()


def images_of(value: object) -> list[object]:
    """The images that a row names: none, one, or several."""
    if value in (None, "", [], ()):
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def default_id(file_name: str) -> str:
    """Make a pair's id of a file's stem: characters that ids cannot have become ``_``."""
    name = file_name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name.rpartition(".")[0] or name)[:128]


class _RowCheck:
    """Check one row's columns, then its images, and remember what is wrong with them."""

    def __init__(self, row: Row, spellings: Spellings, names: Mapping[str, str]) -> None:
        self.row, self.value, self.names = row, row.values.get, names
        self.root, self.spellings = spellings.root, spellings
        self.problems: list[Problem] = []

    def pair(self, taken: dict[str, str]) -> Pair:
        """The row as a pair without images; of use only where there is no problem."""
        kind = self._kind()
        return Pair(
            id=self._id(taken),
            kind=kind,
            prompt=self._prompt(),
            image=self.root,
            subject=self._subject(),
            repeats=self._repeats(kind),
            role=self._role(),
        )

    def _say(self, column: str, what: str, fix: str, *, skippable: bool = False) -> None:
        name = self.names.get(column, column)
        self.problems.append(Problem(self.row.where, name, what, fix, skippable))

    def _id(self, taken: dict[str, str]) -> str:
        value = self.value("id")
        if value in (None, ""):
            images = images_of(self.value("image"))
            if not images:
                return ""  # the image is what the row lacks, and references() says so
            value = default_id(str(images[0]))
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not ID.fullmatch(value) or not value.strip("."):
            self._say(
                "id",
                f"{quote(value)} is no id",
                "use 1 to 128 of A-Z a-z 0-9 . _ - (and not only dots)",
            )
        elif value in taken:
            self._say(
                "id", f"{value!r} is already the id of {taken[value]}", "give each row its own id"
            )
        else:
            taken[value] = self.row.where
        return str(value)

    def _kind(self) -> Kind:
        value = self.value("kind")
        for kind in KINDS:
            if value == kind:
                return kind
        self._say("kind", f"{quote(value)} is no kind", f"write {', '.join(KINDS)}")
        return "vm"

    def _prompt(self) -> str:
        value = self.value("prompt")
        if value is not None and not isinstance(value, str):
            self._say("prompt", f"{quote(value)} is not text", "write the caption as text")
        elif not (value or "").strip():
            self._say("prompt", "empty", "write the caption that leads to the image")
        return str(value)

    def _subject(self) -> str | None:
        value = self.value("subject")
        if value is not None and not isinstance(value, str):
            self._say("subject", f"{quote(value)} is not text", "write it as text or leave it out")
        return str(value) if value else None

    def _repeats(self, kind: Kind) -> float:
        value = self.value("repeats")
        if value in (None, ""):
            return 0.0 if kind == "control" else 1.0
        number = math.nan
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            with suppress(OverflowError, ValueError):  # said below, like all that is no number
                number = float(value)
        if not math.isfinite(number) or number < 0:
            self._say(
                "repeats",
                f"{quote(value)} is no finite number of at least 0",
                "write a number, or nothing for the default",
            )
        return number

    def _role(self) -> Role:
        value = self.value("role")
        for role in ROLES:
            if value == role:
                return role
        if value not in (None, ""):
            self._say("role", f"{quote(value)} is no role", f"write {' or '.join(ROLES)}")
        return "audit"

    def references(self) -> list[Reference]:
        """Decode the row's images; the same file is one image, however often it is there."""
        if self.row.fetch and _names_only.get():
            return [Reference(self.root, "")]
        images = images_of(self.row.fetch() if self.row.fetch else self.value("image"))
        found: dict[str, Reference] = {}
        missing = self.row.lost if images else (self.row.looked_for,)
        for what in filter(None, missing):
            self._say("image", f"found no {what}", f"add the file, {OR_SKIP}", skippable=True)
        if not images and not self.row.looked_for:
            self._say_no_path(self.value("image"))
        for name in images:
            if not isinstance(name, str) or not name:
                self._say_no_path(name)
                continue
            try:
                for shown, path in self._files(name):
                    try:
                        sha256 = check_image(path)
                    except ImageError as error:
                        self._say_image(shown, error)
                    else:
                        found.setdefault(sha256, Reference(path, sha256))
            except ImageError as error:
                self._say_image(name, error)
        return list(found.values())

    def _files(self, name: str) -> list[tuple[str, Path]]:
        """The image file of a name, or those of a folder, each as the list would name it."""
        try:
            path = resolve_inside(self.root, name)
        except ImageError as error:
            raise (self.spellings.explain(name) if error.skippable else None) or error from None
        if path.is_dir():
            files = image_files(path)
            if path == self.root.resolve() or not files:
                raise ImageError(
                    f"{path} is not a regular file, nor a folder with reference images",
                    "name an image file, or a folder of them",
                )
            inside = [f"{name.rstrip('/')}/{file.name}" for file in files]
            return [(own, resolve_inside(self.root, own)) for own in inside]
        return [(name, path)]

    def _say_no_path(self, value: object) -> None:
        what, fix = f"{quote(value)} is no path", f"write a path relative to {self.root}"
        self._say("image", what, fix)

    def _say_image(self, name: str, error: ImageError) -> None:
        what = error.what if name in error.what else f"{name}: {error.what}"
        self._say("image", what, error.fix, skippable=error.skippable)


OnMissing = Literal["error", "skip"]


def select_pairs(
    pairs: Sequence[Pair], *, kinds: Sequence[Kind], limit: int | None
) -> tuple[Pair, ...]:
    """Keep the first ``limit`` audit pairs of each of ``kinds``, and their training pairs."""
    counts: Counter[str] = Counter()
    kept = []
    for pair in pairs:
        counts[pair.kind] += pair.role == "audit"
        within = limit is None or pair.role == "training" or counts[pair.kind] <= limit
        if pair.kind in kinds and within:
            kept.append(pair)
    return tuple(kept)


def mark_duplicates(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """Mark pairs that share an image file with an earlier pair.

    Audited ones are warned of, since they are no independent observations.
    """
    first: dict[str, str] = {}
    marked = []
    for pair in pairs:
        hashes = [own.sha256 for own in pair.references if own.sha256]
        earlier = next((first[own] for own in hashes if own in first), None)
        for own in hashes:
            first.setdefault(own, pair.id)
        marked.append(replace(pair, duplicate_of=earlier))
    names = [f"{p.id} = {p.duplicate_of}" for p in marked if p.duplicate_of and p.role == "audit"]
    if names:
        logger.warning(
            "%d pairs share their image file with an earlier pair, so they do not count as "
            "independent observations: %s",
            len(names),
            some_of(names),
        )
    return tuple(marked)


class NoneOfKindsError(InputError):
    """A list is as it should be, but holds no pair of the kinds to take."""


def validate_rows(
    rows: Iterable[Row],
    *,
    root: Path,
    source: str,
    names: Mapping[str, str] | None = None,
    kinds: Sequence[Kind] = KINDS,
    limit: int | None = None,
    on_missing: OnMissing = "error",
) -> Pairs:
    """Check every row, decode the images of those that are taken, and return these in order.

    Args:
        rows: The list, each row looked at once.
        root: Folder that images are relative to and may not leave.
        source: The list's file, as the user knows it.
        names: Field of ``Pair`` to the column's name in the file, where they differ.
        kinds: Rows of other kinds are left out unchecked.
        limit: Most audit pairs of each kind, the first ones, training pairs are never cut; the
            images of rows beyond are not looked at.
        on_missing: ``skip`` leaves missing and damaged images out, and rows that have no other;
            they are logged and returned.

    Raises:
        InputError: Anything is wrong; its text is a table of all problems. Or no pair is left.
    """
    names = {"image": "file_name", **(names or {})}
    spellings, unwanted = Spellings(root), [kind for kind in KINDS if kind not in kinds]
    taken: dict[str, str] = {}
    problems: list[Problem] = []
    pairs: list[Pair] = []
    skipped: list[Skipped] = []
    found: Counter[str] = Counter()
    counts: Counter[Kind] = Counter()
    chosen = 0
    # names alone are read in no time and before torch is there, archives as they are unpacked
    if isinstance(rows, list) and not _names_only.get():
        rows = with_progress(f"read {source}", rows)
    for row in rows:
        if row.problems:
            chosen += 1
            problems.extend(row.problems)
            continue
        kind = str(row.values.get("kind"))
        found[kind] += 1
        if kind in unwanted:
            continue
        chosen += 1
        check = _RowCheck(row, spellings, names)
        pair = check.pair(taken)
        if limit is None or pair.role == "training" or counts[pair.kind] < limit:
            references = check.references()
            if on_missing == "skip":
                lost = [p for p in check.problems if p.skippable]
                check.problems = [p for p in check.problems if not p.skippable]
                what: Literal["pair", "image"] = "image" if references else "pair"
                where = f"{source}, {row.where}"
                skipped += [Skipped(pair.id, where, p.what, what) for p in lost]
            if references and not check.problems:
                image, *others = references
                pairs.append(
                    replace(pair, image=image.image, sha256=image.sha256, others=tuple(others))
                )
                counts[pair.kind] += pair.role == "audit"
        problems.extend(check.problems)
    if not chosen and not found:
        raise InputError(f"{source} has no rows: there is nothing to audit; add at least one pair")
    if not chosen:
        raise NoneOfKindsError(
            f"{source} has only {', '.join(sorted(found))} pairs, none of kinds {list(kinds)}"
        )
    raise_problems(problems, source=source, rows=chosen)
    if _names_only.get():  # the rest is of images, or is said when the list is read for good
        return Pairs(pairs, skipped=skipped)
    _tell_skipped(skipped, source, chosen)
    if not pairs:
        rows_skipped = len({own.id for own in skipped})
        raise InputError(f"{source}: all {rows_skipped} rows were skipped for want of an image")
    marked = mark_duplicates(pairs)
    _tell_conversions(marked)
    return Pairs(marked, skipped=skipped)


def _tell_skipped(skipped: Sequence[Skipped], source: str, rows: int) -> None:
    for what, words in {"pair": "rows without an image", "image": "further images"}.items():
        own = [one for one in skipped if one.what == what]
        if own:
            logger.warning(
                "%s: skipped %d %s, of %d rows: %s",
                source,
                len({one.id for one in own}) if what == "pair" else len(own),
                words,
                rows,
                some_of([f"{o.id} ({o.where.removeprefix(f'{source}, ')}: {o.why})" for o in own]),
            )


def _tell_conversions(pairs: Sequence[Pair]) -> None:
    """Say once for each kind how many images are not looked at as they are."""
    counts = Counter(
        words for pair in pairs for own in pair.references for words in conversions(own.image)
    )
    if counts:
        logger.warning(
            "images are converted, for the attack and the comparison alike: %s",
            ", ".join(f"{count} {words}" for words, count in counts.items()),
        )


def check_prompt_lengths(
    pairs: Sequence[Pair], model: TextToImage, *, strict: bool
) -> tuple[Pair, ...]:
    """Find prompts that some of the model's text encoders would cut.

    Args:
        pairs: Which pairs.
        model: Knows its text encoders.
        strict: Refuse such prompts rather than warn of them.

    Returns:
        The pairs, each with the text encoders that cut its prompt.

    Raises:
        InputError: ``strict`` and there is such a pair.
    """
    long = {pair.id: cuts for pair in pairs if (cuts := model.cuts(pair.prompt))}
    if long:
        limits = {cut.encoder: cut.limit for cuts in long.values() for cut in cuts}
        by_encoder = [
            f"{encoder} takes {limit} tokens of "
            + some_of(
                [f"{i} ({c.tokens})" for i, cuts in long.items() for c in cuts
                 if c.encoder == encoder]
            )
            for encoder, limit in limits.items()
        ]  # fmt: skip
        first, cuts = next(iter(long.items()))
        most = max(cuts, key=lambda cut: cut.tokens - cut.limit)
        text = (
            f"{len(long)} prompts are longer than a text encoder takes: "
            + "; ".join(by_encoder)
            + f"; {first} loses its end {quote(most.lost)} to {most.encoder}"
        )
        if strict:
            raise InputError(
                f"{text}\n  where: the prompts of these pairs\n  fix:   shorten them, or let "
                f"them be cut: task.strict_prompts=false"
            )
        logger.warning("%s. What does not fit is cut", text)
    return tuple(
        replace(pair, cut_by=tuple(cut.encoder for cut in long.get(pair.id, ()))) for pair in pairs
    )
