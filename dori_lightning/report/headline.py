"""One row per mitigation: what it hides from prompts, what the attack still finds, and the price.

Reference: the main table of Finding DoRI (ICML 2026), https://arxiv.org/abs/2507.16880
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dori_lightning.report.belonging import BASELINE
from dori_lightning.report.comparisons import Paired, holm, paired
from dori_lightning.report.published import Published, published_for
from dori_lightning.report.summary import find_cell
from dori_lightning.types import INITS, Condition

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from dori_lightning.report.aggregate import Comparison
    from dori_lightning.report.entries import Entry
    from dori_lightning.types import Cell, Init, Kind, Norm

__all__ = ["Attacked", "HeadlineRow", "Price", "headline_rows"]

_PROMPT = Condition("prompt")


@dataclass(frozen=True)
class Attacked:
    """A row under the attack from one initial point.

    Attributes:
        init: Initial point.
        vm: Cell of the suspected images.
        tm: Cell of the template copies.
        control: Cell of the controls.
        against_none: Suspected images, compared with the same attack without mitigation.
        against_none_holm: Its p-value corrected for the rows of the checkpoint; NaN without one.
        against_prompt: Suspected images, compared with the row's own prompts.
    """

    init: Init
    vm: Cell | None
    tm: Cell | None
    control: Cell | None
    against_none: Paired | None = None
    against_none_holm: float = math.nan
    against_prompt: Paired | None = None


@dataclass(frozen=True)
class Price:
    """What a mitigation costs; NaN where it was not measured.

    Attributes:
        loss_ratio: Denoising loss on ordinary prompts, relative to the unmitigated model.
        loss_ratio_ci95: Its interval.
        kid: Kernel distance of its pictures to the unmitigated model's.
        kid_std: Its spread over subsets.
        unet_evaluations: UNet evaluations that finding the edit took.
        seconds: Seconds that finding the edit took.
        changed: Weights that the edit changes; for edits by pair, on average.
    """

    loss_ratio: float = math.nan
    loss_ratio_ci95: tuple[float, float] = (math.nan, math.nan)
    kid: float = math.nan
    kid_std: float = math.nan
    unet_evaluations: float = math.nan
    seconds: float = math.nan
    changed: float = math.nan


@dataclass(frozen=True)
class HeadlineRow:
    """One checkpoint under one mitigation, attacked within one ball.

    Attributes:
        checkpoint: Name of the checkpoint.
        mitigation: Label of the mitigation.
        norm: Norm of the attack's ball.
        eps: Its radius, None for no limit.
        steps: Most attack steps that were measured; 0 where no attack was run.
        prompt_vm: Suspected images, from their prompts.
        prompt_tm: Template copies, from their prompts.
        prompt_control: Controls, from their prompts.
        attacks: The row under the attack, by initial point.
        price: What the mitigation costs.
        published: What the paper gives for the row.
        against_none: Suspected images from their prompts, compared with no mitigation.
        against_none_holm: Its p-value corrected for the rows of the checkpoint; NaN without one.
        invalid: Names of what makes its audits invalid; empty where they are valid.
    """

    checkpoint: str
    mitigation: str
    norm: Norm
    eps: float | None
    steps: int
    prompt_vm: Cell | None
    prompt_tm: Cell | None
    prompt_control: Cell | None
    attacks: tuple[Attacked, ...]
    price: Price
    published: Published | None
    against_none: Paired | None = None
    against_none_holm: float = math.nan
    invalid: tuple[str, ...] = ()

    @property
    def main(self) -> Attacked | None:
        """The attack from the first initial point, the prompt's where it was run."""
        return self.attacks[0] if self.attacks else None


def headline_rows(comparison: Comparison) -> tuple[HeadlineRow, ...]:
    """Draw up the table.

    Args:
        comparison: Audits that belong together.
    """
    rows: list[HeadlineRow] = []
    for checkpoint in comparison.calibrations:
        own = [entry for entry in comparison.entries if entry.checkpoint == checkpoint]
        base = next(entry for entry in own if entry.mitigation == BASELINE)
        rows += _corrected([row for entry in own for row in _rows(entry, base)])
    return tuple(rows)


def _rows(entry: Entry, base: Entry) -> Iterator[HeadlineRow]:
    budgets = {c.condition.budget for c in entry.cells if c.condition.attack == "dori"}
    balls = sorted({(b.norm, b.eps) for b in budgets}, key=_by_width)
    for norm, eps in balls or [("none", None)]:
        steps = max((b.steps for b in budgets if (b.norm, b.eps) == (norm, eps)), default=0)
        conditions = {
            init: condition
            for init in INITS
            for condition in (c.condition for c in entry.cells)
            if condition.init == init
            and (condition.budget.norm, condition.budget.eps) == (norm, eps)
            and condition.budget.steps == steps
        }
        yield HeadlineRow(
            checkpoint=entry.checkpoint,
            mitigation=entry.label,
            norm=norm,
            eps=eps,
            steps=steps,
            prompt_vm=_cell(entry, "vm", _PROMPT),
            prompt_tm=_cell(entry, "tm", _PROMPT),
            prompt_control=_cell(entry, "control", _PROMPT),
            attacks=tuple(_attacked(entry, base, i, c) for i, c in conditions.items()),
            price=_price(entry),
            published=_published(entry) if norm == "none" else None,  # the paper has no ball
            against_none=_against(base, entry, _PROMPT, _PROMPT) if entry is not base else None,
            invalid=tuple(flag["name"] for flag in entry.invalid),
        )


def _published(entry: Entry) -> Published | None:
    """What the paper gives for a preset; nothing where its settings were changed."""
    if entry.label != entry.mitigation:
        return None
    return published_for(entry.mitigation, checkpoint=entry.checkpoint)


def _by_width(ball: tuple[Norm, float | None]) -> tuple[bool, str, float]:
    norm, eps = ball
    return norm == "none", norm, eps or 0.0


def _cell(entry: Entry, kind: Kind, condition: Condition) -> Cell | None:
    cell = find_cell(entry.cells, kind=kind, condition=condition)
    return cell if cell is not None and cell.n + cell.failed > 0 else None


def _attacked(entry: Entry, base: Entry, init: Init, condition: Condition) -> Attacked:
    return Attacked(
        init=init,
        vm=_cell(entry, "vm", condition),
        tm=_cell(entry, "tm", condition),
        control=_cell(entry, "control", condition),
        against_none=_against(base, entry, condition, condition) if entry is not base else None,
        against_prompt=_against(entry, entry, _PROMPT, condition),
    )


def _against(first: Entry, second: Entry, before: Condition, after: Condition) -> Paired | None:
    held, other = first.reproduced.get((before, "vm")), second.reproduced.get((after, "vm"))
    return paired(held, other) if held is not None and other is not None else None


def _corrected(rows: Sequence[HeadlineRow]) -> list[HeadlineRow]:
    """Correct the comparisons with no mitigation, one family per condition."""
    families: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        # the prompts of a mitigation are asked once, however many balls it is attacked in
        if row.against_none is not None:
            families.setdefault(("prompt",), {})[row.mitigation] = row.against_none.p
        for attack in row.attacks:
            if attack.against_none is not None:
                family = (row.norm, row.eps, attack.init)
                families.setdefault(family, {})[row.mitigation] = attack.against_none.p
    corrected = {
        family: dict(zip(held, holm(list(held.values())), strict=True))
        for family, held in families.items()
    }

    def look_up(row: HeadlineRow, *family: Any) -> float:
        return corrected.get(family, {}).get(row.mitigation, math.nan)

    return [
        replace(
            row,
            against_none_holm=look_up(row, "prompt"),
            attacks=tuple(
                replace(a, against_none_holm=look_up(row, row.norm, row.eps, a.init))
                for a in row.attacks
            ),
        )
        for row in rows
    ]


def _price(entry: Entry) -> Price:
    loss, kid = (_mapping(entry.utility, name) for name in ("denoising_loss", "kid"))
    cost, counts = (_mapping(entry.edit, name) for name in ("cost", "counts"))
    low, high = loss.get("ratio_ci95") or (None, None)
    return Price(
        loss_ratio=_number(loss.get("ratio")),
        loss_ratio_ci95=(_number(low), _number(high)),
        kid=_number(kid.get("mean")),
        kid_std=_number(kid.get("std")),
        unet_evaluations=_number(cost.get("unet_evaluations")),
        seconds=_number(cost.get("seconds")),
        changed=float(sum(counts.values())) if counts else math.nan,
    )


def _mapping(held: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = held.get(name)
    return found if isinstance(found, Mapping) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
