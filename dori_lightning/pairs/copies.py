"""Altered copies of suspected images: controls of the same complexity that no list has to bring.

A flat control says nothing of a detailed suspect. A copy of the suspect, mirrored or turned, has
its edges, colours and detail and was never shown to the model; attacked like the suspect and
compared with itself, it tells what the attack draws by itself. They are exchangeable with suspects
only approximately, and a model that was trained on mirrored copies voids ``mirrored``
(``learned_alterations``).
"""

import hashlib
import io
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps

from dori_lightning.metrics.evidence import EvidenceSettings
from dori_lightning.pairs.validation import square_image
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.types import InputError, Kind, Pair

Alteration = Literal["mirrored", "turned", "shifted"]

ENOUGH_CONTROLS = 20
"""From this many listed controls on, ``auto`` makes no copies."""

AUTO: tuple[Alteration, ...] = ("mirrored", "turned")


def _turned(image: Image.Image) -> Image.Image:
    """Upside down, the colour channels rotated: red where green was, and so on."""
    red, green, blue = image.transpose(Image.Transpose.ROTATE_180).split()
    return Image.merge("RGB", (green, blue, red))


def _shifted(image: Image.Image) -> Image.Image:
    """Moved by a quarter of its size both ways; what leaves on one side enters on the other."""
    moved = np.roll(np.asarray(image), (image.height // 4, image.width // 4), axis=(0, 1))
    return Image.fromarray(moved)


ALTER: Mapping[Alteration, Callable[[Image.Image], Image.Image]] = {
    "mirrored": ImageOps.mirror,
    "turned": _turned,
    "shifted": _shifted,
}


def alterations(setting: str | Sequence[str], *, controls: int) -> tuple[Alteration, ...]:
    """Read the setting ``pairs.self_controls``.

    Args:
        setting: ``auto`` for mirrored and turned copies where the list has fewer than 20 controls,
            or names of alterations; none for no copies.
        controls: Controls that the list has.

    Raises:
        InputError: An unknown alteration, or one twice.
    """
    if setting == "auto":
        return AUTO if controls < ENOUGH_CONTROLS else ()
    known = get_args(Alteration)
    names = [setting] if isinstance(setting, str) else list(setting)
    if len(set(names)) < len(names) or any(name not in known for name in names):
        raise InputError(
            f"pairs.self_controls must be auto or some of {', '.join(known)}, got {setting!r}",
            fix=f"pairs.self_controls=[{','.join(AUTO)}], or pairs.self_controls=[] for none",
        )
    return tuple(name for name in known if name in names)


def counted_with_copies(
    counts: Mapping[Kind, int], setting: str | Sequence[str]
) -> dict[Kind, int]:
    """Count what an audit attacks: the pairs of a list by kind, and their altered copies.

    Args:
        counts: Pairs of the list by kind.
        setting: ``pairs.self_controls``.

    Raises:
        InputError: An unknown alteration, or one twice.
    """
    controls = counts.get("control", 0)
    suspects = sum(counts.values()) - controls
    copies = suspects * len(alterations(setting, controls=controls))
    return {**counts, "control": controls + copies}


def check_evidence(
    pairs: Iterable[Pair],
    setting: str | Sequence[str],
    evidence: EvidenceSettings,
    *,
    reference: bool,
) -> None:
    """Refuse an error rate that a list, with its altered copies, can never support.

    Args:
        pairs: The list, whose images need not have been read.
        setting: ``pairs.self_controls``.
        evidence: The error rate.
        reference: Whether there is a model that never saw the images.

    Raises:
        InputError: Says how many controls are missing.
    """
    counts = Counter(pair.kind for pair in pairs if pair.role == "audit")
    evidence.check_nulls(counted_with_copies(counts, setting), reference=reference)


def altered_copies(
    pairs: Sequence[Pair], kinds: Sequence[Alteration], folder: Path
) -> tuple[Pair, ...]:
    """Make control pairs of altered copies: the suspect's prompt with its altered image.

    Args:
        pairs: Pairs of the audit; copies are made of all that are no controls.
        kinds: Alterations, each one copy of each image.
        folder: Where the copies' images lie, named by the hash of the original; kept ones are
            used again.

    Returns:
        One pair for each alteration of each suspect, of kind ``control`` and ``copy_of`` it.

    Raises:
        InputError: The list has a pair of a copy's name already.
    """
    taken = {pair.id for pair in pairs}
    made = []
    for pair in pairs:
        for kind in kinds if pair.kind != "control" else ():
            name = f"{pair.id[: 127 - len(kind)]}.{kind}"
            if name in taken:
                raise InputError(
                    f"{name} is both a pair of the list and the {kind} copy of {pair.id}",
                    where="pairs.self_controls",
                    fix="rename the listed pair, or leave this alteration out",
                )
            taken.add(name)
            path = folder / f"{pair.sha256}-{kind}.png"
            if not path.is_file():
                png = io.BytesIO()
                ALTER[kind](square_image(pair.image)).save(png, "PNG")
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, png.getvalue())
            made.append(
                replace(
                    pair, id=name, kind="control", image=path,
                    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                    others=(), repeats=0.0, duplicate_of=None, copy_of=pair.id, alteration=kind,
                )
            )  # fmt: skip
    return tuple(made)


LEARNED = 3
"""Copies of one alteration that have to come back before the model is taken to know it."""


def learned_alterations(
    copies: Iterable[Pair], came_back: Collection[str]
) -> tuple[Alteration, ...]:
    """Alterations whose copies the model seems to have been trained on, such as mirrored images.

    Such a copy is no image that the model never saw. Told by another alteration, whose copies are
    as detailed and do not come back.

    Args:
        copies: Altered copies that were attacked.
        came_back: Ids of those that came back.

    Returns:
        Those with at least `LEARNED` copies that came back, and more than twice as many as of the
        alteration with the fewest.
    """
    counts = {
        kind: sum(pair.id in came_back for pair in own)
        for kind in ALTER
        if (own := [pair for pair in copies if pair.alteration == kind])
    }
    if len(counts) < 2:
        return ()
    fewest = min(counts.values())
    return tuple(k for k, back in counts.items() if back >= LEARNED and back > 2 * fewest)


_SIDE, _MOST = 64, 64
"""Pixels a side at which detail is measured, and images of each kind that it is measured on."""


def relative_detail(pairs: Sequence[Pair]) -> float:
    """How detailed the listed controls are, times the suspects: medians; NaN without either.

    Detail is the mean difference of neighbouring pixels. What an attack does to flat images says
    little of detailed ones.
    """

    def median_detail(own: Sequence[Pair]) -> float:
        return float(np.median([_detail(pair.image) for pair in own[:_MOST]])) if own else math.nan

    suspects = median_detail([pair for pair in pairs if pair.kind != "control"])
    controls = median_detail([p for p in pairs if p.kind == "control" and p.copy_of is None])
    return controls / suspects if suspects else math.nan


def _detail(image: Path) -> float:
    pixels = np.asarray(square_image(image).resize((_SIDE, _SIDE)).convert("L"), np.float64)
    return float(np.abs(np.diff(pixels, axis=0)).mean() + np.abs(np.diff(pixels, axis=1)).mean())
