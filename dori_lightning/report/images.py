"""Images as a report may show them: thumbnails, blurred or left out, and the grid of an attack."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dori_lightning.metrics.replication import PairResult
from dori_lightning.pairs.validation import square_image
from dori_lightning.report.record import NOT_KEPT, AuditReport, Disclosure
from dori_lightning.types import Condition, InputError

THUMBNAIL = 192
"""Longest side of an embedded image in pixels."""

_BLURRED = 10  # pixels a side that survive blurring: a colour scheme, no face and no text

_SUSPECTED, _CONTROLS = 8, 4
"""Rows of a grid: more would not fit a screen."""

_SIDE, _GAP, _LINE, _FRAME = 128, 6, 15, 3  # pixels of a grid
_GROUND, _TEXT, _PALE, _ALARM = "#ffffff", "#222222", "#dddddd", "#c0202f"


def thumbnail(path: Path, disclosure: Disclosure, *, side: int = THUMBNAIL) -> Image.Image | None:
    """Read an image as it may be shown.

    Blurring throws the pixels away rather than hiding them: nothing in the result can be sharpened
    back.

    Returns:
        A square image, or None where images are not shown or this one is not kept.

    Raises:
        InputError: The file is gone or unreadable.
    """
    if disclosure == "none" or path == NOT_KEPT:
        return None
    try:
        image = square_image(path)
    except OSError as error:
        raise InputError(
            f"cannot show {path}: {error}; restore the file, or render the report with images=none"
        ) from None
    if disclosure == "blurred":
        few = image.resize((_BLURRED, _BLURRED), Image.Resampling.BOX)
        return few.resize((side // 2, side // 2), Image.Resampling.BICUBIC)
    if image.width > side:
        return image.resize((side, side), Image.Resampling.LANCZOS)
    return image


def thumbnail_uri(path: Path, disclosure: Disclosure, *, side: int = THUMBNAIL) -> str | None:
    """Encode ``thumbnail`` as a ``data:`` address, JPEG without chroma subsampling."""
    image = thumbnail(path, disclosure, side=side)
    if image is None:
        return None
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=85, subsampling=0, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"


def attack_grid(
    report: AuditReport, attack: Condition | None, *, images: Disclosure
) -> Image.Image | None:
    """Draw originals beside what their prompts and an attack bring back, a row for each pair.

    Below an image stands its similarity to the original; one above the threshold is framed.

    A baseline adds the prompts' images before the mitigation. ``attack`` None shows the prompts
    alone.

    Returns:
        Suspected images first, the first of each in the order of the list; None where there is
        nothing to show.
    """
    prompt = Condition("prompt")
    after = results_by_condition(report.pair_results)
    columns = [("from its prompt", after, prompt)]
    if report.baseline:
        before = results_by_condition(report.baseline_results)
        columns.insert(0, ("before mitigation", before, prompt))
    if attack is not None:
        columns.append((f"attack from {attack.init}", after, attack))
    pairs = {o.pair.id: o.pair for o in report.outcomes if attack in (None, o.condition)}.values()
    shown = [
        *[pair for pair in pairs if pair.kind != "control"][:_SUSPECTED],
        *[pair for pair in pairs if pair.kind == "control"][:_CONTROLS],
    ]
    if images == "none" or not shown:
        return None
    wide, high = _SIDE + _GAP, _SIDE + _LINE + _GAP
    size = (wide * (1 + len(columns)) + _GAP, high * len(shown) + _LINE + _GAP)
    sheet = Image.new("RGB", size, _GROUND)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)

    def write(column: int, top: int, text: str, colour: str = _TEXT) -> None:
        while font.getlength(text) > _SIDE:
            text = text[:-1]
        pen.text((_GAP + wide * column, top), text, colour, font)

    def show(column: int, top: int, path: Path | None, text: str, *, alarm: bool = False) -> None:
        left = _GAP + wide * column
        image = thumbnail(path, images, side=_SIDE) if path is not None else None
        if image is not None:
            sheet.paste(image.convert("RGB").resize((_SIDE, _SIDE)), (left, top))
        if alarm or image is None:
            frame = (left, top, left + _SIDE - 1, top + _SIDE - 1)
            pen.rectangle(frame, outline=_ALARM if alarm else _PALE, width=_FRAME if alarm else 1)
        write(column, top + _SIDE + 1, text, _ALARM if alarm else _TEXT)

    for column, heading in enumerate(("original", *(title for title, _, _ in columns))):
        write(column, _GAP // 2, heading)
    for line, pair in enumerate(shown):
        top = _LINE + _GAP + high * line
        show(0, top, pair.image, f"{pair.kind} {pair.id}")
        for column, (_, results, condition) in enumerate(columns, 1):
            result = results.get((pair.id, condition))
            if result is None:
                show(column, top, None, "not run")
            elif result.reproduced is None:
                show(column, top, None, result.status)
            else:
                text = f"{result.best:.2f}"
                show(column, top, result.picture, text, alarm=result.reproduced)
    return sheet


def results_by_condition(
    results: Iterable[PairResult],
) -> dict[tuple[str, Condition | None], PairResult]:
    """Results by pair id and condition."""
    return {(result.pair.id, result.condition): result for result in results}
