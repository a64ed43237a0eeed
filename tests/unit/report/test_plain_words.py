from types import SimpleNamespace

import pytest

from dori_lightning.report.verdict import plain_verdict


def said(fakes: SimpleNamespace, *hits: int | None, mitigation: str = "none") -> str:
    """Verdict on 16 images (prompt, attack) and 20 controls (attack); None was not measured."""
    prompt, attack, control = hits
    cells = [
        fakes.cell("vm", fakes.PROMPT, prompt, 16, mitigation=mitigation),
        *([fakes.cell("vm", fakes.dori(), attack, 16, mitigation=mitigation)]
          if attack is not None else []),
        *([fakes.cell("control", fakes.dori(), control, 20, mitigation=mitigation)]
          if control is not None else []),
        *([fakes.cell("vm", fakes.PROMPT, 16, 16)] if mitigation != "none" else []),
    ]  # fmt: skip
    return plain_verdict(cells, mitigation=mitigation)


@pytest.mark.parametrize(
    ("hits", "mitigation", "parts"),
    [
        ((16, 16, 0), "none", ["draws all of them", "succeeds for all of them", "brings back none",
                               "whoever has it can get copies out"]),
        ((2, 12, 0), "siss", ["Before the mitigation their captions brought back all of them",
                              "now draws 2 of them", "succeeds for 12 of them",
                              "hides images from their captions and leaves them in the model"]),
        ((2, 12, 0), "none", ["holds images that their captions do not show"]),
        ((0, 0, 0), "esd", ["no proof of absence", "up to 19 %"]),
        ((0, 16, 5), "none", ["brings back 5", "proves nothing here"]),
        ((0, 16, None), "none", ["unchecked", "no proof of absence"]),
        ((3, None, None), "none", ["Nobody searched", "can get copies out"]),
    ],
)  # fmt: skip
def test_every_case_has_its_sentence(
    fakes: SimpleNamespace, hits: tuple[int | None, ...], mitigation: str, parts: list[str]
) -> None:
    text = said(fakes, *hits, mitigation=mitigation)
    for part in ["The list names 16 images", *parts]:
        assert part in text
    for word in ("embedding", "MR", "Wilson", "vm"):
        assert word not in text


def test_nothing_measured_is_said(fakes: SimpleNamespace) -> None:
    cells = [fakes.cell("control", fakes.PROMPT, 0, 4)]
    assert "cannot say what is memorized" in plain_verdict(cells, mitigation="none")
