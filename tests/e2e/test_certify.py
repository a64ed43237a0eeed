"""A model certified end to end, on tiny random weights: nothing comes back or crashes."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from hydra.errors import InstantiationException

from dori_lightning.certify import cascade
from dori_lightning.certify.base import AttackBase, Plan
from dori_lightning.types import InputError, Pair
from support.runs import SMALL, on_tiny, run_task
from support.tiny import write_tiny

CERTIFY = (
    "task=certify", "certify=certify_1", "attack.early_stop=true", "attack.looks=[1]",
    "certify.attacks.completion.shares=[0.9]", "certify.attacks.completion.steps=4",
    "certify.attacks.completion.images=1",
)  # fmt: skip
PATHS = "certify.paths=[prompts,completion,dori]"


def certificate(folder):
    return json.loads((folder / "certificate.json").read_text("utf-8"))


def overrides(material, other, *more):
    reference = ("reference=checkpoint", f"reference.source={other}", "reference.name=unseen")
    return on_tiny(material, *SMALL, *CERTIFY, *reference, *more)


def not_called(*_: Any, **__: Any) -> None:
    raise AssertionError("something was loaded, or run again")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("other") / "other", seed=1)


@pytest.fixture(scope="module")
def finished(material, other, tmp_path_factory):
    folder = tmp_path_factory.mktemp("certify") / "run"
    work = run_task(folder, *overrides(material, other, PATHS))
    return folder, work


def test_every_attack_is_tried_on_suspects_controls_and_reference(finished):
    folder, work = finished
    found = certificate(folder)
    assert found["protocol"] == "certify-1"
    assert [own["attack"] for own in found["attacks"]] == ["prompts", "completion", "dori"]
    for own in found["attacks"]:
        assert {(one["role"], one["pair"]) for one in own["tried"]} == {
            *(("audited", f"pair{k}") for k in range(5)),
            *(("reference", f"pair{k}") for k in range(2)),
        }
    # prompts: an image of 2 guided steps; completion: 3 of 4 steps from the noised image, all 4
    # for half of it, without and with the prompt; dori: 2 steps of 2 rows, an image at 2 looks
    rows = [max(one["spent"] for one in own["tried"]) for own in found["attacks"]]
    assert rows == [4, 3 * 3 + 4 * 3, 2 * 2 + 2 * 4]
    assert work == sum(rows)
    assert found["answer"] in ("unchecked", "held")
    assert len(found["traces"]) == 2


def test_the_page_says_what_was_found(finished):
    page = (finished[0] / "certificate.html").read_text("utf-8")
    assert "None of 2\u00a0suspected images came back" in page.replace("2 susp", "2\u00a0susp")
    for words in ("completion", "a part of the image", "unseen", "power=none"):
        assert words in page
    assert "{{" not in page


def test_a_finished_certificate_is_read_again(finished, material, other, monkeypatch):
    folder, _ = finished
    before = certificate(folder)

    monkeypatch.setattr(cascade, "Recorder", not_called)
    run_task(folder, *overrides(material, other, PATHS))
    again = certificate(folder)
    assert again["attacks"] == before["attacks"]


@dataclass(frozen=True)
class Toy(AttackBase):
    """Draws the image itself: whoever has it needs no model."""

    name: str = "toy"

    def rows(self, plan: Plan) -> int:
        return 1

    def run(self, subject: Any, pairs: Sequence[Pair], attempt: Any) -> None:
        for level in ("nothing", "everything"):
            left = attempt.left(level)
            references = subject.context.references
            images = {
                pair.id: references.images[references.places[pair.id]][None] for pair in left
            }
            if level == "nothing":
                images = {name: 1 - own for name, own in images.items()}
            attempt.add(level, images, rows=1)


def test_an_attack_is_one_python_file_and_one_yaml_file(material, other, tmp_path, monkeypatch):
    """And one that paints whatever it likes decides nothing."""
    module = ModuleType("dori_lightning.certify.toy")
    module.Toy = Toy
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Toy, "__module__", module.__name__)
    mine = tmp_path / "mine" / "attack"
    mine.mkdir(parents=True)
    (mine / "toy.yaml").write_text("_target_: dori_lightning.certify.toy.Toy\nname: toy\n")
    run_task(
        tmp_path / "run",
        *overrides(material, other),
        f"hydra.searchpath=[file://{mine.parent}]",
        "+attack@certify.attacks.toy=toy",
        "certify.paths=[toy]",
    )
    (toy,) = certificate(tmp_path / "run")["attacks"]
    assert [(level["name"], level["sound"]) for level in toy["levels"]] == [
        ("nothing", True), ("everything", False),
    ]  # fmt: skip
    assert toy["convicted"] == []
    back = [one for one in toy["tried"] if one["back_at"] is not None]
    assert {one["kind"] for one in back} == {"control"}, "what is not sound is not tried again"
    assert len(back) == 3


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("certify.paths=[prompts,prompts]", "twice"),
        ("certify.paths=[dor]", "no attack dor"),
        ("certify.attacks.completion.shares=[0.5,0.9]", "must fall"),
    ],
)
def test_what_is_no_cascade_is_refused_before_anything_is_loaded(
    material, other, tmp_path, monkeypatch, wrong, words
):
    monkeypatch.setattr("dori_lightning.tasks.certify.set_up", not_called)
    # Hydra wraps what a constructor raises; the command line unwraps it
    with pytest.raises((InputError, InstantiationException), match=words):
        run_task(tmp_path / "run", *overrides(material, other, PATHS, wrong))


def test_a_certificate_without_attacks_is_refused(material, tmp_path, monkeypatch):
    monkeypatch.setattr("dori_lightning.tasks.certify.set_up", not_called)
    with pytest.raises(InputError, match="has no attacks"):
        run_task(tmp_path / "run", *on_tiny(material, "task=certify"))


def test_an_audit_refuses_what_is_no_search(material, tmp_path):
    with pytest.raises(InputError, match=r"certify\.paths=\[completion\]"):
        run_task(tmp_path / "run", *on_tiny(material), "attack=completion")


def test_certificates_are_ranked_by_the_work_that_they_withstand(finished, tmp_path, capsys):
    folder, _ = finished
    run_task(tmp_path / "table", "task=report", f"task.runs={folder}")
    table = (tmp_path / "table" / "ranking.md").read_text("utf-8")
    header, _, row = [line for line in table.splitlines() if line.startswith("|")]
    for name in ("mitigation", "prompts", "completion", "dori", "first back"):
        assert name in header
    assert "none" in row
    assert "0/2" in row
    said = capsys.readouterr()
    assert "certificate.html" in said.out + said.err
