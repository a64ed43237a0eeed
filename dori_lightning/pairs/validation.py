"""Turn the raw rows of a list into pairs, or say everything that is wrong with them at once.

This runs before any model loads, so that a bad list costs seconds.
"""

import hashlib
import logging
import math
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

from dori_lightning.models.protocol import TextToImage
from dori_lightning.types import KINDS, InputError, Kind, Pair, Pairs

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
        }
    return tuple(words for words, happens in applied.items() if happens)


def open_image(path: Path) -> Image.Image:
    """Decode an image completely: EXIF orientation applied, transparency over white, RGB.

    Pixels are all that is kept of the file.

    Raises:
        OSError: Unreadable, truncated, or none of ``FORMATS``.
        PIL.Image.DecompressionBombError: More pixels than Pillow's limit allows.
    """
    with Image.open(path, formats=FORMATS) as file:
        image = ImageOps.exif_transpose(file)
        if _is_deep(image.mode):
            values = np.asarray(image, np.float64)
            span = values.max() - values.min()
            image = Image.fromarray(np.uint8(255 * (values - values.min()) / (span or 1.0)))
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
        missing: The image is not there, which ``on_missing="skip"`` forgives.
    """

    where: str
    column: str
    what: str
    fix: str
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
        missing: There is no such file.
    """

    def __init__(self, what: str, fix: str, *, missing: bool = False) -> None:
        """Keep what is wrong and what to do."""
        super().__init__(what)
        self.what, self.fix, self.missing = what, fix, missing


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
    """Follow a row's relative path and require that it ends at a regular file inside ``root``.

    Args:
        root: Folder that the list may use images of.
        name: Path as the row has it.

    Raises:
        ImageError: Absolute, leads outside (``..`` or a symbolic link), or not a file.
    """
    base = root.resolve()
    if Path(name).is_absolute() or name.startswith("~"):
        raise ImageError(f"absolute path {quote(name)} refused", f"write it relative to {base}")
    try:
        path = (base / name).resolve()
        inside = path.is_relative_to(base)
        found = inside and path.is_file()
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
            "correct the path, add the file, or drop such rows: pairs.on_missing=skip",
            missing=True,
        )
    return path


def _explain(error: Exception, head: bytes) -> ImageError:
    """Say what a file that did not decode really is."""
    name, start = sniff(head), f"starts with {head[:16]!r}"
    if not head:
        return ImageError("the file is empty", "download or copy it again")
    if name == "HTML":
        return ImageError(
            f"a web page saved as an image ({start})",
            "download the image again; the link may be dead or ask for a login",
        )
    if name in FORMATS:
        return ImageError(
            f"damaged or truncated {name} ({error}; {start})", "download or copy it again"
        )
    return ImageError(
        f"not an image of a known format: {name or 'unknown content'} ({start})",
        f"convert it to {', '.join(FORMATS[:-1])} or {FORMATS[-1]}",
    )


def check_image(path: Path) -> str:
    """Decode an image completely and hash its file.

    Args:
        path: A regular file.

    Returns:
        SHA-256 of the file, in hexadecimal.

    Raises:
        ImageError: Unreadable, not a known format, damaged, too many pixels, or too small.
    """
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
            "use the full image, not a thumbnail",
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
            or ``""`` where the file says nothing, ``image`` relative to the list's folder.
        looked_for: What a reader searched in vain, where it looks for images itself.
        problems: What kept the reader from taking the row apart; it is not checked further then.
    """

    where: str
    values: Mapping[str, object] = field(default_factory=dict)
    looked_for: str = ""
    problems: tuple[Problem, ...] = ()


def default_id(file_name: str) -> str:
    """Make a pair's id of a file's stem: characters that ids cannot have become ``_``."""
    name = file_name.replace("\\", "/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name.rpartition(".")[0] or name)[:128]


class _RowCheck:
    """Check one row's columns and remember what is wrong with them."""

    def __init__(self, row: Row, root: Path, names: Mapping[str, str]) -> None:
        self.row, self.value, self.root, self.names = row, row.values.get, root, names
        self.problems: list[Problem] = []

    def pair(self, taken: dict[str, str]) -> Pair:
        """The row as a pair; of use only where there is no problem."""
        kind = self._kind()
        pair = Pair(
            id=self._id(taken),
            kind=kind,
            prompt=self._prompt(),
            image=self.root,
            subject=self._subject(),
            repeats=self._repeats(kind),
            role=self._role(),
        )
        path, sha256 = self._image()
        return replace(pair, image=path, sha256=sha256)

    def _say(self, column: str, what: str, fix: str, *, missing: bool = False) -> None:
        name = self.names.get(column, column)
        self.problems.append(Problem(self.row.where, name, what, fix, missing))

    def _id(self, taken: dict[str, str]) -> str:
        value = self.value("id")
        if value in (None, ""):
            if not self.value("image"):
                return ""  # the image is what the row lacks, and _image() says so
            value = default_id(str(self.value("image")))
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

    def _image(self) -> tuple[Path, str]:
        value = self.value("image")
        if value in (None, "") and self.row.looked_for:
            fix = "add the file, or drop such rows: pairs.on_missing=skip"
            self._say("image", f"found no {self.row.looked_for}", fix, missing=True)
        elif not isinstance(value, str) or not value:
            self._say(
                "image", f"{quote(value)} is no path", f"write a path relative to {self.root}"
            )
        else:
            try:
                path = resolve_inside(self.root, value)
                return path, check_image(path)
            except ImageError as error:
                what = error.what if str(value) in error.what else f"{value}: {error.what}"
                self._say("image", what, error.fix, missing=error.missing)
        return self.root, ""


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
    """Mark pairs whose image file is an earlier pair's.

    Audited ones are warned of, since they are no independent observations.
    """
    first: dict[str, str] = {}
    marked = []
    for pair in pairs:
        earlier = first.setdefault(pair.sha256, pair.id) if pair.sha256 else pair.id
        marked.append(replace(pair, duplicate_of=None if earlier == pair.id else earlier))
    names = [f"{p.id} = {p.duplicate_of}" for p in marked if p.duplicate_of and p.role == "audit"]
    if names:
        logger.warning(
            "%d pairs share their image file with an earlier pair, so they do not count as "
            "independent observations: %s",
            len(names),
            some_of(names),
        )
    return tuple(marked)


def validate_rows(
    rows: Sequence[Row],
    *,
    root: Path,
    source: str,
    names: Mapping[str, str] | None = None,
    kinds: Sequence[Kind] = KINDS,
    limit: int | None = None,
    on_missing: OnMissing = "error",
) -> Pairs:
    """Check every row, decode every image, and return the pairs in the order of the file.

    Args:
        rows: The list.
        root: Folder that images are relative to and may not leave.
        source: The list's file, as the user knows it.
        names: Field of ``Pair`` to the column's name in the file, where they differ.
        kinds: Rows of other kinds are left out unchecked.
        limit: Most audit pairs of each kind, the first ones; training pairs are never cut.
        on_missing: ``skip`` leaves rows without an image out, logs and returns their ids.

    Raises:
        InputError: Anything is wrong; its text is a table of all problems. Or no pair is left.
    """
    if not rows:
        raise InputError(f"{source} has no rows: there is nothing to audit; add at least one pair")
    unwanted = [kind for kind in KINDS if kind not in kinds]
    chosen = [row for row in rows if row.problems or row.values.get("kind") not in unwanted]
    if not chosen:
        found = sorted({str(row.values.get("kind")) for row in rows})
        raise InputError(
            f"{source} has only {', '.join(found)} pairs, none of kinds {list(kinds)}"
        )
    names = {"image": "file_name", **(names or {})}
    taken: dict[str, str] = {}
    problems: list[Problem] = []
    pairs: list[Pair] = []
    skipped: dict[str, str] = {}
    for row in chosen:
        if row.problems:
            problems.extend(row.problems)
            continue
        check = _RowCheck(row, root, names)
        pair, found_here = check.pair(taken), check.problems
        if on_missing == "skip" and any(p.missing for p in found_here):
            skipped[pair.id] = row.where
            found_here = [p for p in found_here if not p.missing]
        elif not found_here:
            pairs.append(pair)
        problems.extend(found_here)
    raise_problems(problems, source=source, rows=len(chosen))
    if skipped:
        logger.warning(
            "%s: skipped %d of %d rows without an image: %s",
            source,
            len(skipped),
            len(chosen),
            some_of([f"{name} ({where})" for name, where in skipped.items()]),
        )
    if not pairs:
        raise InputError(f"{source}: all {len(skipped)} rows were skipped for want of an image")
    chosen_pairs = mark_duplicates(select_pairs(pairs, kinds=kinds, limit=limit))
    _tell_conversions(chosen_pairs)
    return Pairs(chosen_pairs, skipped=skipped)


def _tell_conversions(pairs: Sequence[Pair]) -> None:
    """Say once for each kind how many images are not looked at as they are."""
    counts = Counter(words for pair in pairs for words in conversions(pair.image))
    if counts:
        logger.warning(
            "images are converted, for the attack and the comparison alike: %s",
            ", ".join(f"{count} {words}" for words, count in counts.items()),
        )


def check_prompt_lengths(
    pairs: Sequence[Pair], model: TextToImage, *, strict: bool
) -> tuple[str, ...]:
    """Find prompts that the model's text encoder would cut.

    Args:
        pairs: Which pairs.
        model: Counts the tokens of a prompt.
        strict: Refuse such prompts rather than warn of them.

    Returns:
        Ids of the pairs whose prompt is cut.

    Raises:
        InputError: ``strict`` and there is such a pair.
    """
    limit = model.embedding_shape[0]
    counts = {pair.id: model.token_count(pair.prompt) for pair in pairs}
    long = {name: count for name, count in counts.items() if count > limit}
    if long:
        first = next(pair for pair in pairs if pair.id in long)
        text = (
            f"{len(long)} prompts are longer than the {limit} tokens that the text encoder takes: "
            + some_of([f"{name} ({count})" for name, count in long.items()])
            + f"; {first.id} loses its end {quote(model.cut_off(first.prompt).strip())}"
        )
        if strict:
            raise InputError(
                f"{text}\n  where: the prompts of these pairs\n  fix:   shorten them, or let "
                f"them be cut: task.strict_prompts=false"
            )
        logger.warning("%s. What does not fit is cut", text)
    return tuple(long)
