"""A checkpoint with a LoRA is audited, told from its base, and exported as one plain model."""

import pytest
from safetensors.torch import load_file

from dori_lightning.audit import evaluation
from dori_lightning.metrics.calibration import calibrate_measures
from dori_lightning.models.generation import load_images
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.report import findings
from dori_lightning.types import InputError
from support.loras import write_lora
from support.records import report_json
from support.runs import SMALL, on_tiny, run_task
from support.tiny import load_tiny, write_tiny

pytest.importorskip("peft", reason="peft, of the extra 'lora', is not installed")


@pytest.fixture(scope="module")
def lora(material, tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "knots.safetensors"
    write_lora(path, load_tiny(str(material / "checkpoint")), "sd-scripts")
    return path


@pytest.fixture(scope="module")
def chosen(material, lora):
    return on_tiny(material, *SMALL, f"checkpoint.lora=[{{path:{lora},scale:0.5}}]", "corpus=none")


@pytest.fixture(scope="module")
def held(material):
    """Both models reproduce pair1, the one with the LoRA pair0 too; no model is damaged."""

    def shown(place, seeds):
        images = load_images(place, seeds)
        tuned = "tuned" in place.parts and not {"base", "reference"} & {*place.parts}
        if "pictures" not in place.parts or "reference" in place.parts:
            return images
        if place.name == "pair1" or (place.name == "pair0" and tuned):
            listed = material / "pairs" / f"{place.name[-1]}.png"
            return image_tensor(square_image(listed), images.shape[-1])[None]
        return images

    def of_a_perfect_autoencoder(references, prompted, **given):
        given["reconstructions"] = references.images
        return calibrate_measures(references, prompted, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_images", shown)
        patch.setattr(evaluation, "calibrate_measures", of_a_perfect_autoencoder)
        patch.setattr(findings, "could_not_see", lambda report: False)
        yield


@pytest.fixture(scope="module")
def finished(material, chosen, held, tmp_path_factory):
    """An audit with a LoRA, whose base and a reference are attacked, too."""
    place = tmp_path_factory.mktemp("audit")
    other = write_tiny(place / "other", seed=1)
    run_task(
        place / "tuned", *chosen, "reference=checkpoint", f"reference.source={other}",
        "reference.name=unseen",
    )  # fmt: skip
    return place / "tuned"


def test_each_image_is_from_the_base_or_from_the_fine_tuning(finished):
    report = report_json(finished)
    answers = [[row["answer"] for row in own["images"]] for own in (report, report["base"])]
    assert answers == [["yes", "yes"], ["no", "yes"]]
    assert report["base"]["origins"] == {"pair0": "tuning", "pair1": "base"}
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "<td>came with the fine-tuning</td>" in page
    assert "<td>held by the base already</td>" in page


def test_the_base_is_attacked_as_an_audit_of_it_would(material, finished, tmp_path):
    run_task(tmp_path / "plain", *on_tiny(material, *SMALL, "corpus=none"))
    plain, report = report_json(tmp_path / "plain"), report_json(finished)
    base = report["base"]
    assert base["checkpoint"] == "tiny without LoRA"
    assert base["fingerprint"] == plain["provenance"]["fingerprint"]
    assert base["fingerprint"] != report["provenance"]["fingerprint"]
    assert [{**cell, "checkpoint": "tiny"} for cell in base["cells"]] == plain["cells"]
    assert report["cells"] != plain["cells"]
    assert plain["base"] is None


def test_the_base_is_in_no_p_value(finished):
    report = report_json(finished)
    groups = [row["group"] for row in report["unseen"]]
    assert (groups.count("control"), groups.count("reference")) == (3, 5)
    assert len(groups) == 3 + 5
    assert {cell["checkpoint"] for cell in report["reference_model"]} == {"unseen"}


def test_record_and_page_say_what_was_added(finished, lora):
    (found,) = report_json(finished)["provenance"]["loras"]
    assert (found["source"], found["scale"]) == ("knots.safetensors", 0.5)
    assert set(found["layers"]) == {"unet", "text_encoder"}
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "with LoRA knots.safetensors at scale 0.5" in page
    assert found["sha256"] in page
    assert "tiny without LoRA, which it was tuned from, was tested in the same way" in page
    assert '<th scope="col">from where</th>' in page


def test_a_run_of_another_lora_or_scale_is_another_run(material, chosen, finished, lora):
    for other in (f"checkpoint.lora={lora}", "checkpoint.lora=null"):
        with pytest.raises(InputError, match="holds results of other settings"):
            run_task(finished, *on_tiny(material, *SMALL, "corpus=none"), other)


def test_a_base_is_another_checkpoint(material, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dori_lightning.tasks.audit.attack_and_generate", lambda *_, **__: pytest.fail("attacked")
    )
    same = f"checkpoint.base={material / 'checkpoint'}"
    with pytest.raises(InputError, match=r"itself[\s\S]*checkpoint\.base=none"):
        run_task(tmp_path / "run", *on_tiny(material, *SMALL, "corpus=none", same))
    assert not (tmp_path / "run" / "method.json").exists(), "the folder is not claimed"


def test_the_exported_checkpoint_holds_the_sum(material, lora, chosen, tmp_path):
    run_task(
        tmp_path / "export", "task=export", "task.formats=diffusers", "mitigation=none",
        "task.dtype=fp32", *(own for own in chosen if own not in SMALL),
    )  # fmt: skip
    folder = tmp_path / "export" / "diffusers"
    again = load_checkpoint(name="again", source=str(folder), device="cpu")
    fused = load_checkpoint(
        name="tiny",
        source=str(material / "checkpoint"),
        lora=[{"path": str(lora), "scale": 0.5}],
        device="cpu",
    )
    assert again.fingerprint == fused.fingerprint
    names = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "its weights with a LoRA added at scale 0.5 (changed layers:" in card
    assert "knots" not in card, "a name may tell whose image it is"
    assert "'checkpoint.lora=[{path:FILE,scale:0.5}]'" in card
