"""The page's section on what the mitigation costs: numbers, and both models' pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori_lightning.report.pictures import jpeg_uri, thumbnail
from dori_lightning.report.summary import interval_words, number_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from dori_lightning.metrics.utility import (
        Comparison as UtilityComparison,
        DenoisingLoss,
        PictureRow,
        Replicas,
        Utility,
    )
    from dori_lightning.report.pictures import Disclosure

__all__ = ["CostRow", "CostSection", "Twin", "utility_section"]

MOST_SHOWN = 12
"""Prompts of each kind whose pictures are shown."""

_NAMES = {
    "denoising_loss": "Denoising loss",
    "ordinary": "Pictures of ordinary prompts",
    "kid": "KID of ordinary prompts",
    "fid": "FID of ordinary prompts",
    "alignment": "Prompt alignment of ordinary prompts",
    "neighbours": "Pictures of neighbour prompts",
    "neighbours of some pairs": "Neighbour prompts of some pairs",
    "neighbours.kid": "KID of neighbour prompts",
    "neighbours.fid": "FID of neighbour prompts",
    "neighbours.alignment": "Prompt alignment of neighbour prompts",
}

_ORDINARY = "Pictures of ordinary prompts"
_NEAR = "Pictures of prompts near the suspected ones"


@dataclass(frozen=True)
class CostRow:
    """One measure as text.

    Attributes:
        label: Its name.
        unmitigated: The unmitigated model's value.
        mitigated: The mitigated model's.
        change: How they differ, with its interval.
        note: What it is, and on how much it rests.
        first: Whether a group of rows begins here.
    """

    label: str
    unmitigated: str
    mitigated: str
    change: str
    note: str
    first: bool = False


@dataclass(frozen=True)
class Twin:
    """Both models' pictures of one prompt and seed.

    Attributes:
        prompt: The prompt.
        unmitigated: ``data:`` address of the unmitigated model's picture.
        mitigated: That of the mitigated model's.
        note: How close they are, in words.
    """

    prompt: str
    unmitigated: str
    mitigated: str
    note: str


@dataclass(frozen=True)
class CostSection:
    """Everything that the section shows.

    Attributes:
        lead: The answer in one or two sentences.
        rows: The table.
        left_out: What was not measured, in words, with the reason.
        grids: Title, explanation and pictures of each kind of prompt; empty where pictures are
            not to be shown.
    """

    lead: str
    rows: tuple[CostRow, ...]
    left_out: tuple[tuple[str, str], ...]
    grids: tuple[tuple[str, str, tuple[Twin, ...]], ...]


def utility_section(utility: Utility, *, disclosure: Disclosure) -> CostSection:
    """Put the section together.

    Raises:
        InputError: A picture to be shown is gone or unreadable.
    """
    loss, near = utility.denoising_loss, utility.neighbours
    rows: list[CostRow] = [] if loss is None else [_loss_row(loss)]
    if utility.ordinary is not None:
        rows += _picture_rows(utility.ordinary, utility.descriptor, "ordinary prompts")
    if utility.replicas is not None:
        rows.append(_replica_row(utility.replicas))
    if near is not None:
        rows += _picture_rows(
            near,
            utility.descriptor,
            "neighbour prompts that did not replicate before",
            first=utility.replicas is None,
        )
    return CostSection(
        lead=_lead(utility),
        rows=tuple(rows),
        left_out=tuple((_NAMES.get(k, k), why) for k, why in utility.left_out.items()),
        grids=tuple(_grids(utility, disclosure)),
    )


def _lead(utility: Utility) -> str:
    """Answer in counts and ratios; nothing here calls a cost small or large."""
    loss, replicas = utility.denoising_loss, utility.replicas
    sentences = []
    if loss is not None and math.isnan(loss.ratio):
        sentences.append(
            "With the mitigation the denoising loss is no finite number: the model is broken."
        )
    elif loss is not None:
        sentences.append(
            f"On {number_words(loss.examples, 'ordinary picture')} the denoising loss with the "
            f"mitigation is {loss.ratio:.3f} times the loss without it (95 % interval "
            f"{_span(loss.ratio_ci95, 3)})."
        )
    if replicas is not None:
        sentences.append(
            f"Of {number_words(replicas.prompts, 'prompt')} near the suspected ones, "
            f"{replicas.unmitigated} brought the original back without the mitigation, "
            f"{replicas.mitigated} with it."
        )
    return " ".join(sentences) or "Pictures of the model with the mitigation and without it."


def _loss_row(loss: DenoisingLoss) -> CostRow:
    change = (
        "not finite"
        if math.isnan(loss.ratio)
        else f"× {loss.ratio:.3f} ({_span(loss.ratio_ci95, 3)})"
    )
    note = (
        f"mean squared error of the predicted noise, "
        f"{number_words(loss.examples, 'ordinary picture')} × {number_words(loss.draws, 'draw')}"
    )
    return CostRow(
        "Denoising loss", _number(loss.unmitigated, 4), _number(loss.mitigated, 4), change, note,
        first=True,
    )  # fmt: skip


def _picture_rows(
    sets: UtilityComparison, descriptor: str, which: str, *, first: bool = True
) -> Iterator[CostRow]:
    count = (
        f"{number_words(sets.prompts, 'prompt')} × {number_words(sets.pictures_each, 'picture')}"
    )
    note = f"same prompt, same seed, by {descriptor}; median over prompts; {count}"
    yield CostRow(
        f"Similarity of the two models' pictures, {which}", "", "",
        f"{sets.similarity:.2f} ({_span(sets.similarity_ci95, 2)})", note, first=first,
    )  # fmt: skip
    if sets.kid is not None:
        yield CostRow(
            f"KID, {which}", "", "", f"{sets.kid.mean:.4f} ± {sets.kid.std:.4f}",
            f"distance of the two sets of pictures, 0 for equal ones; {sets.features}; over "
            f"random halves of {number_words(sets.kid.groups, 'group')}",
        )  # fmt: skip
    if sets.fid is not None:
        yield CostRow(
            f"FID, {which}", "", "", f"{sets.fid:.3f}",
            f"distance of the two sets of pictures, 0 for equal ones; {sets.features}",
        )  # fmt: skip
    if sets.alignment is not None:
        found = sets.alignment
        yield CostRow(
            f"Prompt alignment, {which}",
            f"{found.unmitigated:.3f}",
            f"{found.mitigated:.3f}",
            f"{found.change:+.3f} ({_span(found.change_ci95, 3, signed=True)})",
            "CLIP score of pictures with their prompts, median over prompts; difference: mean",
        )


def _replica_row(replicas: Replicas) -> CostRow:
    def rate(count: int, interval: tuple[float, float]) -> str:
        return f"{count} of {replicas.prompts} ({interval_words(interval)})"

    return CostRow(
        "Neighbour prompts that bring the original back",
        rate(replicas.unmitigated, replicas.unmitigated_ci95),
        rate(replicas.mitigated, replicas.mitigated_ci95),
        "",
        "prompts near a suspected one whose pictures exceed the threshold",
        first=True,
    )


def _grids(
    utility: Utility, disclosure: Disclosure
) -> Iterator[tuple[str, str, tuple[Twin, ...]]]:
    if disclosure == "none":
        return
    for title, kind in ((_ORDINARY, "ordinary"), (_NEAR, "neighbour")):
        rows = [row for row in utility.picture_rows if row.kind == kind]
        chosen = _chosen(rows)
        if not chosen:
            continue
        prompts = len({row.id for row in rows})
        words = f"Without and with the mitigation, from the same seed. Shown are {len(chosen)}"
        words += f" of {number_words(prompts, 'prompt')}, the first ones, not chosen by result."
        yield title, words, tuple(_twin(row, disclosure) for row in chosen)


def _chosen(rows: Iterable[PictureRow]) -> list[PictureRow]:
    """First seed of the first prompts: one of each group, then the second of each."""
    first = {row.id: row for row in reversed(list(rows))}
    waiting = list(reversed(first.values()))
    chosen: list[PictureRow] = []
    while waiting and len(chosen) < MOST_SHOWN:
        turn = list({row.group: row for row in reversed(waiting)}.values())[::-1]
        chosen += turn
        waiting = [row for row in waiting if row not in turn]
    return chosen[:MOST_SHOWN]


def _twin(row: PictureRow, disclosure: Disclosure) -> Twin:
    note = f"similarity {row.similarity:.2f}"
    if row.original_unmitigated is not None and row.original_mitigated is not None:
        note += (
            f"; with the original {row.original_unmitigated:.2f} without, "
            f"{row.original_mitigated:.2f} with"
        )
    return Twin(
        row.prompt, _uri(row.unmitigated, disclosure), _uri(row.mitigated, disclosure), note
    )


def _uri(path: Path, disclosure: Disclosure) -> str:
    shown = thumbnail(path, disclosure)
    assert shown is not None, "nothing is built where pictures are not shown"
    return jpeg_uri(shown)


def _number(value: float, digits: int) -> str:
    return "not finite" if math.isnan(value) else f"{value:.{digits}f}"


def _span(interval: tuple[float, float], digits: int, *, signed: bool = False) -> str:
    low, high = (f"{value:{'+' if signed else ''}.{digits}f}" for value in interval)
    return f"{low} to {high}"
