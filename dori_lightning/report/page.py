"""One self-contained page for people: the verdict first, then the pictures, then the method."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori_lightning.files import write_atomically
from dori_lightning.redaction import redact
from dori_lightning.report.cards import choose_pairs, pair_cards, panel_names
from dori_lightning.report.number_rows import number_groups
from dori_lightning.report.pictures import THUMBNAIL
from dori_lightning.report.plain_words import plain_verdict
from dori_lightning.report.plots import page_plots
from dori_lightning.report.summary import (
    KIND_WORDS,
    attack_trust,
    condition_words,
    find_cell,
    headline_condition,
    interval_words,
    number_words,
    percent_words,
    prompt_condition,
)
from dori_lightning.report.templating import rendered_page
from dori_lightning.report.utility_section import utility_section
from dori_lightning.report.verdict import short_answer
from dori_lightning.types import KINDS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dori_lightning.report.locality.section import LocalitySection
    from dori_lightning.report.pictures import Disclosure
    from dori_lightning.report.record import AuditReport
    from dori_lightning.types import Cell, Condition, Kind

__all__ = ["render_page", "write_page"]


@dataclass(frozen=True)
class _Tile:
    """One key number; rate and interval in percent, None where there is no rate."""

    label: str
    value: str
    note: str
    rate: float | None = None
    low: float = 0.0
    high: float = 0.0


def render_page(
    report: AuditReport,
    *,
    images: Disclosure = "full",
    max_pairs: int = 40,
    locality: Sequence[LocalitySection] = (),
) -> str:
    """Render the page; it loads nothing from anywhere.

    Args:
        report: The report.
        images: ``full``; ``blurred`` throws the pixels away before embedding, since memorized
            pictures are the leaked data; ``none`` embeds no picture.
        max_pairs: Most pairs to show; they are the first of each kind, never chosen by result.
        locality: What locality runs found on the same checkpoint.

    Returns:
        HTML.

    Raises:
        InputError: A picture to be shown is gone or unreadable.
    """
    own = [cell for cell in report.cells if cell.mitigation == report.mitigation]
    prompts, attack = prompt_condition(own), headline_condition(own)
    shown, total = choose_pairs(report.outcomes, max_pairs=max_pairs)
    config = json.dumps(redact(report.provenance.config), indent=2, sort_keys=True, default=str)
    return rendered_page(
        "report.html.j2",
        report=report,
        images=images,
        side=THUMBNAIL,
        answer=short_answer(
            report.cells, mitigation=report.mitigation, invalid=bool(report.invalid)
        ),
        plain=plain_verdict(
            report.cells, mitigation=report.mitigation, invalid=bool(report.invalid)
        ),
        tone="invalid" if report.invalid else _tone(own, attack),
        tiles=_tiles(report, own, prompts, attack),
        pairs=pair_cards(report, shown, disclosure=images),
        panel_names=panel_names(report),
        total=total,
        kinds=[(kind, KIND_WORDS[kind]) for kind in KINDS if any(p.kind == kind for p in shown)],
        repeats=any(pair.repeats > 0 for pair in shown),
        numbers=number_groups(report),
        cost=utility_section(report.utility, disclosure=images) if report.utility else None,
        locality=locality,
        plots=page_plots(report),
        conditions=list(dict.fromkeys(condition_words(c.condition) for c in report.cells)),
        pictures_each=max((len(o.seeds) for o in report.outcomes), default=0),
        restarts=max((o.restart + 1 for o in report.outcomes), default=0),
        config=config,
    )


def write_page(
    report: AuditReport,
    folder: Path,
    *,
    images: Disclosure = "full",
    max_pairs: int = 40,
    locality: Sequence[LocalitySection] = (),
) -> Path:
    """Write ``report.html`` into the run folder in one step and return its path."""
    page = render_page(report, images=images, max_pairs=max_pairs, locality=locality)
    folder.mkdir(parents=True, exist_ok=True)
    return write_atomically(folder / "report.html", page.encode())


def _tone(own: Sequence[Cell], attack: Condition | None) -> str:
    """Choose the verdict's colour; ``doubt`` where the controls fail or are missing."""
    suspected = [cell for cell in own if cell.kind == "vm" and cell.n > 0]
    if not suspected or attack_trust(own, attack) in ("paints", "unchecked"):
        return "doubt"
    speaking = (prompt_condition(own), attack)
    return "found" if any(c.hits for c in suspected if c.condition in speaking) else "clear"


def _tiles(
    report: AuditReport,
    own: Sequence[Cell],
    prompts: Condition | None,
    attack: Condition | None,
) -> list[_Tile]:
    def tile(label: str, kind: Kind, condition: Condition | None, note: str) -> _Tile:
        cell = find_cell(own, kind=kind, condition=condition) if condition else None
        if cell is None or cell.n == 0:
            return _Tile(label, "not measured", note)
        low, high = cell.mr_ci95
        text = f"{percent_words(cell.mr)}, 95 % interval {interval_words(cell.mr_ci95)}"
        left_out = f"; {cell.failed} failed" if cell.failed else ""
        return _Tile(
            label, f"{cell.hits} of {cell.n}", f"{text}{left_out}. {note}",
            100 * cell.mr, 100 * low, 100 * high,
        )  # fmt: skip

    budget = report.recommended_budget
    words = condition_words(attack).removeprefix("attack ") if attack else "No attack was run"
    return [
        tile("Suspected images, from their prompts", "vm", prompts, "The prompts as they are."),
        tile("Suspected images, by the attack", "vm", attack, f"{_capital(words)}."),
        tile("Controls, same attack: false alarms", "control", attack, "Should be none."),
        _Tile(
            "Largest budget that leaves the controls alone",
            number_words(budget.steps, "step") if budget else "none",
            "Fewer than 5 % of the controls come back up to there."
            if budget
            else "No measured budget keeps the controls under 5 %, or none was attacked.",
        ),
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
