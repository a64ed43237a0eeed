"""The pairs of a comparison: every original beside what each mitigation left of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dori_lightning.report.belonging import BASELINE
from dori_lightning.report.cards import choose_pairs, picture_panel
from dori_lightning.report.pictures import NOT_KEPT, jpeg_uri, thumbnail
from dori_lightning.report.read_back import with_files_that_exist
from dori_lightning.report.summary import (
    KIND_WORDS,
    headline_condition,
    pair_results,
    prompt_condition,
)
from dori_lightning.types import KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.report.aggregate import Comparison
    from dori_lightning.report.cards import Panel
    from dori_lightning.report.entries import Entry
    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.summary import Aggregation, PairResult
    from dori_lightning.types import Calibration, Condition, Outcome, Pair

__all__ = ["SIDE", "Stack", "SweepBlock", "SweepCard", "results_by_entry", "sweep_blocks"]

SIDE = 112
"""Pixels a side of a picture; there are many of them on the page."""

MOST_PICTURES = 700
"""Pictures on the page; fewer pairs are shown where there are many mitigations."""


@dataclass(frozen=True)
class Stack:
    """What one mitigation left of one pair.

    Attributes:
        key: Key of the column.
        label: Name of the mitigation.
        prompt: Closest picture from the prompt.
        attack: Closest picture from the attack.
        sort: Number to sort by, of the attack where it was run.
    """

    key: str
    label: str
    prompt: Panel
    attack: Panel
    sort: float


@dataclass(frozen=True)
class SweepCard:
    """One pair under every mitigation.

    Attributes:
        pair: The pair.
        kind: Its kind in words.
        original: ``data:`` address of the original, None where there is none to show.
        stacks: What each mitigation left of it.
        outcome: Keys of the mitigations under which it came back, or ``gone``.
    """

    pair: Pair
    kind: str
    original: str | None
    stacks: tuple[Stack, ...]
    outcome: str


@dataclass(frozen=True)
class SweepBlock:
    """The pairs of one checkpoint.

    Attributes:
        checkpoint: Its name.
        threshold: Similarity above which a picture counts as reproduced.
        columns: Key and label of each mitigation.
        cards: The pairs shown.
        total: How many there are.
        lost: Pictures that are no longer where the runs left them.
        repeats: Whether multiplicities are known.
    """

    checkpoint: str
    threshold: float
    columns: tuple[tuple[str, str], ...]
    cards: tuple[SweepCard, ...]
    total: int
    lost: int
    repeats: bool

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Kinds of pair that are shown, for the filter."""
        present = {card.pair.kind for card in self.cards}
        return [(kind, KIND_WORDS[kind]) for kind in KINDS if kind in present]

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        """What can be asked of the result, for the filter."""
        found = [(key, f"reproduced under {label}") for key, label in self.columns]
        return [*found, ("gone", "not reproduced under any mitigation")]


def sweep_blocks(
    comparison: Comparison, *, disclosure: Disclosure, max_pairs: int
) -> tuple[SweepBlock, ...]:
    """Put the pictures of every checkpoint's pairs together.

    Args:
        comparison: Audits that belong together.
        disclosure: How pictures may be shown.
        max_pairs: Most pairs to show for each checkpoint; they are the first of each kind.
    """
    return tuple(
        _block(
            checkpoint,
            [entry for entry in comparison.entries if entry.checkpoint == checkpoint],
            rule,
            disclosure=disclosure,
            max_pairs=min(max_pairs, max(1, MOST_PICTURES // (1 + 2 * len(comparison.entries)))),
        )
        for checkpoint, rule in comparison.calibrations.items()
    )


def results_by_entry(
    entry: Entry, outcomes: Sequence[Outcome], rule: Calibration
) -> tuple[list[PairResult], tuple[Condition | None, Condition | None]]:
    """Reduce outcomes of a row to one result per pair and condition.

    Returns:
        The results, and the conditions that are spoken of: prompts and attack.
    """
    results = pair_results(
        outcomes,
        descriptor=rule.descriptor,
        threshold=rule.threshold,
        aggregation=_aggregation(entry),
    )
    return results, (prompt_condition(entry.cells), headline_condition(entry.cells))


def _aggregation(entry: Entry) -> Aggregation:
    return entry.cells[0].aggregation if entry.cells else "max"


def _block(
    checkpoint: str,
    entries: Sequence[Entry],
    rule: Calibration,
    *,
    disclosure: Disclosure,
    max_pairs: int,
) -> SweepBlock:
    base = next(entry for entry in entries if entry.mitigation == BASELINE)
    shown, total = choose_pairs(base.outcomes, max_pairs=max_pairs)
    wanted = {pair.id for pair in shown}
    stacks: dict[str, list[Stack]] = {pair.id: [] for pair in shown}
    originals: dict[str, Pair] = {}
    lost = 0
    for place, entry in enumerate(entries):
        kept = with_files_that_exist(o for o in entry.outcomes if o.pair.id in wanted)
        lost += sum(not outcome.images for outcome in kept if outcome.status == "ok")
        originals |= {o.pair.id: o.pair for o in kept if o.pair.image != NOT_KEPT}
        results, spoken = results_by_entry(entry, kept, rule)
        found = {(result.pair.id, result.condition): result for result in results}
        for pair in shown:
            own = tuple(found.get((pair.id, condition)) for condition in spoken if condition)
            stacks[pair.id].append(_stack(pair, f"m{place}", entry, own, disclosure))
    lost += len(wanted - originals.keys())
    return SweepBlock(
        checkpoint=checkpoint,
        threshold=rule.threshold,
        columns=tuple((f"m{place}", entry.label) for place, entry in enumerate(entries)),
        cards=tuple(
            _card(
                originals.get(pair.id) or replace(pair, image=NOT_KEPT),
                stacks[pair.id],
                disclosure,
            )
            for pair in shown
        ),
        total=total,
        lost=lost if disclosure != "none" else 0,
        repeats=any(pair.repeats > 0 for pair in shown),
    )


def _stack(
    pair: Pair,
    key: str,
    entry: Entry,
    results: Sequence[PairResult | None],
    disclosure: Disclosure,
) -> Stack:
    panels = {}
    for name, label in (("prompt", "from its prompt"), ("attack", "by the attack")):
        panels[name] = picture_panel(
            pair,
            name,
            f"{entry.label}, {label}",
            next((r for r in results if r and _name(r) == name), None),
            disclosure=disclosure,
            aggregation=_aggregation(entry),
            side=SIDE,
        )
    prompt, attack = panels["prompt"], panels["attack"]
    sort = attack.sort if attack.missing != "not run" else prompt.sort
    return Stack(key, entry.label, prompt, attack, sort)


def _name(result: PairResult) -> str:
    return "prompt" if result.condition.attack == "prompt" else "attack"


def _card(pair: Pair, stacks: Sequence[Stack], disclosure: Disclosure) -> SweepCard:
    shown = thumbnail(pair.image, disclosure, side=SIDE)
    back = [s for s in stacks if "found" in (s.prompt.tone, s.attack.tone)]
    gone = not any(stack.label != BASELINE for stack in back)
    return SweepCard(
        pair=pair,
        kind=KIND_WORDS[pair.kind],
        original=jpeg_uri(shown) if shown is not None else None,
        stacks=tuple(stacks),
        outcome=" ".join([*(stack.key for stack in back), *(["gone"] if gone else [])]),
    )
