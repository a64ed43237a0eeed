"""An audit's pictures and pairs as loggers show them: a grid for each start, and one table."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dori_lightning.report.pictures import thumbnail
from dori_lightning.report.summary import (
    aggregate,
    condition_words,
    headline_condition,
    pair_results,
)
from dori_lightning.tracking.mosaic import Tile, mosaic
from dori_lightning.types import Condition

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from typing import Any

    from PIL import Image

    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.record import AuditReport
    from dori_lightning.report.summary import PairResult
    from dori_lightning.types import Init, Outcome, Pair

__all__ = ["COLUMNS", "grid", "table_rows"]

COLUMNS = (
    "mitigation", "pair", "kind", "prompt", "repeats", "attack", "init", "steps", "restart",
    "status", "similarity", "reproduced", "diversity", "lpips", "alignment", "loss_first",
    "loss_last", "displacement", "embedding", "picture",
)  # fmt: skip

_SUSPECTED, _CONTROLS = 8, 4
"""Rows of a grid: more would not fit a screen."""
_SIDE = 128
_PROMPT = Condition("prompt")


def grid(report: AuditReport, init: Init, *, images: Disclosure) -> tuple[Image.Image | None, str]:
    """Originals beside what prompts and the attack from one start bring back, by pair.

    Args:
        report: What was found.
        init: Where the attack began.
        images: Whether pictures are shown, blurred or left out.

    Returns:
        The grid, None where there is nothing to show, and how to read it.
    """
    attack = max(
        (c.condition for c in report.cells if c.condition.init == init),
        key=lambda condition: condition.budget.steps,
        default=None,
    )
    if attack is None or images == "none":
        return None, ""
    now, before = _results(report, report.outcomes), _results(report, report.baseline)
    columns = [("from its prompt", now, _PROMPT), (f"attack from {init}", now, attack)]
    if before:
        columns.insert(0, ("before", before, _PROMPT))
    rows = [
        [
            Tile(thumbnail(pair.image, images, side=_SIDE), f"{pair.kind} {pair.id}"),
            *(_tile(held.get((pair.id, condition)), images) for _, held, condition in columns),
        ]
        for pair in _shown(report, attack)
    ]
    sheet = mosaic(rows, headings=["original", *(title for title, _, _ in columns)], side=_SIDE)
    return sheet, (
        f"{report.checkpoint}, mitigation {report.mitigation}; {condition_words(attack)}. Below a "
        f"picture: its similarity to the original; framed: above the threshold "
        f"{report.calibration.threshold:.2f}"
    )


def _results(
    report: AuditReport, outcomes: Iterable[Outcome]
) -> dict[tuple[str, Condition], PairResult]:
    found = pair_results(
        outcomes,
        descriptor=report.calibration.descriptor,
        threshold=report.calibration.threshold,
        aggregation=report.aggregation,
    )
    return {(result.pair.id, result.condition): result for result in found}


def _shown(report: AuditReport, attack: Condition) -> list[Pair]:
    """Pairs that were attacked, suspected ones first."""
    pairs = {o.pair.id: o.pair for o in report.outcomes if o.condition == attack}
    suspected = [pair for pair in pairs.values() if pair.kind != "control"]
    controls = [pair for pair in pairs.values() if pair.kind == "control"]
    return [*suspected[:_SUSPECTED], *controls[:_CONTROLS]]


def _tile(result: PairResult | None, images: Disclosure) -> Tile:
    if result is None:
        return Tile(None, "not run")
    if result.picture is None:
        return Tile(None, result.status)
    return Tile(
        thumbnail(result.picture, images, side=_SIDE),
        f"{result.best:.2f}",
        marked=bool(result.reproduced),
    )


def table_rows(
    report: AuditReport, folder: Path, *, images: Disclosure, max_pairs: int
) -> list[list[Any]]:
    """One row of ``COLUMNS`` for each pair, condition and restart.

    Args:
        report: What was found.
        folder: Run folder; files are named relative to it.
        images: Whether pictures are shown, blurred or left out.
        max_pairs: Pairs with pictures, from their prompts and the attack that the verdict names.
    """
    own = [cell for cell in report.cells if cell.mitigation == report.mitigation]
    drawn = {_PROMPT, headline_condition(own)}
    pictured = {*list(dict.fromkeys(o.pair.id for o in report.outcomes))[:max_pairs]}
    groups: Sequence[tuple[str, Sequence[Outcome]]] = (
        (report.mitigation, report.outcomes), ("none", report.baseline),
    )  # fmt: skip
    return [
        [
            *_row(report, mitigation, outcome, folder),
            _closest(report, outcome, images)
            if outcome.condition in drawn and outcome.pair.id in pictured
            else None,
        ]
        for mitigation, outcomes in groups
        for outcome in outcomes
    ]


def _row(report: AuditReport, mitigation: str, outcome: Outcome, folder: Path) -> list[Any]:
    pair, condition, rule = outcome.pair, outcome.condition, report.calibration
    similarity = aggregate(outcome.similarity[rule.descriptor], report.aggregation)
    embedding = (
        folder / "attacks" / f"{condition.init}" / f"{pair.id}.r{outcome.restart}.safetensors"
    )
    attacked = condition.attack == "dori"
    return [
        mitigation, pair.id, pair.kind, pair.prompt, float(pair.repeats), condition.attack,
        condition.init or "", condition.budget.steps, outcome.restart, outcome.status,
        similarity, bool(similarity > rule.threshold), outcome.diversity,
        _mean(outcome.lpips), _mean(outcome.alignment), _number(outcome.loss_first),
        _number(outcome.loss_last), _number(outcome.displacement),
        embedding.relative_to(folder).as_posix() if attacked else "",
    ]  # fmt: skip


def _closest(report: AuditReport, outcome: Outcome, images: Disclosure) -> Image.Image | None:
    """The picture of an outcome that is closest to the original."""
    values = [float(v) for v in outcome.similarity[report.calibration.descriptor]]
    if not outcome.images or all(math.isnan(value) for value in values):
        return None
    best = max(range(len(values)), key=lambda k: (not math.isnan(values[k]), values[k]))
    return thumbnail(outcome.images[best], images, side=_SIDE)


def _mean(values: Any) -> float:
    return math.nan if values is None else float(values.mean())


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
