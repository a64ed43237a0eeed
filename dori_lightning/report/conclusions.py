"""Everything that follows from an audit's measurements, put into one report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dori_lightning.report.flags import find_flags
from dori_lightning.report.record import AuditReport
from dori_lightning.report.summary import FALSE_POSITIVE_LIMIT, headline_condition
from dori_lightning.report.verdict import verdict_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dori_lightning.metrics.utility import Utility
    from dori_lightning.report.effort import AttackEffort
    from dori_lightning.report.record import Provenance
    from dori_lightning.types import Budget, Calibration, Cell, Init, Outcome

__all__ = ["make_report", "recommended_budget"]


def make_report(
    *,
    checkpoint: str,
    mitigation: str,
    cells: Sequence[Cell],
    calibration: Calibration,
    outcomes: Sequence[Outcome],
    provenance: Provenance,
    baseline: Sequence[Outcome] = (),
    utility: Utility | None = None,
    effort: AttackEffort | None = None,
    inert: bool = False,
    skipped: Sequence[str] = (),
) -> AuditReport:
    """Draw the conclusions from measured cells and outcomes and put everything into one report.

    Args:
        checkpoint: Name of the checkpoint.
        mitigation: Name of the mitigation under audit.
        cells: Its cells, and those of mitigation ``none`` where the baseline was measured.
        calibration: How the threshold was set.
        outcomes: Every pair under every condition.
        provenance: Where the numbers come from.
        baseline: Outcomes of the prompts before the mitigation.
        utility: What the mitigation costs, where that was measured.
        effort: What the attack took.
        inert: Whether the mitigation's edit changes nothing in the model.
        skipped: Ids of the list's rows that have no picture.
    """
    flags = find_flags(
        cells, mitigation=mitigation, outcomes=outcomes, inert=inert, skipped=skipped
    )
    own = [cell for cell in cells if cell.mitigation == mitigation]
    headline = headline_condition(own)
    return AuditReport(
        checkpoint=checkpoint,
        mitigation=mitigation,
        verdict=verdict_text(cells, mitigation=mitigation, flags=flags),
        cells=tuple(cells),
        calibration=calibration,
        outcomes=tuple(outcomes),
        recommended_budget=recommended_budget(
            own, init=headline.init if headline and headline.init else "prompt"
        ),
        flags=flags,
        provenance=provenance,
        baseline=tuple(baseline),
        utility=utility,
        effort=effort,
    )


def recommended_budget(cells: Iterable[Cell], *, init: Init = "prompt") -> Budget | None:
    """Find the largest number of steps up to which the attack leaves the controls alone.

    Read along the unbounded attacks from one start: the rate of reproduced controls (its point
    estimate) must stay under 5 % at this budget and at every smaller one that was measured.

    Returns:
        The budget, or None where the smallest already fails or no control was attacked.
    """
    controls = sorted(
        (
            cell
            for cell in cells
            if cell.kind == "control"
            and cell.condition.attack == "dori"
            and cell.condition.init == init
            and cell.condition.budget.norm == "none"
            and cell.condition.budget.steps > 0
            and cell.n > 0
        ),
        key=lambda cell: cell.condition.budget.steps,
    )
    best = None
    for cell in controls:
        if not cell.mr < FALSE_POSITIVE_LIMIT:
            break
        best = cell.condition.budget
    return best
