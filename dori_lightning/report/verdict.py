"""The answer of an audit or a sweep in words: a heading, plain words, and the same in numbers.

``report.findings`` decides what is said; ``templates/verdict.txt.j2`` says it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dori_lightning.metrics.utility import Utility
from dori_lightning.report.comparison import HeadlineRow
from dori_lightning.report.findings import (
    SIGNIFICANT,
    Tone,
    audit_findings,
    find_flags,
    recommended_budget,
    sweep_findings,
)
from dori_lightning.report.record import AttackEffort, AuditRecord, AuditReport, Provenance
from dori_lightning.report.words import text_macro
from dori_lightning.types import Calibration, Cell, Outcome

INVALID = "INVALID AUDIT"
"""How verdict, console and tables call an audit that answers nothing."""

_TEMPLATE = "verdict.txt.j2"


@dataclass(frozen=True)
class Verdict:
    """An answer in words.

    Attributes:
        tone: Its colour.
        answer: One sentence, fit for a heading.
        plain: One paragraph without a technical term.
        numbers: The same with counts and intervals.
    """

    tone: Tone
    answer: str
    plain: str
    numbers: str


def audit_verdict(report: AuditRecord) -> Verdict:
    """Say what an audit shows."""
    findings = audit_findings(report)
    answer, plain, numbers = (
        text_macro(_TEMPLATE, f"audit_{part}", report, findings)
        for part in ("answer", "plain", "numbers")
    )
    return Verdict("invalid" if report.invalid else findings.tone, answer, plain, numbers)


def sweep_verdict(rows: Sequence[HeadlineRow]) -> Verdict:
    """Say what a table of mitigations shows."""
    findings = sweep_findings(rows)
    answer, plain = (
        text_macro(_TEMPLATE, f"sweep_{part}", findings) for part in ("answer", "plain")
    )
    numbers = text_macro(_TEMPLATE, "sweep_numbers", findings, SIGNIFICANT)
    return Verdict(findings.tone, answer, plain, numbers)


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
    """Put an audit's measurements into one report, with the flags and the verdict they call for.

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
        skipped: Ids of the list's rows that have no image.
    """
    measured = AuditReport(
        checkpoint=checkpoint,
        mitigation=mitigation,
        verdict="",
        cells=tuple(cells),
        calibration=calibration,
        outcomes=tuple(outcomes),
        recommended_budget=None,
        flags=(),
        provenance=provenance,
        baseline=tuple(baseline),
        utility=utility,
        effort=effort,
    )
    headline = measured.headline_condition
    init = headline.init if headline is not None and headline.init is not None else "prompt"
    concluded = replace(
        measured,
        recommended_budget=recommended_budget(measured.own_cells, init=init),
        flags=find_flags(measured, inert=inert, skipped=skipped),
    )
    return replace(concluded, verdict=verdict_text(concluded))


def verdict_text(report: AuditRecord) -> str:
    """The paragraph that ``report.json`` keeps: plain words first, the same numbers after them.

    An invalid audit says so before anything else, and why.
    """
    verdict = audit_verdict(report)
    reasons = [flag.text for flag in report.flags if flag.severity == "invalid"]
    warning = [f"{INVALID}: what did not come back says nothing.", *reasons] if reasons else []
    return " ".join([*warning, verdict.plain, verdict.numbers]).strip()
