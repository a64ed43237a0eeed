"""Audits with altered copies as controls and with a model that never saw the images."""

import pytest

from dori_lightning.types import InputError
from support.records import report_json
from support.runs import SMALL, on_tiny, run_task
from support.tiny import write_tiny


def reference(folder):
    return ("reference=checkpoint", f"reference.source={folder}", "reference.name=unseen")


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    place = tmp_path_factory.mktemp("evidence")
    other = write_tiny(place / "other", seed=1)
    overrides = on_tiny(
        material,
        *SMALL,
        *reference(other),
        "pairs.self_controls=[mirrored]",
        "evidence.losses=true",
    )
    run_task(place / "run", *overrides)
    return place / "run"


def test_copies_are_attacked_as_controls(finished):
    cells = {(c["attack"], c["kind"]): c["n"] for c in report_json(finished)["cells"]}
    assert cells["dori", "vm"] == 2
    assert cells["dori", "control"] == 3 + 2, "three listed, and one of each suspect"


def test_the_reference_has_rows_of_its_own_and_a_place_in_each_images_row(finished):
    report = report_json(finished)
    own = {(c["attack"], c["kind"], c["n"]) for c in report["cells"]}
    there = {(c["attack"], c["kind"], c["n"]) for c in report["reference_model"]}
    assert there == own
    assert {c["checkpoint"] for c in report["reference_model"]} == {"unseen"}
    assert {c["checkpoint"] for c in report["cells"]} == {"tiny"}
    assert [row["id"] for row in report["images"]] == ["pair0", "pair1"]
    for row in report["images"]:
        assert row["answer"] in ("yes", "no", "dormant", "cannot_tell")
        assert row["loss_ratio"] > 0
        assert 0 < row["p_loss"] <= 1
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Image by image" in page
    assert "the closest image of unseen" in page


def test_a_checkpoint_is_no_reference_for_itself(material, tmp_path):
    overrides = on_tiny(material, *SMALL, *reference(material / "checkpoint"))
    with pytest.raises(InputError, match=r"is the checkpoint under audit itself[\s\S]*reference"):
        run_task(tmp_path / "run", *overrides)


def test_no_alteration_of_that_name(material, tmp_path):
    overrides = on_tiny(material, *SMALL, "pairs.self_controls=[flipped]")
    with pytest.raises(InputError, match=r"pairs\.self_controls must be auto or some of"):
        run_task(tmp_path / "run", *overrides)
