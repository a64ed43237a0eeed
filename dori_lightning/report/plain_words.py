"""The verdict for a person who is not an engineer: what was tried, what came back, what it means.

Every sentence is derived from counts; the same rules hold as in ``verdict``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dori_lightning.report.belonging import BASELINE
from dori_lightning.report.summary import (
    attack_trust,
    find_cell,
    headline_condition,
    number_words,
    percent_words,
    prompt_condition,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dori_lightning.report.headline import HeadlineRow
    from dori_lightning.report.summary import Trust
    from dori_lightning.types import Cell, Condition

__all__ = ["plain_sweep", "plain_verdict"]


_INVALID = (
    "Something went wrong with this test, as said below: images that did not come back may be in "
    "the model all the same."
)


def plain_verdict(cells: Sequence[Cell], *, mitigation: str, invalid: bool = False) -> str:
    """Say in one paragraph, without a technical term, what an audit found.

    Args:
        cells: All cells, with those of ``none`` where the prompts were asked before the
            mitigation.
        mitigation: The mitigation under audit.
        invalid: Whether the audit is invalid.
    """
    own = [cell for cell in cells if cell.mitigation == mitigation]
    prompts, attack = prompt_condition(own), headline_condition(own)
    asked, searched = (_usable(own, condition) for condition in (prompts, attack))
    if asked is None and searched is None:
        return (
            "The list names no image that is suspected to be stored in the model and could be "
            "measured, so this run cannot say what is memorized."
        )
    known = asked or searched
    assert known is not None
    trust = attack_trust(own, attack)
    sentences = [
        f"The list names {number_words(known.n, 'image')} that this model may have memorized.",
        *_before(cells, mitigation, prompts),
        *_asked(asked, mitigated=mitigation != BASELINE),
        *_searched(searched, find_cell(own, kind="control", condition=attack), trust),
        _INVALID
        if invalid
        else _meaning(asked, searched, trust, mitigated=mitigation != BASELINE),
    ]
    return " ".join(sentences)


def plain_sweep(rows: Sequence[HeadlineRow]) -> str:
    """Say in one paragraph, without a technical term, which mitigations take images out."""
    widest = {(row.checkpoint, row.mitigation): row for row in rows}.values()
    base = next((row for row in widest if row.mitigation == BASELINE), None)
    tried = [
        row
        for row in widest
        if row.mitigation != BASELINE and _found(row) is not None and not row.invalid
    ]
    sentences = []
    if base is not None and base.prompt_vm is not None and base.prompt_vm.n:
        cell = base.prompt_vm
        sentences.append(
            f"As it is, the model draws {_count(cell)} of {number_words(cell.n, 'image')} that it "
            f"may have memorized when it is given their captions."
        )
    if not tried:
        return " ".join([*sentences, "No mitigation was searched for what it leaves behind."])
    holding = [row for row in tried if _found(row)]
    sentences.append(
        f"{_each(len(tried))} to take them out was checked twice: with the captions, and with a "
        f"search for any other input that brings an image back."
    )
    if holding:
        sentences.append(
            f"After {len(holding)} of {len(tried)} the search still finds images: what a caption "
            f"no longer shows is not yet gone."
        )
    empty = [row for row in tried if not _found(row) and row.prompt_vm and not row.prompt_vm.hits]
    if empty:
        names = ", ".join(row.mitigation for row in empty)
        price = _price(empty)
        sentences.append(
            f"Neither brought any image back after {names}{price}. That is what this search "
            f"found, no proof that nothing is left."
        )
    return " ".join(sentences)


def _each(count: int) -> str:
    return "One attempt" if count == 1 else f"Each of {count} attempts"


def _price(rows: Sequence[HeadlineRow]) -> str:
    if len(rows) != 1 or not math.isfinite(rows[0].price.loss_ratio):
        return ""
    change = 100 * (rows[0].price.loss_ratio - 1)
    verb = "raises" if change >= 0 else "lowers"
    return f", which {verb} the model's error on ordinary pictures by {abs(change):.1f} %"


def _found(row: HeadlineRow) -> int | None:
    cells = [a.vm for a in row.attacks if a.vm is not None and a.vm.n]
    return max(cell.hits for cell in cells) if cells else None


def _usable(own: Sequence[Cell], condition: Condition | None) -> Cell | None:
    cell = find_cell(own, kind="vm", condition=condition) if condition else None
    return cell if cell is not None and cell.n > 0 else None


def _count(cell: Cell) -> str:
    return "all" if cell.hits == cell.n > 1 else "none" if cell.hits == 0 else str(cell.hits)


def _before(cells: Sequence[Cell], mitigation: str, prompts: Condition | None) -> Iterator[str]:
    if mitigation == BASELINE:
        return
    cell = _usable([c for c in cells if c.mitigation == BASELINE], prompts)
    if cell is not None:
        yield (
            f"Before the mitigation their captions brought back {_count(cell)} of them as a copy."
        )


def _asked(asked: Cell | None, *, mitigated: bool) -> Iterator[str]:
    if asked is not None:
        now = "now " if mitigated else ""
        yield f"Given their captions, the model {now}draws {_count(asked)} of them as a copy."


def _searched(searched: Cell | None, control: Cell | None, trust: Trust) -> Iterator[str]:
    if searched is None:
        yield "Nobody searched for other inputs that bring them back."
        return
    yield (
        f"A search for any other input that brings an image back succeeds for {_count(searched)} "
        f"of them."
    )
    if trust == "unchecked" or control is None:
        yield "It was not tried on images that the model cannot hold, so it is unchecked."
        return
    unknown = number_words(control.n, "image")
    came = "none" if control.hits == 0 else str(control.hits)
    yield f"Tried on {unknown} that the model should not hold, it brings back {came}."


def _meaning(asked: Cell | None, searched: Cell | None, trust: Trust, *, mitigated: bool) -> str:
    if trust == "paints":
        return (
            "So the search can draw images by itself, and what it finds proves nothing here; only "
            "the answer to the captions counts."
        )
    counted = [c for c in (asked, None if trust == "unchecked" else searched) if c is not None]
    found = max((cell.hits for cell in counted), default=0)
    if found == 0:
        if not counted:
            return "So this run gives no reliable answer."
        upper = max(cell.mr_ci95[1] for cell in counted)
        return (
            f"That is no proof of absence: with so few images, up to {percent_words(upper)} of "
            f"such images could still be in there, and a stronger search may find more."
        )
    hidden = asked is not None and searched in counted and found > asked.hits
    if hidden and mitigated:
        return (
            "So the mitigation hides images from their captions and leaves them in the model: "
            "whoever has its weights can get copies out."
        )
    if hidden:
        return "So the model holds images that their captions do not show."
    return "So these images are stored in the model, and whoever has it can get copies out."
