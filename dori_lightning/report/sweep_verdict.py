"""What a table of mitigations says in plain language; every sentence follows from counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dori_lightning.report.belonging import BASELINE
from dori_lightning.report.summary import FALSE_POSITIVE_LIMIT, number_words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dori_lightning.report.headline import HeadlineRow

__all__ = ["sweep_answer", "sweep_sentences", "sweep_tone"]

_SIGNIFICANT = 0.05


def sweep_answer(rows: Sequence[HeadlineRow]) -> str:
    """Give the answer in one sentence, fit for a heading."""
    measured = [row for row in _mitigated(rows) if _attacked(row)]
    if not measured:
        if any(row.invalid for row in _mitigated(rows)):
            return "No mitigation has a valid audit."
        return "No mitigation was attacked."
    found = [row for row in measured if _found(row)]
    names = number_words(len(_names(measured)), "mitigation")
    if not found:
        return f"The attack finds no suspected image under {names}."
    return f"The attack still finds images under {len(_names(found))} of {names}."


def sweep_sentences(rows: Sequence[HeadlineRow]) -> list[str]:
    """Say what holds without a mitigation, what only hides, what removes, and what to doubt."""
    return [*_baselines(rows), *_mitigations(rows), *_doubts(rows)]


def sweep_tone(rows: Sequence[HeadlineRow]) -> str:
    """Choose the answer's colour; ``doubt`` where controls fail or no mitigation was attacked."""
    measured = [row for row in _mitigated(rows) if _attacked(row)]
    if not measured or any(_doubts(rows)):
        return "doubt"
    return "found" if any(_found(row) for row in measured) else "clear"


def _baselines(rows: Sequence[HeadlineRow]) -> Iterator[str]:
    seen: set[str] = set()
    for row in rows:
        if row.mitigation != BASELINE or row.checkpoint in seen or row.prompt_vm is None:
            continue
        seen.add(row.checkpoint)
        text = (
            f"Without a mitigation {row.checkpoint} reproduces {row.prompt_vm.hits} of "
            f"{number_words(row.prompt_vm.n, 'suspected image')} from their prompts"
        )
        attacked = row.main.vm if row.main is not None else None
        yield text + (f", {attacked.hits} of {attacked.n} by the attack." if attacked else ".")


def _mitigations(rows: Sequence[HeadlineRow]) -> Iterator[str]:
    own = [row for row in _mitigated(rows) if _attacked(row)]
    hiding = [
        row
        for row in own
        if row.main is not None
        and (test := row.main.against_prompt) is not None
        and test.gained > test.lost
        and test.p < _SIGNIFICANT
    ]
    if hiding:
        yield (
            f"Hidden from their prompts and found by the attack (paired test, p < "
            f"{_SIGNIFICANT}): {', '.join(_names(hiding))}."
        )
    clear = [row for row in own if not _found(row) and row.prompt_vm and not row.prompt_vm.hits]
    found_elsewhere = {(r.checkpoint, r.mitigation) for r in own if _found(r)}
    clear = [row for row in clear if (row.checkpoint, row.mitigation) not in found_elsewhere]
    if clear:
        yield f"Nothing came back, by prompt or attack: {', '.join(_names(clear))}."


def _doubts(rows: Sequence[HeadlineRow]) -> Iterator[str]:
    invalid = [row for row in rows if row.invalid]
    if invalid:
        yield f"Invalid, so without an answer: the audit of {', '.join(_names(invalid))}."
    painting = [
        row
        for row in rows
        for attack in row.attacks
        if attack.control is not None
        and attack.control.n
        and attack.control.mr >= FALSE_POSITIVE_LIMIT
    ]
    if painting:
        yield (
            f"The attack also reproduces controls under {', '.join(_names(painting))}: there it "
            f"may paint what the model does not hold, and proves nothing."
        )
    unchecked = [
        row
        for row in rows
        if row.attacks and not any(a.control is not None and a.control.n for a in row.attacks)
    ]
    if unchecked:
        yield f"No control was attacked under {', '.join(_names(unchecked))}."


def _mitigated(rows: Sequence[HeadlineRow]) -> list[HeadlineRow]:
    return [row for row in rows if row.mitigation != BASELINE]


def _attacked(row: HeadlineRow) -> bool:
    """Whether an attack says something of a row; an invalid audit's only does where it finds."""
    if row.invalid and not _found(row):
        return False
    return any(attack.vm is not None and attack.vm.n for attack in row.attacks)


def _found(row: HeadlineRow) -> bool:
    return any(attack.vm is not None and attack.vm.hits for attack in row.attacks)


def _names(rows: Sequence[HeadlineRow]) -> list[str]:
    """Each mitigation once, with its checkpoint where there are several."""
    several = len({row.checkpoint for row in rows}) > 1
    return list(
        dict.fromkeys(
            f"{row.mitigation} on {row.checkpoint}" if several else row.mitigation for row in rows
        )
    )
