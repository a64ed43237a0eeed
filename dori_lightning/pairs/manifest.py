"""Turn the raw rows of a list into pairs, or say everything that is wrong with them at once.

This runs before any model loads, so that a bad list costs seconds.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from dori_lightning.pairs.images import conversions
from dori_lightning.pairs.problems import quote, raise_problems, some_of
from dori_lightning.pairs.rows import check_row
from dori_lightning.types import KINDS, InputError, Kind, Pair, Pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from dori_lightning.pairs.problems import Problem
    from dori_lightning.pairs.rows import RawRow

__all__ = [
    "OnMissing",
    "check_prompt_lengths",
    "mark_duplicates",
    "select_pairs",
    "validate_rows",
]

logger = logging.getLogger(__name__)

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
    """Mark pairs whose picture file is an earlier pair's.

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
            "%d pairs share their picture file with an earlier pair, so they do not count as "
            "independent observations: %s",
            len(names),
            some_of(names),
        )
    return tuple(marked)


def validate_rows(
    rows: Sequence[RawRow],
    *,
    root: Path,
    source: str,
    names: Mapping[str, str] | None = None,
    kinds: Sequence[Kind] = KINDS,
    limit: int | None = None,
    on_missing: OnMissing = "error",
) -> Pairs:
    """Check every row, decode every picture, and return the pairs in the order of the file.

    Args:
        rows: The list.
        root: Folder that pictures are relative to and may not leave.
        source: The list's file, as the user knows it.
        names: Field of ``RawRow`` to the column's name in the file, where they differ.
        kinds: Rows of other kinds are left out unchecked.
        limit: Most audit pairs of each kind, the first ones; training pairs are never cut.
        on_missing: ``skip`` leaves rows without a picture out, logs and returns their ids.

    Raises:
        InputError: Anything is wrong; its text is a table of all problems. Or no pair is left.
    """
    if not rows:
        raise InputError(f"{source} has no rows: there is nothing to audit; add at least one pair")
    chosen = [row for row in rows if row.kind in kinds or row.kind not in KINDS or row.problems]
    if not chosen:
        found = sorted({str(row.kind) for row in rows})
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
        pair, found_here = check_row(row, root=root, names=names, taken=taken)
        if on_missing == "skip" and any(p.missing for p in found_here):
            skipped[pair.id] = row.where
            found_here = [p for p in found_here if not p.missing]
        elif not found_here:
            pairs.append(pair)
        problems.extend(found_here)
    raise_problems(problems, source=source, rows=len(chosen))
    if skipped:
        logger.warning(
            "%s: skipped %d of %d rows without a picture: %s",
            source,
            len(skipped),
            len(chosen),
            some_of([f"{name} ({where})" for name, where in skipped.items()]),
        )
    if not pairs:
        raise InputError(f"{source}: all {len(skipped)} rows were skipped for want of a picture")
    chosen_pairs = mark_duplicates(select_pairs(pairs, kinds=kinds, limit=limit))
    _tell_conversions(chosen_pairs)
    return Pairs(chosen_pairs, skipped=skipped)


def _tell_conversions(pairs: Sequence[Pair]) -> None:
    """Say once for each kind how many pictures are not looked at as they are."""
    counts = Counter(words for pair in pairs for words in conversions(pair.image))
    if counts:
        logger.warning(
            "pictures are converted, for the attack and the comparison alike: %s",
            ", ".join(f"{count} {words}" for words, count in counts.items()),
        )


def check_prompt_lengths(
    pairs: Sequence[Pair],
    token_count: Callable[[str], int],
    limit: int,
    *,
    strict: bool,
    cut_off: Callable[[str], str] | None = None,
) -> tuple[str, ...]:
    """Find prompts that the text encoder would cut; this needs the model's tokenizer.

    Args:
        pairs: Which pairs.
        token_count: Tokens of a prompt with its start and end token, before any truncation.
        limit: Tokens that fit.
        strict: Refuse such prompts rather than warn of them.
        cut_off: The end of a prompt that does not fit, for the message.

    Returns:
        Ids of the pairs whose prompt is cut.

    Raises:
        InputError: ``strict`` and there is such a pair.
    """
    counts = {pair.id: token_count(pair.prompt) for pair in pairs}
    long = {name: count for name, count in counts.items() if count > limit}
    if long:
        text = (
            f"{len(long)} prompts are longer than the {limit} tokens that the text encoder takes: "
            + some_of([f"{name} ({count})" for name, count in long.items()])
        )
        if cut_off is not None:
            first = next(pair for pair in pairs if pair.id in long)
            text += f"; {first.id} loses its end {quote(cut_off(first.prompt).strip())}"
        if strict:
            raise InputError(
                f"{text}\n  where: the prompts of these pairs\n  mend:  shorten them, or let "
                f"them be cut: task.strict_prompts=false"
            )
        logger.warning("%s. What does not fit is cut", text)
    return tuple(long)
