"""The answer in plain language, and what limits it.

Every sentence is derived from counts; none is chosen by hand. The rule that matters most: an
attack that also "reproduces" pictures which the model does not hold proves nothing, whatever it
does on the suspected ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dori_lightning.report.summary import (
    KIND_WORDS,
    attack_trust,
    condition_words,
    find_cell,
    headline_condition,
    interval_words,
    kinds_present,
    number_words,
    percent_words,
    prompt_condition,
)
from dori_lightning.types import INITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dori_lightning.report.record import Flag
    from dori_lightning.types import Cell, Condition

__all__ = ["INVALID", "short_answer", "verdict_text"]


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
    if "tm" in kinds_present(own):
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
