"""What an audit or a sweep shows, decided from counts: the answer and its limits.

Numbers and enums only; the words are in the templates ``verdict.txt.j2`` and ``flags.txt.j2``. The
rule that matters most: an attack that also "reproduces" images which the model does not hold
proves nothing, whatever it does on the suspected ones.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

from dori_lightning.attacks.model_check import RESPONSE
from dori_lightning.metrics.evidence import BaseEvidence
from dori_lightning.metrics.replication import (
    FALSE_POSITIVE_LIMIT,
    Trust,
    attack_trust,
    find_cell,
    is_copy,
    recommended_budget,
    search_of,
)
from dori_lightning.report.comparison import HeadlineRow
from dori_lightning.report.record import AuditRecord, AuditReport, Flag, Severity
from dori_lightning.report.words import text_macro
from dori_lightning.types import BASELINE, INITS, Cell, Condition, Kind

BASELINE_LIMIT = 0.5
"""Below this rate from the unmitigated prompts, the list is not what the model memorized."""

FEW_PAIRS = 10
"""Fewer suspected images than this earn a remark on the interval's width."""

WEAK_CONTROLS = 0.2
"""Where the false-positive rate may be above this, the controls are too few to lean on."""

SIGNIFICANT = 0.05
"""A mitigation counts as hiding images where the paired test's p-value is below this."""

DAMAGED = 0.5
"""Denoising error, times a linear filter's, from which a model is damaged: ``dori_tiny`` has 0.24,
and with time embeddings thirty times too large 0.72. It still holds its images then, nothing
brings them back, and images planted into it are found, since planting mends the model."""

RAISED = 2.0
"""A mitigation that makes the denoising error this many times larger damages the model."""

MASKED = 100.0
"""Gradients this many times smaller or larger than without the mitigation lead nowhere."""

STANDS_STILL = 0.95
"""A search whose loss ends at this share of its beginning or more, for most images, has not
moved; on models as trained it ends at about 0.7."""

_ENOUGH_SEARCHES = 8
"""Fewer searches say nothing of how the loss falls: its noise from step to step is large."""

_FALL_STEPS = 8
"""A search that was stopped after fewer steps had no room to lower its loss."""

UNLIKE = 2.0
"""Listed controls with this many times less or more detail than suspects say little of them."""

_NAMED = 10
"""Ids that a sentence lists before it only counts."""

Answer = Literal[
    "unmeasured", "unreliable", "clear", "blind", "dormant", "templates", "hidden", "found"
]
Tone = Literal["found", "clear", "doubt", "invalid"]


@dataclass(frozen=True)
class AuditFindings:
    """What an audit shows. Cells are None where nothing was run.

    Every condition that was run counts: the strongest sound attack decides, and where images come
    back by an attack alone that is not sound, nothing is answered.

    Attributes:
        answer: ``hidden`` where a sound attack brings back more suspected images than prompts do,
            ``found`` where images come back otherwise, ``templates`` where only template
            copies do, ``clear`` where nothing does, ``unreliable`` where something comes back only
            by an attack whose controls fail or are missing, or nothing else was run,
            ``unmeasured`` without a result on suspected images. Where nothing comes back:
            ``dormant`` if the model is shown to hold images all the same, ``blind`` if the attack
            could not have found them: it missed planted images, the model is damaged, or the
            search led nowhere. What each image's own evidence says goes before all that.
        images: Suspected images by the answer to their own evidence; empty in old records.
        origins: Suspected images by where they are from; empty without a base.
        best: The reliable cell with the most hits, of suspected images or, for ``templates``, of
            template copies; None without one.
        upper: Highest rate that the intervals of the reliable cells of suspected images leave
            open.
        trust: What the controls say of the attack that the answer speaks of.
        condition: That attack: the strongest sound one, or the one that makes the answer
            ``unreliable``.
        prompt: Suspected images, from their prompts.
        attack: The same, by that attack.
        other_starts: The same, by attacks of that budget from other initial points.
        before: The same, from their prompts without the mitigation.
        control_prompt: Controls, from their prompts.
        control_attack: Controls, by that attack.
        template_prompt: Template copies, from their prompts.
        template_attack: Template copies, by that attack.
    """

    answer: Answer
    images: Mapping[str, int]
    origins: Mapping[str, int]
    best: Cell | None
    upper: float
    trust: Trust
    condition: Condition | None
    prompt: Cell | None
    attack: Cell | None
    other_starts: tuple[Cell, ...]
    before: Cell | None
    control_prompt: Cell | None
    control_attack: Cell | None
    template_prompt: Cell | None
    template_attack: Cell | None

    @property
    def tone(self) -> Tone:
        """Colour of the answer; ``doubt`` where the controls fail or are missing."""
        if self.answer in ("unmeasured", "unreliable", "blind"):
            return "doubt"
        if not self.images["yes"] and self.trust in ("paints", "unchecked"):
            return "doubt"
        return "clear" if self.answer == "clear" else "found"


def audit_findings(report: AuditRecord) -> AuditFindings:
    """Decide what an audit shows."""
    own = report.own_cells

    def cell(kind: Kind, condition: Condition | None) -> Cell | None:
        return find_cell(own, kind=kind, condition=condition)

    measured = [c for c in own if c.n > 0 and c.kind != "control"]
    reliable = [
        c
        for c in measured
        if c.condition.attack == "prompt" or attack_trust(own, c.condition) == "sound"
    ]
    # of equal ones the first counts: the attack's that the report speaks of, then the prompts'
    places = (report.headline_condition, report.prompt_condition)
    reliable.sort(key=lambda c: places.index(c.condition) if c.condition in places else 2)
    suspected = [c for c in reliable if c.kind == "vm"]
    best = max(suspected, key=lambda c: c.hits, default=None)
    copied = max((c for c in reliable if c.kind == "tm"), key=lambda c: c.hits, default=None)
    doubted = max((c for c in measured if c not in reliable), key=lambda c: c.hits, default=None)
    prompt, condition = cell("vm", report.prompt_condition), report.headline_condition
    answer: Answer
    if best is not None and best.hits:
        shown = prompt is not None and prompt.n > 0 and best.hits > prompt.hits
        answer = "hidden" if shown else "found"
    elif copied is not None and copied.hits:
        answer, best = "templates", copied
    elif doubted is not None and (doubted.hits or best is None):
        answer, condition = "unreliable", doubted.condition
    else:
        answer = "unmeasured" if best is None else "clear"
    images = Counter[str](row.answer for row in report.images)
    yes = Counter(row.kind for row in report.images if row.answer == "yes")
    if answer in ("found", "hidden", "templates") and report.images and not yes:
        answer = "unreliable"
    elif answer == "unreliable" and yes:
        # one image that the attack paints makes the others' evidence no worse
        prompted = prompt.hits if prompt is not None else 0
        answer = "templates" if not yes["vm"] else "hidden" if yes["vm"] > prompted else "found"
        best = cell("vm" if yes["vm"] else "tm", condition) or best
    elif answer == "clear" and images["dormant"]:
        answer = "dormant"
    elif answer == "clear" and could_not_see(report):
        answer = "blind"
    unmitigated = [c for c in report.cells if (c.mitigation, c.kind) == (BASELINE, "vm")]
    return AuditFindings(
        answer=answer,
        images=images,
        origins=Counter[str](report.origins.values()),
        best=best,
        upper=max((c.mr_ci95[1] for c in suspected), default=math.nan),
        trust=attack_trust(own, condition),
        condition=condition,
        prompt=prompt,
        attack=cell("vm", condition),
        other_starts=tuple(
            c
            for init in INITS
            for c in own
            if condition is not None
            and c.kind == "vm"
            and c.n > 0
            and c.condition.attack == "dori"
            and c.condition.init == init != condition.init
            and c.condition.budget == condition.budget
        ),
        before=next((c for c in unmitigated if c.condition.attack == "prompt"), None),
        control_prompt=cell("control", report.prompt_condition),
        control_attack=cell("control", condition),
        template_prompt=cell("tm", report.prompt_condition),
        template_attack=cell("tm", condition),
    )


_SEARCH_DOUBTS = frozenset({"model_damaged", "gradient_masked", "loss_stands_still"})
"""Flags that say why no search could have found an image."""


def could_not_see(report: AuditRecord) -> bool:
    """Whether an image that is still in the model need not have come back.

    The attack did not find enough of the images that were planted for it, the model is damaged,
    the search led nowhere, or its units had to be changed and no planted image says that they fit.
    """
    flags = {flag.name for flag in report.flags}
    if report.power is not None and not report.power.suffices:
        return True
    return bool(flags & _SEARCH_DOUBTS) or ("search_rescaled" in flags and report.power is None)


@dataclass(frozen=True)
class Circumstances:
    """What an audit's flags are found by besides its measurements.

    Attributes:
        inert: Whether the mitigation's edit changes nothing in the model.
        skipped: Ids of the list's rows that have no image.
        resolutions: Pixels a side of the model's images and of the reference's; empty without one.
        detail: How detailed the listed controls are, times the suspects; NaN without either.
        learned: Alterations whose copies the model seems to have been trained on.
    """

    inert: bool = False
    skipped: Sequence[str] = ()
    resolutions: Sequence[int] = ()
    detail: float = math.nan
    learned: Sequence[str] = ()


def find_flags(report: AuditReport, circumstances: Circumstances) -> tuple[Flag, ...]:
    """List what limits the meaning of an audit's numbers, gravest first.

    Args:
        report: The audit; its flags are not looked at.
        circumstances: How it was made.
    """
    detail, learned = circumstances.detail, circumstances.learned
    resolutions = circumstances.resolutions
    doubts = tuple(_search_flags(report))
    findings = audit_findings(replace(report, flags=doubts))
    flags = [
        *doubts,
        *_input_flags(report.mitigation, circumstances),
        *_failed_flags(report),
        *_control_flags(report, findings),
        *_baseline_flags(findings.before, as_it_is=report.mitigation == BASELINE),
        *_pair_flags(report, findings),
    ]
    if not (math.isnan(detail) or 1 / UNLIKE < detail < UNLIKE):
        flags.append(_flag("controls_unlike", "warning", detail=detail))
    if learned:
        flags.append(_flag("alterations_learned", "warning", names=learned))
    if len(set(resolutions)) > 1:
        flags.append(_flag("reference_resolution", "info", sides=resolutions))
    order = {"invalid": 0, "critical": 1, "warning": 2, "info": 3}
    return tuple(sorted(flags, key=lambda flag: order[flag.severity]))


def _flag(name: str, severity: Severity, **values: Any) -> Flag:
    return Flag(name, severity, text_macro("flags.txt.j2", name, **values))


def _input_flags(mitigation: str, circumstances: Circumstances) -> Iterator[Flag]:
    skipped = circumstances.skipped
    if circumstances.inert:
        yield _flag("edit_changes_nothing", "invalid", mitigation=mitigation)
    if skipped:
        yield _flag("pairs_skipped", "warning", ids=skipped, named=_NAMED)


def _failed_flags(report: AuditReport) -> Iterator[Flag]:
    """Attacks without a result; one suspected image is enough, for it may be one that stayed."""
    headline = report.headline_condition
    shown = [  # cells that the verdict speaks of: prompts, and attacks of the headline's budget
        cell
        for cell in report.own_cells
        if cell.condition.attack == "prompt"
        or (headline is not None and cell.condition.budget == headline.budget)
    ]
    suspected = sum(cell.failed for cell in shown if cell.kind != "control")
    controls = sum(cell.failed for cell in shown if cell.kind == "control")
    conditions = {cell.condition for cell in shown}
    statuses: dict[tuple[str, Condition], set[str]] = {}
    for outcome in report.outcomes:
        if outcome.condition in conditions and outcome.pair.kind != "control":
            key = (outcome.pair.id, outcome.condition)
            statuses.setdefault(key, set()).add(outcome.status)
    deaf = sum("ok" not in found and "no_gradient" in found for found in statuses.values())
    if deaf:
        yield _flag("no_gradient", "invalid", runs=deaf)
    if suspected > deaf:
        yield _flag("diverged", "invalid", runs=suspected - deaf)
    if controls:
        yield _flag("controls_failed", "warning", runs=controls)


def _search_flags(report: AuditReport) -> Iterator[Flag]:
    """What keeps a search from finding what the model holds."""
    check, before = report.check, report.check_before
    if check is None:
        return
    raised = check.denoising / before.denoising if before is not None else 1.0
    # NaN, of a model that overflows, is damage too
    if not (check.denoising < DAMAGED and raised < RAISED):
        yield _flag("model_damaged", "critical", check=check, before=before)
    if before is not None and before.gradient > 0 and check.gradient > 0:
        factor = check.gradient / before.gradient
        if not 1 / MASKED < factor < MASKED:
            yield _flag("gradient_masked", "critical", factor=factor)
    headline = report.headline_condition
    falls = [
        outcome.loss_last / outcome.loss_first
        for outcome in report.outcomes
        if headline is not None
        and outcome.condition.budget == headline.budget
        and outcome.loss_first
        and outcome.loss_last is not None
        and (outcome.stopped_at is None or outcome.stopped_at >= _FALL_STEPS)
    ]
    if len(falls) >= _ENOUGH_SEARCHES and not (share := median(falls)) < STANDS_STILL:
        yield _flag("loss_stands_still", "critical", share=share)
    if check.scale != 1 and report.provenance.config.get("attack", {}).get("own_units", True):
        yield _flag("search_rescaled", "info", check=check, usual=RESPONSE)


def _control_flags(report: AuditReport, findings: AuditFindings) -> Iterator[Flag]:
    if not any(cell.kind == "control" and cell.n > 0 for cell in report.own_cells):
        yield _flag("no_controls", "critical")
        return
    prompted, attacked = findings.control_prompt, findings.control_attack
    if prompted is not None and prompted.n > 0 and not prompted.mr < FALSE_POSITIVE_LIMIT:
        yield _flag("control_prompts_replicate", "critical", cell=prompted)
    if findings.trust == "unchecked":
        yield _flag("controls_not_attacked", "critical")
    elif findings.trust == "paints" and attacked is not None:
        yield _flag("controls_replicate", "critical", cell=attacked)
    elif attacked is not None and attacked.mr_ci95[1] >= FALSE_POSITIVE_LIMIT:
        weak = attacked.mr_ci95[1] >= WEAK_CONTROLS
        yield _flag("few_controls", "warning" if weak else "info", cell=attacked)


def _baseline_flags(before: Cell | None, *, as_it_is: bool) -> Iterator[Flag]:
    if before is not None and before.n > 0 and before.mr < BASELINE_LIMIT:
        # of a checkpoint as it is that is the answer; of a mitigation it is no test
        yield _flag("baseline_not_memorized", "warning" if as_it_is else "invalid", cell=before)
    elif before is None and not as_it_is:
        yield _flag("no_baseline", "info")


def _pair_flags(report: AuditReport, findings: AuditFindings) -> Iterator[Flag]:
    suspected = findings.prompt if report.prompt_condition else findings.attack
    if suspected is not None and 0 < suspected.n < FEW_PAIRS:
        yield _flag("few_pairs", "info", cell=suspected)
    pairs = {outcome.pair.id: outcome.pair for outcome in report.outcomes}.values()
    if cut := sum(pair.truncated for pair in pairs):
        by = Counter(name for pair in pairs for name in pair.cut_by)
        yield _flag("truncated_prompts", "warning", prompts=cut, by=by)
    if any(cell.counted == "up_to_budget" for cell in report.own_cells):
        yield _flag("stopped_early", "info")
    level = report.provenance.config.get("attack", {}).get("futility")
    if level is not None:
        searches = {
            search: outcome for outcome in report.outcomes if (search := search_of(outcome))
        }
        skipped = {
            control: [
                outcome.stopped_at == 0 and not is_copy(outcome, report.calibration)
                for outcome in searches.values()
                if (outcome.pair.kind == "control") == control
            ]
            for control in (False, True)
        }
        yield _flag("search_sequential", "info", level=level, skipped=skipped)
    for reason in ("not_auditable", "painted", "copy_few_nulls"):
        if ids := [row.id for row in report.images if row.reason == reason]:
            severity: Severity = "info" if reason == "copy_few_nulls" else "warning"
            yield _flag(reason, severity, ids=ids, named=_NAMED)
    if copies := sum(pair.duplicate_of is not None for pair in pairs):
        yield _flag("duplicates", "warning", pairs=copies)


@dataclass(frozen=True)
class SweepFindings:
    """What a table of mitigations shows; mitigations by label, with the checkpoint if several.

    Attributes:
        baselines: The row without mitigation of each checkpoint.
        tried: Mitigations with a result under attack; an invalid audit has one only where it
            finds images.
        holding: Those under which the attack still finds suspected images.
        hiding: Those under which it finds more than the prompts do, by the paired test.
        clear: Those under which neither prompts nor attack bring anything back.
        loss_ratio: Denoising loss under the only one of ``clear``; NaN otherwise.
        invalid: Rows whose audit is invalid.
        painting: Rows under which the attack also reproduces controls.
        unchecked: Rows in which no control was attacked.
        valid: Whether some mitigation's audit is valid.
    """

    baselines: tuple[HeadlineRow, ...]
    tried: tuple[str, ...]
    holding: tuple[str, ...]
    hiding: tuple[str, ...]
    clear: tuple[str, ...]
    loss_ratio: float
    invalid: tuple[str, ...]
    painting: tuple[str, ...]
    unchecked: tuple[str, ...]
    valid: bool

    @property
    def tone(self) -> Tone:
        """Colour of the answer; ``doubt`` where controls fail or no mitigation was attacked."""
        if not self.tried or self.invalid or self.painting or self.unchecked:
            return "doubt"
        return "found" if self.holding else "clear"


def sweep_findings(rows: Sequence[HeadlineRow]) -> SweepFindings:
    """Decide what a table of mitigations shows."""
    several = len({row.checkpoint for row in rows}) > 1

    def label(row: HeadlineRow) -> str:
        return f"{row.mitigation} on {row.checkpoint}" if several else row.mitigation

    def labels(chosen: Iterable[HeadlineRow]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(map(label, chosen)))

    def attacked(row: HeadlineRow, kind: Kind) -> list[Cell]:
        cells = (row.cells.get((kind, init)) for init in row.inits)
        return [cell for cell in cells if cell is not None and cell.n]

    def found(row: HeadlineRow) -> bool:
        return any(cell.hits for cell in attacked(row, "vm"))

    def hides(row: HeadlineRow) -> bool:
        test = row.tests.get((row.inits[0], "prompt"))
        return test is not None and test.gained > test.lost and test.p < SIGNIFICANT

    mitigated = [row for row in rows if row.mitigation != BASELINE]
    tried = [row for row in mitigated if attacked(row, "vm") and (found(row) or not row.invalid)]
    holding = labels(filter(found, tried))
    costs = {
        label(row): row.loss_ratio
        for row in tried
        if label(row) not in holding and (cell := row.prompted("vm")) is not None and not cell.hits
    }
    baselines: dict[str, HeadlineRow] = {}
    for row in rows:
        if row.mitigation == BASELINE and row.prompted("vm") is not None:
            baselines.setdefault(row.checkpoint, row)
    return SweepFindings(
        baselines=tuple(baselines.values()),
        tried=labels(tried),
        holding=holding,
        hiding=labels(filter(hides, tried)),
        clear=tuple(costs),
        loss_ratio=next(iter(costs.values())) if len(costs) == 1 else math.nan,
        invalid=labels(row for row in rows if row.invalid),
        painting=labels(
            row
            for row in rows
            if any(cell.mr >= FALSE_POSITIVE_LIMIT for cell in attacked(row, "control"))
        ),
        unchecked=labels(row for row in rows if row.inits and not attacked(row, "control")),
        valid=not any(row.invalid for row in mitigated),
    )


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
    circumstances: Circumstances = Circumstances(), **measurements: Any
) -> AuditReport:
    """Put an audit's measurements into one report, with the flags and the verdict they call for.

    Args:
        circumstances: What its flags are found by besides.
        measurements: The other fields of ``AuditReport``.
    """
    measured = AuditReport(verdict="", flags=(), recommended_budget=None, **measurements)
    measured = replace(measured, flags=find_flags(measured, circumstances))
    if could_not_see(measured):
        # an image that is still there would not have come back either
        images = (
            replace(row, answer="cannot_tell", reason="not_seen") if row.answer == "no" else row
            for row in measured.images
        )
        measured = replace(measured, images=tuple(images))
    headline = measured.headline_condition
    init = headline.init if headline is not None and headline.init is not None else "prompt"
    concluded = replace(
        measured, recommended_budget=recommended_budget(measured.own_cells, init=init)
    )
    return replace(concluded, verdict=verdict_text(concluded))


def base_evidence(fingerprint: str, **measurements: Any) -> BaseEvidence:
    """What the attacks found in a base: an audit of its own, with its own doubts of the search.

    Args:
        fingerprint: The base's.
        measurements: As of ``make_report``.
    """
    report = make_report(mitigation=BASELINE, **measurements)
    return BaseEvidence(report.checkpoint, fingerprint, report.cells, report.images)


def verdict_text(report: AuditRecord) -> str:
    """The paragraph that ``report.json`` keeps: plain words first, the same numbers after them.

    An invalid audit says so before anything else, and why.
    """
    verdict = audit_verdict(report)
    reasons = [flag.text for flag in report.flags if flag.severity == "invalid"]
    warning = [f"{INVALID}: what did not come back says nothing.", *reasons] if reasons else []
    return " ".join([*warning, verdict.plain, verdict.numbers]).strip()
