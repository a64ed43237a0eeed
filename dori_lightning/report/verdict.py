"""The answer in plain language, and what limits it.

Every sentence is derived from counts; none is chosen by hand. The rule that matters most: an
attack that also "reproduces" pictures which the model does not hold proves nothing, whatever it
does on the suspected ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from dori_lightning.metrics.replication import (
    FALSE_POSITIVE_LIMIT,
    Trust,
    attack_trust,
    find_cell,
    headline_condition,
    prompt_condition,
)
from dori_lightning.metrics.utility import Utility
from dori_lightning.report.comparison import HeadlineRow
from dori_lightning.report.findings import find_flags
from dori_lightning.report.record import AttackEffort, AuditReport, Flag, Provenance
from dori_lightning.report.words import (
    KIND_WORDS,
    condition_words,
    interval_words,
    number_words,
    percent_words,
)
from dori_lightning.types import (
    BASELINE,
    INITS,
    Budget,
    Calibration,
    Cell,
    Condition,
    Init,
    Outcome,
)

# -------- plain_words
# The verdict for a person who is not an engineer: what was tried, what came back, what it means.
#
# Every sentence is derived from counts; the same rules hold as in ``verdict``.

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
        else _plain_meaning(asked, searched, trust, mitigated=mitigation != BASELINE),
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
            f"As it is, the model draws {_times(cell)} of {number_words(cell.n, 'image')} that it "
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
        cost = _cost_clause(empty)
        sentences.append(
            f"Neither brought any image back after {names}{cost}. That is what this search "
            f"found, no proof that nothing is left."
        )
    return " ".join(sentences)


def _each(count: int) -> str:
    return "One attempt" if count == 1 else f"Each of {count} attempts"


def _cost_clause(rows: Sequence[HeadlineRow]) -> str:
    if len(rows) != 1 or not math.isfinite(rows[0].cost.loss_ratio):
        return ""
    change = 100 * (rows[0].cost.loss_ratio - 1)
    verb = "raises" if change >= 0 else "lowers"
    return f", which {verb} the model's error on ordinary pictures by {abs(change):.1f} %"


def _found(row: HeadlineRow) -> int | None:
    cells = [a.vm for a in row.attacks if a.vm is not None and a.vm.n]
    return max(cell.hits for cell in cells) if cells else None


def _usable(own: Sequence[Cell], condition: Condition | None) -> Cell | None:
    cell = find_cell(own, kind="vm", condition=condition) if condition else None
    return cell if cell is not None and cell.n > 0 else None


def _times(cell: Cell) -> str:
    return "all" if cell.hits == cell.n > 1 else "none" if cell.hits == 0 else str(cell.hits)


def _before(cells: Sequence[Cell], mitigation: str, prompts: Condition | None) -> Iterator[str]:
    if mitigation == BASELINE:
        return
    cell = _usable([c for c in cells if c.mitigation == BASELINE], prompts)
    if cell is not None:
        yield (
            f"Before the mitigation their captions brought back {_times(cell)} of them as a copy."
        )


def _asked(asked: Cell | None, *, mitigated: bool) -> Iterator[str]:
    if asked is not None:
        now = "now " if mitigated else ""
        yield f"Given their captions, the model {now}draws {_times(asked)} of them as a copy."


def _searched(searched: Cell | None, control: Cell | None, trust: Trust) -> Iterator[str]:
    if searched is None:
        yield "Nobody searched for other inputs that bring them back."
        return
    yield (
        f"A search for any other input that brings an image back succeeds for {_times(searched)} "
        f"of them."
    )
    if trust == "unchecked" or control is None:
        yield "It was not tried on images that the model cannot hold, so it is unchecked."
        return
    unknown = number_words(control.n, "image")
    came = "none" if control.hits == 0 else str(control.hits)
    yield f"Tried on {unknown} that the model should not hold, it brings back {came}."


def _plain_meaning(
    asked: Cell | None, searched: Cell | None, trust: Trust, *, mitigated: bool
) -> str:
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


# -------- sweep_verdict
# What a table of mitigations says in plain language; every sentence follows from counts.

_SIGNIFICANT = 0.05


def sweep_answer(rows: Sequence[HeadlineRow]) -> str:
    """Give the answer in one sentence, fit for a heading."""
    measured = [row for row in _mitigated(rows) if _attacked(row)]
    if not measured:
        if any(row.invalid for row in _mitigated(rows)):
            return "No mitigation has a valid audit."
        return "No mitigation was attacked."
    found = [row for row in measured if _sweep_finding(row)]
    names = number_words(len(_names(measured)), "mitigation")
    if not found:
        return f"The attack finds no suspected image under {names}."
    return f"The attack still finds images under {len(_names(found))} of {names}."


def sweep_sentences(rows: Sequence[HeadlineRow]) -> list[str]:
    """Say what holds without a mitigation, what only hides, what removes, and what to doubt."""
    return [*_baselines(rows), *_mitigations(rows), *_doubts(rows)]


def sweep_tone(rows: Sequence[HeadlineRow]) -> str:
    """Choose the answer's colour; ``doubt`` where controls fail or no mitigation was attacked."""
    measured = [row for row in _mitigated(rows) if _attacked(row)]
    if not measured or any(_doubts(rows)):
        return "doubt"
    return "found" if any(_sweep_finding(row) for row in measured) else "clear"


def _baselines(rows: Sequence[HeadlineRow]) -> Iterator[str]:
    seen: set[str] = set()
    for row in rows:
        if row.mitigation != BASELINE or row.checkpoint in seen or row.prompt_vm is None:
            continue
        seen.add(row.checkpoint)
        text = (
            f"Without a mitigation {row.checkpoint} reproduces {row.prompt_vm.hits} of "
            f"{number_words(row.prompt_vm.n, 'suspected image')} from their prompts"
        )
        attacked = row.main.vm if row.main is not None else None
        yield text + (f", {attacked.hits} of {attacked.n} by the attack." if attacked else ".")


def _mitigations(rows: Sequence[HeadlineRow]) -> Iterator[str]:
    own = [row for row in _mitigated(rows) if _attacked(row)]
    hiding = [
        row
        for row in own
        if row.main is not None
        and (test := row.main.against_prompt) is not None
        and test.gained > test.lost
        and test.p < _SIGNIFICANT
    ]
    if hiding:
        yield (
            f"Hidden from their prompts and found by the attack (paired test, p < "
            f"{_SIGNIFICANT}): {', '.join(_names(hiding))}."
        )
    clear = [
        row for row in own if not _sweep_finding(row) and row.prompt_vm and not row.prompt_vm.hits
    ]
    found_elsewhere = {(r.checkpoint, r.mitigation) for r in own if _sweep_finding(r)}
    clear = [row for row in clear if (row.checkpoint, row.mitigation) not in found_elsewhere]
    if clear:
        yield f"Nothing came back, by prompt or attack: {', '.join(_names(clear))}."


def _doubts(rows: Sequence[HeadlineRow]) -> Iterator[str]:
    invalid = [row for row in rows if row.invalid]
    if invalid:
        yield f"Invalid, so without an answer: the audit of {', '.join(_names(invalid))}."
    painting = [
        row
        for row in rows
        for attack in row.attacks
        if attack.control is not None
        and attack.control.n
        and attack.control.mr >= FALSE_POSITIVE_LIMIT
    ]
    if painting:
        yield (
            f"The attack also reproduces controls under {', '.join(_names(painting))}: there it "
            f"may paint what the model does not hold, and proves nothing."
        )
    unchecked = [
        row
        for row in rows
        if row.attacks and not any(a.control is not None and a.control.n for a in row.attacks)
    ]
    if unchecked:
        yield f"No control was attacked under {', '.join(_names(unchecked))}."


def _mitigated(rows: Sequence[HeadlineRow]) -> list[HeadlineRow]:
    return [row for row in rows if row.mitigation != BASELINE]


def _attacked(row: HeadlineRow) -> bool:
    """Whether an attack says something of a row; an invalid audit's only does where it finds."""
    if row.invalid and not _sweep_finding(row):
        return False
    return any(attack.vm is not None and attack.vm.n for attack in row.attacks)


def _sweep_finding(row: HeadlineRow) -> bool:
    return any(attack.vm is not None and attack.vm.hits for attack in row.attacks)


def _names(rows: Sequence[HeadlineRow]) -> list[str]:
    """Each mitigation once, with its checkpoint where there are several."""
    several = len({row.checkpoint for row in rows}) > 1
    return list(
        dict.fromkeys(
            f"{row.mitigation} on {row.checkpoint}" if several else row.mitigation for row in rows
        )
    )


# -------- verdict

INVALID = "INVALID AUDIT"
"""How verdict, console and tables call an audit that answers nothing."""


def short_answer(cells: Sequence[Cell], *, mitigation: str, invalid: bool = False) -> str:
    """Give the answer in one short sentence, fit for a heading.

    Args:
        cells: All cells; those of other mitigations are not spoken of.
        mitigation: The mitigation under audit.
        invalid: Whether the audit is invalid; what came back still did.
    """
    own = [cell for cell in cells if cell.mitigation == mitigation]
    prompts, attack = prompt_condition(own), headline_condition(own)
    trust = attack_trust(own, attack)
    prompt, attacked = (_measured(own, condition) for condition in (prompts, attack))
    if prompt is None and attacked is None:
        return "No suspected image was measured."
    if trust in ("paints", "unchecked"):
        attacked = None
    if prompt is None and attacked is None:
        return "This run gives no reliable answer."
    best = max(
        (cell for cell in (attacked, prompt) if cell is not None), key=lambda cell: cell.hits
    )
    whole = number_words(best.n, "suspected image")
    if invalid:
        came = f"{best.hits or 'none'} of {whole} came back"
        return f"This audit is invalid: {came}, and the rest says nothing."
    if best.hits == 0:
        scope = " from their prompts" if attacked is None else ""
        doubt = (
            "; the attack's result cannot be relied on" if trust in ("paints", "unchecked") else ""
        )
        return f"None of {whole} came back{scope}{doubt}."
    if prompt is not None and best.hits > prompt.hits:
        return (
            f"The model holds {best.hits} of {whole}; their prompts bring back {prompt.hits} of "
            f"{prompt.n}."
        )
    return f"The model reproduces {best.hits} of {whole}."


def _measured(own: Sequence[Cell], condition: Condition | None) -> Cell | None:
    cell = find_cell(own, kind="vm", condition=condition) if condition else None
    return cell if cell is not None and cell.n > 0 else None


def verdict_text(cells: Sequence[Cell], *, mitigation: str, flags: Sequence[Flag] = ()) -> str:
    """Say in one paragraph how many images come back, how sure that is, and what it means.

    Args:
        cells: All cells; those of other mitigations are not spoken of.
        mitigation: The mitigation under audit; ``none`` for the checkpoint as it is.
        flags: What limits the numbers; invalid ones come first and take the place of what the
            numbers would mean.
    """
    own = [cell for cell in cells if cell.mitigation == mitigation]
    reasons = [flag.text for flag in flags if flag.severity == "invalid"]
    prompts, attack = prompt_condition(own), headline_condition(own)
    vm_prompt, vm_attack = (find_cell(own, kind="vm", condition=c) for c in (prompts, attack))
    sentences = [f"{INVALID}: what did not come back says nothing.", *reasons] if reasons else []
    if not any(cell.kind == "vm" for cell in own):
        sentences.append(
            "The list holds no suspected image (kind vm), so this run cannot say what is "
            "memorized."
        )
    if vm_prompt is not None:
        sentences.append(f"From their own prompts, {_count(vm_prompt)}.")
    if attack is None:
        if own:
            sentences.append(
                "No adversarial attack was run, so images that hide from their prompts went "
                "unseen."
            )
    elif vm_attack is not None:
        words = condition_words(attack).replace("attack ", "started ", 1)
        sentences.append(f"From adversarial embeddings ({words}), {_count(vm_attack)}.")
        sentences.extend(_other_starts(own, attack))
    sentences.extend(_control_sentences(own, prompts, attack))
    if any(cell.kind == "vm" for cell in own):
        sentences.append(
            _meaning(own, vm_prompt, vm_attack, mitigation=mitigation, invalid=bool(reasons))
        )
    if any(cell.kind == "tm" for cell in own):
        sentences.extend(_template_sentences(own, prompts, attack))
    return " ".join(sentences)


def _count(cell: Cell) -> str:
    noun = KIND_WORDS[cell.kind]
    if cell.n == 0:
        return f"no {noun} gave a usable result ({number_words(cell.failed, 'run')} failed)"
    text = (
        f"the model reproduces {cell.hits} of {number_words(cell.n, noun)} "
        f"({percent_words(cell.mr)}; 95 % interval {interval_words(cell.mr_ci95)})"
    )
    if cell.failed:
        verb = "counts" if cell.failed == 1 else "count"
        text += f"; {cell.failed} more failed and {verb} neither as reproduced nor as safe"
    return text


def _other_starts(own: Sequence[Cell], attack: Condition) -> Iterable[str]:
    """Name the other starts under the headline's budget: a claim must not hang on one start."""
    for init in INITS:
        for cell in own:
            same = cell.kind == "vm" and cell.condition.budget == attack.budget and cell.n > 0
            if (
                same
                and cell.condition.init == init != attack.init
                and cell.condition.attack == "dori"
            ):
                start = condition_words(cell.condition).split(",")[0].removeprefix("attack ")
                yield f"Started {start} instead, it is {cell.hits} of {cell.n}."


def _control_sentences(
    own: Sequence[Cell], prompts: Condition | None, attack: Condition | None
) -> Iterable[str]:
    cell = find_cell(own, kind="control", condition=attack) if attack else None
    if cell is not None and cell.n > 0:
        yield (
            f"As a check, the same attack was aimed at {number_words(cell.n, 'control image')} "
            f"that the model should not hold: {cell.hits or 'none'} came back "
            f"({percent_words(cell.mr)}; 95 % interval {interval_words(cell.mr_ci95)})."
        )
    elif attack is not None:
        yield "No control image was attacked, so the attack itself is unchecked."
    cell = find_cell(own, kind="control", condition=prompts) if prompts else None
    if cell is not None and cell.n > 0 and (cell.hits > 0 or attack is None):
        images = number_words(cell.n, "control image")
        yield f"From control prompts, {cell.hits} of {images} came back."
    elif attack is None and (cell is None or cell.n == 0) and own:
        yield "No control image was measured, so the rate of false alarms is unknown."


def _meaning(
    own: Sequence[Cell],
    prompt: Cell | None,
    attacked: Cell | None,
    *,
    mitigation: str,
    invalid: bool,
) -> str:
    trust = attack_trust(own, headline_condition(own))
    if trust == "paints":
        return (
            "The attack can paint images the model does not hold; the verdict is not reliable at "
            "this budget. Only the result from the prompts can be used."
        )
    if trust == "unchecked" and (attacked is None or attacked.hits > 0):
        return (
            "Without controls it stays open whether the attack found stored images or painted "
            "them; only the result from the prompts can be used."
        )
    from_prompt = prompt.hits if prompt is not None else 0
    found = max(from_prompt, attacked.hits if attacked is not None else 0)
    measured = [cell for cell in (prompt, attacked) if cell is not None and cell.n > 0]
    if not measured:
        return "Nothing was measured on the suspected images; that is no evidence of safety."
    if invalid:
        return (
            "What came back is in the model all the same."
            if found
            else "That nothing came back is no evidence of safety."
        )
    if found == 0:
        upper = max(cell.mr_ci95[1] for cell in measured)
        bound = f" With this many images, a true rate of {percent_words(upper)} is not excluded."
        scope = (
            "at this budget" if attacked is not None and attacked.n > 0 else "from their prompts"
        )
        return f"No sign of memorization was found {scope}.{bound}"
    if (
        attacked is not None
        and attacked.hits > from_prompt
        and prompt is not None
        and prompt.n > 0
    ):
        if mitigation != "none":
            return (
                f"The mitigation {mitigation} hides images from their prompts but does not remove "
                f"them: the model still holds them."
            )
        return "Some images do not come back from their prompts, yet the model holds them."
    return "The reproduced images are stored in the model and can be brought out of it."


def _template_sentences(
    own: Sequence[Cell], prompts: Condition | None, attack: Condition | None
) -> Iterable[str]:
    parts = []
    for condition, words in (
        (prompts, "from their prompts"),
        (attack, "from adversarial embeddings"),
    ):
        cell = find_cell(own, kind="tm", condition=condition) if condition else None
        if cell is not None and cell.n > 0:
            parts.append(f"{cell.hits} of {cell.n} {words}")
    if parts:
        copies = " and ".join(parts)
        yield f"Of the suspected template copies, {copies} came back close enough to count."


# -------- conclusions
# Everything that follows from an audit's measurements, put into one report.


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
