"""The numbers that audits are compared and sorted by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dori_lightning.report.summary import find_cell, headline_condition
from dori_lightning.types import KINDS, Condition

if TYPE_CHECKING:
    from dori_lightning.mitigations.base import Found
    from dori_lightning.report.record import AuditReport

__all__ = ["final_numbers", "objective"]

_PROMPT = Condition("prompt")


def objective(report: AuditReport) -> float | None:
    """Memorization rate of vm pairs under the strongest condition measured.

    None without any, and where the audit is invalid: a sweeper would take what breaks the attack
    for the best mitigation.
    """
    if report.invalid:
        return None
    rates = (cell.mr for cell in report.cells if cell.kind == "vm" and cell.n)
    return max(rates, default=None)


def final_numbers(report: AuditReport, found: Found) -> dict[str, float | None]:
    """What runs are compared and sorted by; None where it was not measured.

    ``final/objective`` is what a sweeper minimises; ``mr`` are memorization rates, ``attack`` is
    the condition that the verdict speaks of, ``before`` the checkpoint without the mitigation.
    """
    own = [cell for cell in report.cells if cell.mitigation == report.mitigation]
    before = [cell for cell in report.cells if cell.mitigation == "none" and report.baseline]
    attack = headline_condition(own)
    numbers: dict[str, float | None] = {"final/objective": objective(report)}
    for what, cells, condition in (
        ("prompt", own, _PROMPT), ("attack", own, attack), ("before", before, _PROMPT),
    ):  # fmt: skip
        for kind in KINDS:
            cell = find_cell(cells, kind=kind, condition=condition)
            if cell is not None and cell.n:
                numbers[f"final/mr_{what}_{kind}"] = cell.mr
                numbers[f"final/similarity_{what}_{kind}"] = cell.similarity_median
    utility, budget, cost = report.utility, report.recommended_budget, found.edit.origin
    loss = utility.denoising_loss if utility else None
    kid = utility.ordinary.kid if utility and utility.ordinary else None
    return {
        **numbers,
        "final/attack_steps": attack.budget.steps if attack else None,
        "final/recommended_steps": budget.steps if budget else None,
        "final/invalid": float(bool(report.invalid)),
        "final/failed": sum(cell.failed for cell in own),
        "final/threshold": report.calibration.threshold,
        "final/auc": report.calibration.auc,
        "final/loss_ratio": loss.ratio if loss else None,
        "final/kid": kid.mean if kid else None,
        "final/edit_weights": sum(found.edit.counts().values()),
        "final/edit_unet_evaluations": cost.cost.get("unet_evaluations") if cost else None,
        "final/unet_evaluations": report.provenance.unet_evaluations,
        "final/seconds": report.provenance.wall_seconds,
    }
