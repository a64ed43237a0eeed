import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dori_lightning.attacks.model_check import ModelCheck
from dori_lightning.metrics.evidence import BaseEvidence, ImageEvidence, Power
from dori_lightning.metrics.replication import headline_condition, recommended_budget
from dori_lightning.report.findings import (
    Circumstances,
    audit_findings,
    audit_verdict,
    base_evidence,
    find_flags,
)
from dori_lightning.report.record import AuditReport
from dori_lightning.types import INITS, KINDS, Pair, Scale
from support import fake_reports as fakes


def audit(
    *,
    prompt: int,
    attack: int,
    control: int | None,
    n: int = 20,
    mitigation: str = "none",
    **more: Any,
) -> AuditReport:
    """Suspected images and 30 controls by prompt and attack; no controls where None."""
    counts = {("vm", fakes.PROMPT): (prompt, n), ("vm", fakes.dori()): (attack, n)}
    if control is not None:
        counts |= {("control", fakes.PROMPT): (0, 30), ("control", fakes.dori()): (control, 30)}
    cells = [
        fakes.cell(*key, hits, count, mitigation=mitigation)
        for key, (hits, count) in counts.items()
    ]
    return fakes.measured(cells, mitigation=mitigation, **more)


def names(report: AuditReport) -> set[str]:
    return {flag.name for flag in report.flags}


@pytest.mark.parametrize(
    ("counts", "answer", "trust", "tone"),
    [
        ({"prompt": 19, "attack": 20, "control": 0}, "hidden", "sound", "found"),
        ({"prompt": 20, "attack": 20, "control": 0}, "found", "sound", "found"),
        ({"prompt": 3, "attack": 20, "control": 12}, "found", "paints", "doubt"),
        ({"prompt": 0, "attack": 20, "control": 12}, "unreliable", "paints", "doubt"),
        ({"prompt": 0, "attack": 20, "control": None}, "unreliable", "unchecked", "doubt"),
        ({"prompt": 0, "attack": 0, "control": None}, "clear", "unchecked", "doubt"),
        ({"prompt": 3, "attack": 20, "control": None}, "found", "unchecked", "doubt"),
        ({"prompt": 0, "attack": 0, "control": 0}, "clear", "sound", "clear"),
    ],
)
def test_an_attack_counts_only_where_its_controls_stay_away(counts, answer, trust, tone):
    found = audit_findings(audit(**counts))
    assert (found.answer, found.trust, found.tone) == (answer, trust, tone)
    assert found.best.hits == (counts["attack"] if trust == "sound" else counts["prompt"])


def test_the_bound_is_of_what_can_be_relied_on():
    assert audit_findings(audit(prompt=0, attack=0, control=0)).upper == pytest.approx(
        0.16, abs=0.01
    )


def test_other_starts_of_the_headlines_budget_are_named():
    report = audit(prompt=1, attack=2, control=0)
    random, short = fakes.dori(50, "random"), fakes.dori(10, "random")
    cells = (*report.cells, fakes.cell("vm", random, 9, 20), fakes.cell("vm", short, 7, 20))
    found = audit_findings(replace(report, cells=cells))
    assert [cell.hits for cell in found.other_starts] == [9]


def test_without_a_suspected_image_nothing_is_answered():
    controls = [
        fakes.cell("control", fakes.PROMPT, 0, 30),
        fakes.cell("control", fakes.dori(), 0, 30),
    ]
    for cells in (controls, []):
        found = audit_findings(fakes.measured(cells))
        assert (found.answer, found.tone, found.best) == ("unmeasured", "doubt", None)


def test_an_attack_alone_without_controls_is_no_answer():
    report = fakes.measured([fakes.cell("vm", fakes.dori(), 20, 20)])
    assert audit_findings(report).answer == "unreliable"


def test_failed_attacks_are_no_evidence_of_safety():
    report = fakes.measured(
        [
            fakes.cell("vm", fakes.PROMPT, 0, 20),
            fakes.cell("vm", fakes.dori(), 0, 0, failed=20),
            fakes.cell("control", fakes.dori(), 0, 30),
        ]
    )
    found = audit_findings(report)
    assert (found.answer, found.best) == ("clear", found.prompt)
    assert report.invalid == ("diverged",)


# --- flags


def test_flags_of_a_sound_audit():
    assert names(audit(prompt=19, attack=20, control=0)) == {"few_controls"}


@pytest.mark.parametrize(
    ("counts", "flag"),
    [
        ({"prompt": 3, "attack": 20, "control": 12}, "controls_replicate"),
        ({"prompt": 3, "attack": 20, "control": None}, "no_controls"),
        ({"prompt": 0, "attack": 0, "control": 0}, "baseline_not_memorized"),
        ({"prompt": 3, "attack": 3, "control": 0, "n": 4}, "few_pairs"),
        ({"prompt": 3, "attack": 3, "control": 0, "skipped": ["a"]}, "pairs_skipped"),
    ],
)
def test_each_limit_has_its_flag(counts, flag):
    assert flag in names(audit(**counts))


def test_controls_that_were_not_attacked():
    cells = audit(prompt=3, attack=20, control=0).cells[:3]
    assert "controls_not_attacked" in names(fakes.measured(cells))


def test_controls_that_all_diverged_are_no_controls():
    cells = [
        *audit(prompt=3, attack=20, control=None).cells,
        fakes.cell("control", fakes.dori(), 0, 0, failed=9),
    ]
    assert {"no_controls", "controls_failed"} <= names(fakes.measured(cells))


def test_control_prompts_that_count_show_a_bad_threshold():
    cells = [
        *audit(prompt=9, attack=9, control=None).cells,
        fakes.cell("control", fakes.PROMPT, 6, 30),
        fakes.cell("control", fakes.dori(), 0, 30),
    ]
    assert "control_prompts_replicate" in names(fakes.measured(cells))


def test_duplicates_and_long_prompts_are_flagged(tmp_path):
    outcome = fakes.report(tmp_path, vm=1, control=0).outcomes[0]
    copy = replace(outcome, pair=replace(outcome.pair, duplicate_of="other", cut_by=("T5",)))
    report = audit(prompt=9, attack=9, control=0, outcomes=(copy,))
    assert {"duplicates", "truncated_prompts"} <= names(report)


def test_recommended_budget_stops_at_the_first_failure():
    rates = {1: 0, 10: 0, 50: 1, 100: 5, 200: 0}
    cells = [fakes.cell("control", fakes.dori(s), hits, 30) for s, hits in rates.items()]
    cells += [fakes.cell("control", fakes.dori(500, norm="l2", eps=1.0), 0, 30)]
    cells += [fakes.cell("control", fakes.dori(400, "random"), 0, 30)]
    budget = recommended_budget(cells)
    assert budget.steps == 50
    random = recommended_budget(cells, init="random")
    assert random.steps == 400
    assert recommended_budget([fakes.cell("control", fakes.dori(10), 1, 20)]) is None


def test_the_strongest_sound_attack_speaks():
    def control(condition: Any, hits: int) -> Any:
        return fakes.cell("control", condition, hits, 30)

    def suspect(condition: Any, hits: int) -> Any:
        return fakes.cell("vm", condition, hits, 20)

    sound, painting, other = fakes.dori(50), fakes.dori(500), fakes.dori(50, "random")
    cells = [control(sound, 0), control(painting, 20), control(other, 0)]
    cells += [suspect(sound, 2), suspect(painting, 20), suspect(other, 19)]
    assert headline_condition(cells) == other, "what paints does not count, however much it finds"
    assert headline_condition(cells[:5]) == sound
    assert headline_condition([suspect(fakes.PROMPT, 2)]) is None
    found = audit_findings(fakes.measured(cells))
    assert (found.best.hits, found.condition, found.trust) == (19, other, "sound")


def test_template_copies_that_come_back_are_no_verdict_of_none():
    cells = [*audit(prompt=0, attack=0, control=0).cells, fakes.cell("tm", fakes.PROMPT, 3, 4)]
    found = audit_findings(fakes.measured(cells))
    assert (found.answer, found.best.hits, found.tone) == ("templates", 3, "found")
    alone = audit_findings(fakes.measured([fakes.cell("tm", fakes.dori(), 3, 4)]))
    assert (alone.answer, alone.trust) == ("unreliable", "unchecked")


def test_no_table_with_a_hit_has_a_verdict_of_none():
    """Whatever was run, attacked and checked: many random tables."""
    draw = random.Random(0)
    conditions = [
        fakes.PROMPT,
        *(fakes.dori(steps, init) for steps in (10, 50) for init in INITS),
        fakes.dori(50, norm="l2", eps=1.0),
    ]
    answers = set()
    for _ in range(200):
        chosen = draw.sample(conditions, draw.randint(1, len(conditions)))
        cells = [
            fakes.cell(kind, condition, draw.choice((0, 0, 0, 1, 3)), draw.choice((3, 20)))
            for condition in chosen
            for kind in draw.sample(KINDS, draw.randint(1, 3))
        ]
        report = fakes.measured(cells)
        found, verdict = audit_findings(report), audit_verdict(report)
        answers.add(found.answer)
        suspected = [cell for cell in cells if cell.kind != "control"]
        if any(cell.hits for cell in suspected):
            assert found.answer in ("found", "hidden", "templates", "unreliable"), cells
            assert found.tone != "clear"
            assert not verdict.answer.startswith("None")
        elif suspected:
            assert found.answer in ("clear", "unmeasured", "unreliable")
    assert len(answers) == 6, "every answer was drawn"


# --- invalid audits: what did not come back says nothing


def mitigated(*, before: int | None, failed: int = 0, **more: Any) -> AuditReport:
    """Nothing comes back under a mitigation: it looks like a perfect one."""
    return fakes.measured(
        [
            fakes.cell("vm", fakes.PROMPT, 0, 20, mitigation="esd"),
            fakes.cell("vm", fakes.dori(), 0, 20 - failed, failed=failed, mitigation="esd"),
            fakes.cell("control", fakes.PROMPT, 0, 30, mitigation="esd"),
            fakes.cell("control", fakes.dori(), 0, 30, mitigation="esd"),
            *([] if before is None else [fakes.cell("vm", fakes.PROMPT, before, 20)]),
        ],
        mitigation="esd",
        **more,
    )


def test_a_mitigation_of_what_was_never_memorized_is_no_test():
    assert mitigated(before=18).invalid == ()
    assert mitigated(before=9).invalid == ("baseline_not_memorized",)
    # of a checkpoint as it is, that little comes back is the answer
    assert audit(prompt=0, attack=0, control=0).invalid == ()


def test_a_missing_baseline_is_flagged():
    assert "no_baseline" in names(mitigated(before=None))
    assert "no_baseline" not in names(mitigated(before=18))


def test_an_edit_that_changes_nothing_is_no_mitigation():
    assert mitigated(before=18, inert=True).invalid == ("edit_changes_nothing",)


@pytest.mark.parametrize("status", ["diverged", "no_gradient"])
def test_one_suspected_image_without_a_result_is_enough(tmp_path, status):
    pair = fakes.report(tmp_path).outcomes[0].pair
    lost = fakes.outcome(pair, fakes.dori(), [0.1], status=status)
    assert mitigated(before=18, failed=1, outcomes=(lost,)).invalid == (status,)
    again = replace(lost, restart=1, status="ok")
    assert mitigated(before=18, outcomes=(lost, again)).invalid == (), "another restart searched"


MISSED = ImageEvidence(
    id="cat", kind="vm", answer="no", reason="nothing_came_back", similarity=0.1,
    condition=None, scale=Scale(0.0, 1.0), score=0.1, p_image=0.5,
)  # fmt: skip
GOOD = ModelCheck(response=0.07, scale=1.0, gradient=0.006, denoising=0.24)


@pytest.mark.parametrize(
    ("check", "before", "flag"),
    [
        (GOOD, None, None),
        (GOOD, GOOD, None),
        (replace(GOOD, denoising=1.2), None, "model_damaged"),
        (replace(GOOD, denoising=math.nan), None, "model_damaged"),
        (replace(GOOD, denoising=0.6), GOOD, "model_damaged"),
        (replace(GOOD, denoising=0.72), None, "model_damaged"),
        (replace(GOOD, denoising=0.4), None, None),
        (replace(GOOD, denoising=0.4), GOOD, None),
        (replace(GOOD, gradient=1e-5), GOOD, "gradient_masked"),
        (replace(GOOD, gradient=1.0), GOOD, "gradient_masked"),
    ],
)
def test_where_the_search_could_not_work_nothing_found_is_no_answer(check, before, flag):
    counts = {"prompt": 0, "attack": 0, "control": 0}
    base = BaseEvidence("base", "b" * 16, (), (MISSED,))
    report = audit(**counts, check=check, check_before=before, images=(MISSED,), base=base)
    assert (names(report) & {"model_damaged", "gradient_masked"}) == ({flag} if flag else set())
    found = audit_findings(report)
    assert (found.answer, found.tone) == (("blind", "doubt") if flag else ("clear", "clear"))
    (row,) = report.images
    assert (row.answer, row.reason) == (
        ("cannot_tell", "not_seen") if flag else ("no", "nothing_came_back")
    )
    assert report.base == base, "another model, which the search may work on"
    assert report.origins == {"cat": "cannot_tell" if flag else "neither"}
    assert ("could not have seen it" in audit_verdict(report).answer) == bool(flag)


@pytest.mark.parametrize(
    ("check", "origin"), [(GOOD, "tuning"), (replace(GOOD, denoising=1.2), "cannot_tell")]
)
def test_what_a_base_that_could_not_be_searched_lacks_did_not_come_with_the_tuning(check, origin):
    base = base_evidence(
        "b" * 16,
        checkpoint="base",
        cells=(fakes.cell("vm", fakes.PROMPT, 0, 20),),
        calibration=fakes.calibration(),
        outcomes=(),
        images=(MISSED,),
        check=check,
        provenance=fakes.provenance(),
    )
    found = replace(MISSED, answer="yes", reason="copy")
    report = audit(prompt=1, attack=1, control=0, check=GOOD, images=(found,), base=base)
    assert report.origins == {"cat": origin}
    counted = "1 came" if origin == "tuning" else "none came"
    assert f"{counted} with the fine-tuning" in audit_verdict(report).plain


def test_a_search_whose_loss_stands_still_is_told():
    def report(last: float) -> AuditReport:
        pair = Pair(id="cat", kind="vm", prompt="a cat", image=Path("cat.png"))
        outcome = fakes.outcome(pair, fakes.dori(), [0.1])
        outcomes = (replace(outcome, loss_first=0.2, loss_last=last),) * 8
        counts = {"prompt": 0, "attack": 0, "control": 0}
        return audit(**counts, check=GOOD, outcomes=outcomes)

    assert "loss_stands_still" in names(report(0.2))
    assert "loss_stands_still" not in names(report(0.14))


def test_a_sequential_search_says_what_it_left_out_and_is_no_search_that_stands_still():
    def report(stop: int, level: float | None) -> AuditReport:
        outcomes = tuple(
            replace(
                fakes.outcome(Pair(f"{kind}{score}{k}", kind, "", Path()), fakes.dori(), [score]),
                loss_first=0.2,
                loss_last=0.2,
                stopped_at=0 if score < 0.5 else stop,
            )
            for kind, score in (("vm", 0.1), ("vm", 0.9), ("control", 0.1))
            for k in range(3 if score < 0.5 else 9)
        )
        made = audit(prompt=0, attack=9, control=0, check=GOOD, outcomes=outcomes)
        config = {"attack": {"futility": level}}
        changed = replace(made, provenance=replace(made.provenance, config=config))
        return replace(changed, flags=find_flags(changed, Circumstances()))

    assert "search_sequential" not in names(report(4, None))
    sequential = report(4, 0.1)
    (flag,) = (flag for flag in sequential.flags if flag.name == "search_sequential")
    assert "3 of 12 searches" in flag.text
    assert "3 of 3 for controls" in flag.text
    assert "about 10 %" in flag.text
    assert "loss_stands_still" not in names(sequential), "four steps are no room to fall"
    assert "loss_stands_still" in names(report(8, 0.1))


def test_units_of_a_search_that_was_scaled_are_told():
    counts = {"prompt": 0, "attack": 0, "control": 0}
    scaled = audit(**counts, check=replace(GOOD, response=0.5, scale=1 / 32))
    (flag,) = (flag for flag in scaled.flags if flag.name == "search_rescaled")
    # in other units than the published ones, only what was planted shows that they fit
    assert audit_findings(scaled).answer == "blind"
    found = replace(scaled, power=Power(4, 4, 4, (0.51, 1.0), 100))
    assert audit_findings(found).answer == "clear"
    assert "8.3 times as strongly" in flag.text
    assert "0.0312" in flag.text


@pytest.mark.parametrize(
    ("more", "flag"),
    [
        ({"detail": 0.3}, "controls_unlike"),
        ({"detail": 2.5}, "controls_unlike"),
        ({"detail": 0.8}, None),
        ({"learned": ("mirrored",)}, "alterations_learned"),
    ],
)
def test_controls_that_are_none_are_told(more, flag):
    told = names(audit(prompt=3, attack=3, control=0, **more))
    assert told & {"controls_unlike", "alterations_learned"} == ({flag} if flag else set())
