"""The rows of the page's table of pairs: the original beside what came back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from dori_lightning.metrics.first_success import first_successes, steps_by_pair
from dori_lightning.report.pictures import THUMBNAIL, jpeg_uri, thumbnail
from dori_lightning.report.summary import (
    KIND_WORDS,
    STATUS_WORDS,
    headline_condition,
    number_words,
    pair_results,
    prompt_condition,
)
from dori_lightning.types import KINDS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.record import AuditReport
    from dori_lightning.report.summary import Aggregation, PairResult
    from dori_lightning.types import Condition, Outcome, Pair

__all__ = ["Card", "Panel", "choose_pairs", "pair_cards", "panel_names", "picture_panel"]


@dataclass(frozen=True)
class Panel:
    """One picture of a pair's row.

    Attributes:
        name: ``before``, ``prompt`` or ``attack``.
        label: What the column is called.
        uri: ``data:`` address of the picture, None where none is shown.
        missing: Why there is no picture.
        alt: Alternative text.
        similarity: Similarity as text.
        sort: Number to sort by; -9 where there is none, so that it comes last.
        mark: What the similarity means, in words.
        tone: ``found``, ``clear`` or ``doubt``.
    """

    name: str
    label: str
    uri: str | None
    missing: str
    alt: str
    similarity: str
    sort: float
    mark: str
    tone: str


@dataclass(frozen=True)
class Card:
    """One pair with its pictures, and the word that the result filter looks for.

    Attributes:
        pair: The pair.
        kind: Its kind in words.
        original: ``data:`` address of the original, None where pictures are not shown.
        panels: Its pictures.
        outcome: ``prompt``, ``attack``, ``none`` or ``failed``.
    """

    pair: Pair
    kind: str
    original: str | None
    panels: tuple[Panel, ...]
    outcome: str


def choose_pairs(outcomes: Iterable[Outcome], *, max_pairs: int) -> tuple[list[Pair], int]:
    """Take the first pairs of each kind in turn, so that controls are seen beside suspects.

    Returns:
        The pairs to show, by kind and in list order, and how many there are in all.
    """
    pairs = list({outcome.pair.id: outcome.pair for outcome in outcomes}.values())
    queues = [[pair for pair in pairs if pair.kind == kind] for kind in KINDS]
    turns = [pair for turn in zip_longest(*queues) for pair in turn if pair is not None]
    chosen = {pair.id for pair in turns[:max_pairs]}
    return [pair for queue in queues for pair in queue if pair.id in chosen], len(pairs)


def panel_names(report: AuditReport) -> list[tuple[str, str]]:
    """Name the columns of pictures; a baseline adds the prompt's picture before the mitigation."""
    if not report.baseline:
        return [("prompt", "From its prompt"), ("attack", "From the attack")]
    return [
        ("before", "Prompt, before mitigation"),
        ("prompt", "Prompt, after mitigation"),
        ("attack", "Attack, after mitigation"),
    ]


def pair_cards(
    report: AuditReport, pairs: Sequence[Pair], *, disclosure: Disclosure
) -> list[Card]:
    """Build the rows of some pairs.

    Raises:
        InputError: A picture to be shown is gone or unreadable.
    """
    own = [cell for cell in report.cells if cell.mitigation == report.mitigation]
    wanted = {pair.id for pair in pairs}
    after = _results(report, report.outcomes, wanted)
    before = _results(report, report.baseline, wanted)
    prompts, attack = prompt_condition(own), headline_condition(own)
    cards = []
    first = _first_steps(report, attack)
    for pair in pairs:
        found: dict[str, PairResult | None] = {
            "before": next((r for r in before if r.pair.id == pair.id), None),
            "prompt": _pick(after, pair, prompts),
            "attack": _pick(after, pair, attack),
        }
        shown = thumbnail(pair.image, disclosure)
        panels = tuple(
            picture_panel(
                pair, name, label, found[name],
                disclosure=disclosure, aggregation=report.aggregation,
            )
            for name, label in panel_names(report)
        )  # fmt: skip
        if pair.id in first:
            words = f", first after {number_words(first[pair.id], 'step')}"
            panels = (*panels[:-1], replace(panels[-1], mark=panels[-1].mark + words))
        kind = KIND_WORDS[pair.kind]
        original = jpeg_uri(shown) if shown is not None else None
        cards.append(Card(pair, kind, original, panels, _outcome(found)))
    return cards


def _first_steps(report: AuditReport, attack: Condition | None) -> dict[str, int]:
    """Pair id to its first success on the way to the attack shown, where steps were looked at."""
    if attack is None:
        return {}
    looked_at = {
        own.budget.steps
        for own in (outcome.condition for outcome in report.outcomes)
        if replace(own, budget=replace(own.budget, steps=attack.budget.steps)) == attack
        and own.budget.steps <= attack.budget.steps
    }
    if len(looked_at) < 2:
        return {}
    firsts = first_successes(report.outcomes, report.calibration, report.aggregation)
    return steps_by_pair(attack, firsts)


def _results(
    report: AuditReport, outcomes: Iterable[Outcome], wanted: set[str]
) -> list[PairResult]:
    rule = report.calibration
    return pair_results(
        (outcome for outcome in outcomes if outcome.pair.id in wanted),
        descriptor=rule.descriptor,
        threshold=rule.threshold,
        aggregation=report.aggregation,
    )


def _pick(results: Iterable[PairResult], pair: Pair, condition: object) -> PairResult | None:
    return next((r for r in results if r.pair.id == pair.id and r.condition == condition), None)


def _outcome(found: dict[str, PairResult | None]) -> str:
    prompt, attack = found["prompt"], found["attack"]
    if prompt is not None and prompt.reproduced:
        return "prompt"
    if attack is not None and attack.reproduced:
        return "attack"
    # One failed run leaves the question open even where the other one found nothing.
    runs = [result for result in (prompt, attack) if result is not None]
    return "failed" if any(result.status != "ok" for result in runs) else "none"


def picture_panel(
    pair: Pair,
    name: str,
    label: str,
    result: PairResult | None,
    *,
    disclosure: Disclosure,
    aggregation: Aggregation = "max",
    side: int = THUMBNAIL,
) -> Panel:
    """Show what one condition made of a pair.

    Args:
        pair: The pair.
        name: Key of the column.
        label: Name of the column.
        result: What came of it, None where it was not run.
        disclosure: How pictures may be shown.
        aggregation: How a pair's pictures become one number.
        side: Pixels a side at most.

    Raises:
        InputError: The picture is gone or unreadable.
    """
    if result is None:
        return Panel(name, label, None, "not run", "", "", -9.0, "not run", "doubt")
    if result.reproduced is None:
        why = STATUS_WORDS[result.status]
        return Panel(name, label, None, why, "", "", -9.0, f"{why}: no result", "doubt")
    shown = None
    if result.picture is not None:
        shown = thumbnail(result.picture, disclosure, side=side)
    mark = "not reproduced"
    if result.reproduced:
        mark = "false alarm" if pair.kind == "control" else "reproduced"
    similarity = f"{result.best:.2f}"
    if aggregation == "median" and not math.isclose(result.best, result.statistic):
        similarity = f"best {result.best:.2f}, median {result.statistic:.2f}"
    blurred = " (blurred)" if disclosure == "blurred" else ""
    return Panel(
        name=name,
        label=label,
        uri=jpeg_uri(shown) if shown is not None else None,
        missing="not shown" if disclosure == "none" else "not kept",
        alt=f"{label}: closest picture of {pair.id}{blurred}, similarity {similarity}, {mark}",
        similarity=similarity,
        sort=result.statistic,
        mark=mark,
        tone="found" if result.reproduced else "clear",
    )
