"""What a mitigation costs, through the whole task."""

import json

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dori_lightning import config
from support.records import report_json
from support.runs import run_task, write_pairs
from support.tiny import write_tiny

SMALL = (
    "pairs=folder",
    "corpus=folder",
    "attack.budget.steps=1",
    "attack.snapshots=[]",
    "attack.noise_batch=2",
    "attack.inits=[prompt]",
    "sampling.steps=2",
    "sampling.images_per_pair=1",
    "checkpoint.name=tiny",
    "checkpoint.device=cpu",
    "trainer=cpu",
    "metrics.descriptors.local_correlation.threshold=0.5",
)
SIZES = ("utility.examples=3", "utility.draws=1", "utility.prompts=4", "utility.neighbours=1")
PRUNING = ("mitigation=wanda_10", "mitigation.steps=2", "mitigation.base_prompts=4")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    place = tmp_path_factory.mktemp("material")
    write_tiny(place / "checkpoint")
    write_pairs(place / "pairs")
    write_pairs(place / "corpus", vm=0, control=40)
    return place


def overrides(material, *more):
    return (
        *SMALL,
        f"pairs.path={material / 'pairs'}",
        f"corpus.path={material / 'corpus'}",
        f"checkpoint.source={material / 'checkpoint'}",
        *more,
    )


@pytest.fixture(scope="module")
def pruned(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "pruned"
    run_task(folder, *overrides(material, *PRUNING, *SIZES))
    return folder


def test_the_run_folder_says_what_the_mitigation_costs(pruned):
    found = report_json(pruned)["utility"]
    assert found == json.loads((pruned / "utility.json").read_text())
    loss = found["denoising_loss"]
    assert loss["examples"] == 3
    assert loss["ratio_ci95"][0] <= loss["ratio"] <= loss["ratio_ci95"][1]
    assert loss["ratio"] == pytest.approx(loss["mitigated"] / loss["unmitigated"])
    assert loss["ratio"] != 1.0
    assert found["prompts"] == 4
    assert found["kid"]["features"] == "autoencoder, 40 features"
    assert found["neighbours"]["replicating"]["prompts"] == 2
    assert found["left_out"].keys() == {
        "fid", "alignment", "neighbours.kid", "neighbours.fid", "neighbours.alignment",
    }  # fmt: skip
    assert len(list((pruned / "pictures" / "utility").rglob("*.png"))) == 4 + 2
    rows = pd.read_parquet(pruned / "utility_pictures.parquet")
    assert len(rows) == 4 + 2
    page = (pruned / "report.html").read_text()
    assert 'id="cost"' in page
    assert "With the mitigation: " in page


def test_an_audit_of_what_was_never_memorized_is_invalid_wherever_it_is_shown(
    material, pruned, capsys
):
    """Random weights hold no picture: that none comes back under a mitigation is no success."""
    document = report_json(pruned)
    assert document["invalid"] == ["baseline_not_memorized"]
    assert document["verdict"].startswith("INVALID AUDIT")
    assert json.loads((pruned / "edit.json").read_text())["changed_weights"] > 0
    page = (pruned / "report.html").read_text()
    assert "Verdict: this audit is invalid" in page
    assert "Verdict: nothing came back" not in page
    assert run_task(pruned, *overrides(material, *PRUNING, *SIZES)) is None, "no rate to minimise"
    assert "INVALID AUDIT: baseline_not_memorized" in capsys.readouterr().err


def test_more_is_measured_in_the_same_folder(material, pruned):
    attacks = {p: p.stat().st_mtime_ns for p in pruned.glob("attacks/**/*.safetensors")}
    more = (*SIZES[:-1], "utility.examples=4", "utility.neighbours=0")
    run_task(pruned, *overrides(material, *PRUNING, *more))
    found = report_json(pruned)["utility"]
    assert found["denoising_loss"]["examples"] == 4
    assert found["neighbours"] is None
    assert "utility.neighbours=0" in found["left_out"]["neighbours"]
    assert attacks
    assert attacks == {p: p.stat().st_mtime_ns for p in attacks}, "attacks are not run again"


def test_every_size_composes_and_none_asks_for_nothing():
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        sizes = {
            name: instantiate(compose("config", [f"utility={name}"]).utility)
            for name in config.groups()["utility"]
            if name != "inception"
        }
    assert sizes.keys() == {"none", "light", "full"}
    assert not sizes["none"].asked
    assert 0 < sizes["light"].prompts < sizes["full"].prompts
