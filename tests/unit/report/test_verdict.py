from dataclasses import replace
from types import SimpleNamespace

import pytest

from dori_lightning.metrics.replication import headline_condition
from dori_lightning.report.findings import find_flags
from dori_lightning.report.verdict import (
    plain_verdict,
    recommended_budget,
    short_answer,
    verdict_text,
)
from dori_lightning.report.words import interval_words, percent_words


def names(cells: list, mitigation: str = "none", outcomes: tuple = ()) -> set[str]:
    return {flag.name for flag in find_flags(cells, mitigation=mitigation, outcomes=outcomes)}


def audit(fakes: SimpleNamespace, *, prompt: int, attack: int, control: int | None, n: int = 20):
    cells = [fakes.cell("vm", fakes.PROMPT, prompt, n), fakes.cell("vm", fakes.dori(), attack, n)]
    if control is not None:
        cells += [
            fakes.cell("control", fakes.PROMPT, 0, 30),
            fakes.cell("control", fakes.dori(), control, 30),
        ]
    return cells


def test_memorized_and_sound(fakes: SimpleNamespace) -> None:
    cells = audit(fakes, prompt=19, attack=20, control=0)
    text = verdict_text(cells, mitigation="none")
    assert "19 of 20 suspected images (95 %; 95 % interval 76 to 99.1 %)" in text
    assert "20 of 20 suspected images" in text
    assert "30 control images that the model should not hold: none came back" in text
    assert "not reliable" not in text
    assert short_answer(cells, mitigation="none").startswith("The model holds 20 of 20")
    assert names(cells) == {"few_controls"}


def test_controls_that_replicate_void_the_attack(fakes: SimpleNamespace) -> None:
    cells = audit(fakes, prompt=3, attack=20, control=12)
    text = verdict_text(cells, mitigation="none")
    assert "can paint images the model does not hold" in text
    assert "the verdict is not reliable at this budget" in text
    assert "still holds them" not in text
    assert "yet the model holds" not in text
    assert (
        short_answer(cells, mitigation="none") == "The model reproduces 3 of 20 suspected images."
    )
    assert "controls_replicate" in names(cells)
    assert recommended_budget(cells) is None


def test_painting_attack_and_silent_prompts_do_not_reassure(fakes: SimpleNamespace) -> None:
    cells = audit(fakes, prompt=0, attack=20, control=12)
    assert "cannot be relied on" in short_answer(cells, mitigation="none")


def test_without_controls_nothing_is_claimed_of_the_attack(fakes: SimpleNamespace) -> None:
    cells = audit(fakes, prompt=3, attack=20, control=None)
    text = verdict_text(cells, mitigation="none")
    assert "No control image was attacked" in text
    assert "it stays open whether the attack found stored images or painted them" in text
    assert "no_controls" in names(cells)
    assert recommended_budget(cells) is None


def test_controls_that_were_not_attacked(fakes: SimpleNamespace) -> None:
    cells = audit(fakes, prompt=3, attack=20, control=0)[:3]
    assert "controls_not_attacked" in names(cells)
    assert "stays open" in verdict_text(cells, mitigation="none")


def test_controls_that_all_diverged_are_no_controls(fakes: SimpleNamespace) -> None:
    cells = [
        *audit(fakes, prompt=3, attack=20, control=None),
        fakes.cell("control", fakes.dori(), 0, 0, failed=9),
    ]
    assert {"no_controls", "controls_failed"} <= names(cells)
    assert "stays open" in verdict_text(cells, mitigation="none")


def test_nothing_memorized_still_names_the_bound(fakes: SimpleNamespace) -> None:
    cells = audit(fakes, prompt=0, attack=0, control=0)
    text = verdict_text(cells, mitigation="none")
    assert "No sign of memorization was found at this budget." in text
    assert "a true rate of 16 % is not excluded" in text
    assert short_answer(cells, mitigation="none") == "None of 20 suspected images came back."
    assert "baseline_not_memorized" in names(cells)


def test_mitigation_that_only_hides(fakes: SimpleNamespace) -> None:
    base = audit(fakes, prompt=19, attack=20, control=0)
    after = [replace(c, mitigation="wanda") for c in audit(fakes, prompt=1, attack=18, control=0)]
    text = verdict_text([*base, *after], mitigation="wanda")
    assert "1 of 20" in text
    assert "19 of 20" not in text
    assert "The mitigation wanda hides images from their prompts but does not remove them" in text
    assert "no_baseline" not in names([*base, *after], "wanda")
    assert "no_baseline" in names(after, "wanda")


def test_baseline_that_never_memorized(fakes: SimpleNamespace) -> None:
    base = audit(fakes, prompt=4, attack=20, control=0)
    after = [replace(c, mitigation="wanda") for c in audit(fakes, prompt=0, attack=2, control=0)]
    assert "baseline_not_memorized" in names([*base, *after], "wanda")


def test_diverged_pairs_are_no_evidence_of_safety(fakes: SimpleNamespace) -> None:
    cells = [
        fakes.cell("vm", fakes.PROMPT, 0, 20),
        fakes.cell("vm", fakes.dori(), 0, 0, failed=20),
        fakes.cell("control", fakes.dori(), 0, 30),
    ]
    text = verdict_text(cells, mitigation="none")
    assert "no suspected image gave a usable result (20 runs failed)" in text
    assert "at this budget" not in text
    assert "diverged" in names(cells)
    assert "from their prompts" in short_answer(cells, mitigation="none")
    some = [fakes.cell("vm", fakes.dori(), 5, 19, failed=1), cells[2]]
    assert "1 more failed and counts neither" in verdict_text(some, mitigation="none")


def test_no_suspected_pairs(fakes: SimpleNamespace) -> None:
    cells = [
        fakes.cell("control", fakes.PROMPT, 0, 30),
        fakes.cell("control", fakes.dori(), 0, 30),
    ]
    assert "holds no suspected image" in verdict_text(cells, mitigation="none")
    assert short_answer(cells, mitigation="none") == "No suspected image was measured."
    assert short_answer([], mitigation="none") == "No suspected image was measured."
    assert "holds no suspected image" in verdict_text([], mitigation="none")


def test_no_attack(fakes: SimpleNamespace) -> None:
    cells = audit(fakes, prompt=0, attack=0, control=0)
    cells = [cell for cell in cells if cell.condition.attack == "prompt"]
    text = verdict_text(cells, mitigation="none")
    assert "No adversarial attack was run" in text
    assert "No sign of memorization was found from their prompts." in text


def test_templates_are_told_apart(fakes: SimpleNamespace) -> None:
    cells = [*audit(fakes, prompt=9, attack=9, control=0), fakes.cell("tm", fakes.PROMPT, 2, 4)]
    assert "suspected template copies, 2 of 4 from their prompts" in verdict_text(
        cells, mitigation="none"
    )


def test_control_prompts_that_count_show_a_bad_threshold(fakes: SimpleNamespace) -> None:
    cells = [*audit(fakes, prompt=9, attack=9, control=None)]
    cells += [
        fakes.cell("control", fakes.PROMPT, 6, 30),
        fakes.cell("control", fakes.dori(), 0, 30),
    ]
    assert "control_prompts_replicate" in names(cells)
    assert "From control prompts, 6 of 30" in verdict_text(cells, mitigation="none")


def test_duplicates_are_flagged(fakes: SimpleNamespace, tmp_path) -> None:
    outcome = fakes.report(tmp_path, vm=1, control=0).outcomes[0]
    copy = replace(outcome, pair=replace(outcome.pair, duplicate_of="other"))
    cells = audit(fakes, prompt=9, attack=9, control=0)
    assert "duplicates" in names(cells, outcomes=(copy,))


def test_recommended_budget_stops_at_the_first_failure(fakes: SimpleNamespace) -> None:
    rates = {1: 0, 10: 0, 50: 1, 100: 5, 200: 0}
    cells = [fakes.cell("control", fakes.dori(s), hits, 30) for s, hits in rates.items()]
    cells += [fakes.cell("control", fakes.dori(500, norm="l2", eps=1.0), 0, 30)]
    cells += [fakes.cell("control", fakes.dori(400, "random"), 0, 30)]
    budget = recommended_budget(cells)
    assert budget is not None
    assert budget.steps == 50
    random = recommended_budget(cells, init="random")
    assert random is not None
    assert random.steps == 400
    assert recommended_budget([fakes.cell("control", fakes.dori(10), 1, 20)]) is None


def test_headline_ignores_the_suspected_images(fakes: SimpleNamespace) -> None:
    def control(condition, hits):
        return fakes.cell("control", condition, hits, 30)

    def suspect(condition, hits):
        return fakes.cell("vm", condition, hits, 20)

    sound, painting, random = fakes.dori(50), fakes.dori(500), fakes.dori(50, "random")
    cells = [control(sound, 0), control(painting, 20), control(random, 0)]
    cells += [suspect(sound, 2), suspect(painting, 20), suspect(random, 19)]
    assert headline_condition(cells) == sound
    assert headline_condition([suspect(fakes.PROMPT, 2)]) is None


@pytest.mark.parametrize(
    ("rate", "words"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.996, "99.6 %"), (0.004, "0.4 %"), (0.5, "50 %")],
)
def test_percent_words(rate: float, words: str) -> None:
    assert percent_words(rate) == words
    assert percent_words(float("nan")) == "n/a"
    assert interval_words((0.1, 0.2)) == "10 to 20 %"


# --- invalid audits: what did not come back says nothing


def flags_of(fakes: SimpleNamespace, cells: list, mitigation: str, **more: object) -> dict:
    found = find_flags(cells, mitigation=mitigation, **more)
    return {flag.name: flag for flag in found if flag.severity == "invalid"}


def mitigated(fakes: SimpleNamespace, *, before: int, failed: int = 0) -> list:
    """Nothing comes back under a mitigation: it looks like a perfect one."""
    return [
        fakes.cell("vm", fakes.PROMPT, 0, 20, mitigation="esd"),
        fakes.cell("vm", fakes.dori(), 0, 20 - failed, failed=failed, mitigation="esd"),
        fakes.cell("control", fakes.PROMPT, 0, 30, mitigation="esd"),
        fakes.cell("control", fakes.dori(), 0, 30, mitigation="esd"),
        fakes.cell("vm", fakes.PROMPT, before, 20),
    ]


def test_a_mitigation_of_what_was_never_memorized_is_no_test(fakes: SimpleNamespace) -> None:
    assert not flags_of(fakes, mitigated(fakes, before=18), "esd")
    cells = mitigated(fakes, before=9)
    assert set(flags_of(fakes, cells, "esd")) == {"baseline_not_memorized"}
    # of a checkpoint as it is, that little comes back is the answer
    assert not flags_of(fakes, audit(fakes, prompt=0, attack=0, control=0), "none")


def test_an_edit_that_changes_nothing_is_no_mitigation(fakes: SimpleNamespace) -> None:
    found = flags_of(fakes, mitigated(fakes, before=18), "esd", inert=True)
    assert set(found) == {"edit_changes_nothing"}
    assert "changes no weight" in found["edit_changes_nothing"].text


@pytest.mark.parametrize("status", ["diverged", "no_gradient"])
def test_one_suspected_image_without_a_result_is_enough(
    fakes: SimpleNamespace, tmp_path, status: str
) -> None:
    pair = fakes.report(tmp_path).outcomes[0].pair
    lost = fakes.outcome(pair, fakes.dori(), [0.1], status=status)
    cells = mitigated(fakes, before=18, failed=1)
    assert set(flags_of(fakes, cells, "esd", outcomes=(lost,))) == {status}
    again = replace(lost, restart=1, status="ok")
    kept = mitigated(fakes, before=18)
    assert not flags_of(fakes, kept, "esd", outcomes=(lost, again)), "another restart searched"


def test_an_invalid_audit_is_nowhere_reported_as_safety(fakes: SimpleNamespace) -> None:
    cells = mitigated(fakes, before=1)
    flags = find_flags(cells, mitigation="esd")
    text = verdict_text(cells, mitigation="esd", flags=flags)
    assert text.startswith("INVALID AUDIT: what did not come back says nothing.")
    assert "reproduces only 1 of 20 suspected images" in text
    assert text.count("That nothing came back is no evidence of safety.") == 1
    assert "No sign of memorization" not in text
    answer = short_answer(cells, mitigation="esd", invalid=True)
    assert answer == (
        "This audit is invalid: none of 20 suspected images came back, and the rest says nothing."
    )
    plain = plain_verdict(cells, mitigation="esd", invalid=True)
    assert "may be in the model all the same" in plain
    assert "no proof of absence" not in plain
