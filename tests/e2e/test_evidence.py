"""Audits with altered copies as controls and with a model that never saw the images."""

import shutil
import weakref

import pytest

from dori_lightning.audit import evaluation
from dori_lightning.metrics.calibration import calibrate_measures
from dori_lightning.models.generation import load_images
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.pairs.validation import image_tensor, square_image
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
        "reference.resolution=48",
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
    texts = {flag["name"]: flag["text"] for flag in report["flags"]}
    assert "images of 48 pixels a side, this model of 32" in texts["reference_resolution"]
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Image by image" in page
    assert "the closest image of unseen" in page


def shown_again(place, *_):
    """Images as they were generated, but of the first suspect the original itself."""
    images = load_images(place, *_)
    if place.name != "pair0":
        return images
    listed = place.parents[3] / "bare"
    return image_tensor(square_image(listed / "0.png"), images.shape[-1])[None]


def without_loss(references, prompted, **given):
    """The calibration of a perfect autoencoder; that of random weights keeps nothing."""
    return calibrate_measures(
        references, prompted, **{**given, "reconstructions": references.images}
    )


def test_a_bare_list_of_suspects_is_audited_by_its_own_copies(material, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    shutil.copytree(material / "pairs", bare)
    lines = (bare / "metadata.csv").read_text().splitlines()[1:3]
    rows = [line.replace(",vm,", ",") for line in lines]
    (bare / "metadata.csv").write_text("\n".join(["id,file_name,prompt", *rows]) + "\n")
    monkeypatch.setattr(evaluation, "load_images", shown_again)
    monkeypatch.setattr(evaluation, "calibrate_measures", without_loss)
    of_the_list = on_tiny(material, *SMALL, f"pairs.path={bare}", "pairs.self_controls=auto")
    run_task(tmp_path / "run", *of_the_list)
    report = report_json(tmp_path / "run")
    assert "no_controls" not in {flag["name"] for flag in report["flags"]}
    answers = {row["id"]: (row["answer"], row["reason"]) for row in report["images"]}
    # random weights do not denoise, so that nothing came back says nothing
    assert answers == {"pair0": ("yes", "copy_few_nulls"), "pair1": ("cannot_tell", "not_seen")}
    assert report["images"][0]["p_image"] == pytest.approx(1 / 5)
    unseen = {row["id"]: row["group"] for row in report["unseen"]}
    assert unseen == {
        f"pair{k}.{how}": "altered_copy" for k in (0, 1) for how in ("mirrored", "turned")
    }
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "With 4 attacked images that the model cannot hold" in page

    # a model that was trained on mirrored images, too: these copies are in no count
    monkeypatch.setattr(evaluation, "learned_alterations", lambda *_: ("mirrored",))
    run_task(tmp_path / "run", *of_the_list)
    report = report_json(tmp_path / "run")
    assert {row["id"] for row in report["unseen"]} == {"pair0.turned", "pair1.turned"}
    assert {cell["n"] for cell in report["cells"] if cell["kind"] == "control"} == {2}
    (said,) = (f["text"] for f in report["flags"] if f["name"] == "alterations_learned")
    assert said.startswith("Mirrored copies of the suspects come back")


@pytest.fixture
def nothing_runs(monkeypatch):
    """What is refused is refused before an attack."""
    monkeypatch.setattr(
        "dori_lightning.tasks.audit.attack_and_generate", lambda *_, **__: pytest.fail("attacked")
    )


def test_a_checkpoint_is_no_reference_for_itself(material, tmp_path, monkeypatch, nothing_runs):
    models = []

    def load(**settings):
        assert not any(model() for model in models), "two models in memory"
        model = load_checkpoint(**settings)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr("dori_lightning.models.loading.load_checkpoint", load)
    same = shutil.copytree(material / "checkpoint", tmp_path / "elsewhere")
    overrides = on_tiny(material, *SMALL, *reference(same))
    with pytest.raises(InputError, match=r"is the checkpoint under audit itself[\s\S]*reference"):
        run_task(tmp_path / "run", *overrides)
    assert len(models) == 2
    assert not (tmp_path / "run" / "method.json").exists(), "the folder is not claimed"


def test_a_rate_that_the_list_cannot_support_is_refused(material, tmp_path, nothing_runs):
    overrides = on_tiny(material, *SMALL, "evidence.false_discovery_rate=0.05")
    with pytest.raises(InputError, match=r"at least 19 .* this audit has 3"):
        run_task(tmp_path / "run", *overrides)


@pytest.mark.parametrize(
    ("kind", "message"), [("vm", "0.png of the positive controls is the image of pair0"),
                          ("control", "has no image of kind vm to plant"),
                          ("", r"positive controls \(power\.images\): .* has neither a metadata")],
)  # fmt: skip
def test_positive_controls_are_checked_before_a_model_is_loaded(
    material, tmp_path, monkeypatch, kind, message
):
    monkeypatch.setattr(
        "dori_lightning.models.loading.load_checkpoint", lambda **_: pytest.fail("loaded")
    )
    given = tmp_path / "given"
    given.mkdir()
    shutil.copy(material / "pairs" / "0.png", given)
    if kind:
        (given / "metadata.csv").write_text(f"file_name,kind,prompt\n0.png,{kind},a boat\n")
    overrides = on_tiny(material, *SMALL, "power=planted", f"power.images={given}")
    with pytest.raises(InputError, match=message):
        run_task(tmp_path / "run", *overrides)


def test_no_alteration_of_that_name(material, tmp_path):
    overrides = on_tiny(material, *SMALL, "pairs.self_controls=[flipped]")
    with pytest.raises(InputError, match=r"pairs\.self_controls must be auto or some of"):
        run_task(tmp_path / "run", *overrides)
