from typing import Any

import pytest

from dori_lightning.report.findings import audit_verdict
from dori_lightning.report.record import AuditReport
from dori_lightning.report.words import interval_words, percent_words
from support import fake_reports as fakes


def audit(
    prompt: int | None,
    attack: int | None,
    control: int | None,
    mitigation: str = "none",
    **more: Any,
) -> AuditReport:
    """16 suspected images and 20 attacked controls; None was not measured."""
    counts = {("vm", fakes.PROMPT): prompt, ("vm", fakes.dori()): attack}
    cells = [
        *(fakes.cell(*key, hits, 16, mitigation=mitigation)
          for key, hits in counts.items() if hits is not None),
        *([fakes.cell("control", fakes.dori(), control, 20, mitigation=mitigation)]
          if control is not None else []),
        *([fakes.cell("vm", fakes.PROMPT, 16, 16)] if mitigation != "none" else []),
    ]  # fmt: skip
    return fakes.measured(cells, mitigation=mitigation, **more)


CASES: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "found": (
        (16, 16, 0),
        ["draws all of them", "succeeds for all of them", "brings back none",
         "whoever has it can get copies out"],
    ),
    "hidden by a mitigation": (
        (2, 12, 0, "siss"),
        ["Before the mitigation their captions brought back all of them", "now draws 2 of them",
         "succeeds for 12 of them", "hides images from their captions"],
    ),
    "hidden": ((2, 12, 0), ["holds images that their captions do not show"]),
    "clear": ((0, 0, 0, "esd"), ["no proof of absence", "up to 19 %"]),
    "paints": ((0, 16, 5), ["brings back 5", "proves nothing here", "no reliable answer"]),
    "unchecked": ((0, 16, None), ["unchecked", "no reliable answer"]),
    "nothing, unchecked": ((0, 0, None), ["unchecked", "no proof of absence"]),
    "unreliable": ((None, 16, None), ["unchecked", "no reliable answer"]),
    "no attack": ((3, None, None), ["Nobody searched", "can get copies out"]),
    "nothing measured": ((None, None, 0), ["cannot say what is memorized"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_answer_is_said_in_plain_words_first(case):
    arguments, parts = CASES[case]
    report = audit(*arguments)
    verdict = audit_verdict(report)
    for part in parts:
        assert part in verdict.plain
    for word in ("embedding", "MR", "Wilson", "vm"):
        assert word not in verdict.plain
    assert report.verdict == f"{verdict.plain} {verdict.numbers}"
    assert verdict.answer.endswith(".")
    for text in (verdict.answer, report.verdict):
        assert not {"  ", " .", " ,", "{", "None,"} & {text[k : k + 2] for k in range(len(text))}


def test_numbers_follow_with_their_intervals():
    cells = [
        fakes.cell("vm", fakes.PROMPT, 19, 20),
        fakes.cell("vm", fakes.dori(), 5, 19, failed=1),
        fakes.cell("vm", fakes.dori(50, "random"), 4, 20),
        fakes.cell("tm", fakes.PROMPT, 2, 4),
        fakes.cell("control", fakes.PROMPT, 6, 30),
        fakes.cell("control", fakes.dori(), 0, 30),
    ]
    numbers = audit_verdict(fakes.measured(cells)).numbers
    for part in (
        "19 of 20 suspected images (95 %; 95 % interval 76 to 99.1 %)",
        "5 of 19 suspected images",
        "1 more failed and counts neither",
        "Started from random embeddings instead, it is 4 of 20.",
        "30 control images that the model should not hold: none came back",
        "From control prompts, 6 of 30",
        "Of the suspected template copies, 2 of 4 from their prompts came back",
    ):
        assert part in numbers


def test_failed_attacks_are_no_result():
    cells = [
        fakes.cell("vm", fakes.PROMPT, 0, 20),
        fakes.cell("vm", fakes.dori(), 0, 0, failed=20),
        fakes.cell("control", fakes.dori(), 0, 30),
    ]
    verdict = audit_verdict(fakes.measured(cells))
    assert "no suspected image gave a usable result (20 runs failed)" in verdict.numbers
    assert "gave no result" in verdict.plain


def test_an_invalid_audit_is_nowhere_reported_as_safety():
    report = audit(0, 0, 0, "esd", inert=True)
    verdict = audit_verdict(report)
    assert verdict.tone == "invalid"
    assert report.verdict.startswith("INVALID AUDIT: what did not come back says nothing.")
    assert "changes no weight" in report.verdict
    assert verdict.answer.startswith("This audit is invalid: none of 16 suspected images")
    assert "may be in the model all the same" in verdict.plain
    assert "no proof of absence" not in report.verdict


@pytest.mark.parametrize(
    ("rate", "words"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.996, "99.6 %"), (0.004, "0.4 %"), (0.5, "50 %")],
)
def test_percent_words(rate, words):
    assert percent_words(rate) == words
    assert percent_words(float("nan")) == "n/a"
    assert interval_words((0.1, 0.2)) == "10 to 20 %"
