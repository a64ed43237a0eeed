"""What a mitigation costs, through the whole task."""

import json

import pandas as pd
import pytest
from hydra.utils import instantiate

from dori_lightning import config
from support.records import report_json, written
from support.runs import SMALL, configuration, on_tiny, run_task, write_pairs

AUDIT = (*SMALL, "corpus=folder", "utility=light", "report.images=full", "attack.budget.steps=1")
SIZES = ("utility.examples=3", "utility.draws=1", "utility.prompts=4", "utility.neighbours=1")
PRUNING = ("mitigation=wanda_10", "mitigation.steps=2")


@pytest.fixture(scope="module")
def audit(material, tmp_path_factory):
    """Audits in the same folder: ``audit(overrides) -> (folder, rate)``."""
    place = tmp_path_factory.mktemp("runs")
    corpus = write_pairs(place / "corpus", vm=0, control=40)

    def run(*more):
        chosen = (*AUDIT, f"corpus.path={corpus}", *PRUNING, *SIZES, *more)
        return place / "pruned", run_task(place / "pruned", *on_tiny(material, *chosen))

    return run


@pytest.fixture(scope="module")
def pruned(audit):
    return audit()[0]


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
    audit, pruned, capsys
):
    """Random weights hold no image: that none comes back under a mitigation is no success."""
    document = report_json(pruned)
    assert document["invalid"] == ["baseline_not_memorized"]
    assert document["verdict"].startswith("INVALID AUDIT")
    assert json.loads((pruned / "edit.json").read_text())["changed_weights"] > 0
    page = (pruned / "report.html").read_text()
    assert "Verdict: this audit is invalid" in page
    assert "Verdict: nothing came back" not in page
    assert audit()[1] is None, "no rate to minimise"
    assert "INVALID AUDIT: baseline_not_memorized" in capsys.readouterr().err


def test_more_is_measured_in_the_same_folder(audit, pruned):
    attacks = written(pruned)
    audit("utility.examples=4", "utility.neighbours=0")
    found = report_json(pruned)["utility"]
    assert found["denoising_loss"]["examples"] == 4
    assert found["neighbours"] is None
    assert "utility.neighbours=0" in found["left_out"]["neighbours"]
    assert attacks
    assert attacks == written(pruned), "attacks are not run again"


def test_every_size_composes_and_none_asks_for_nothing():
    sizes = {
        name: instantiate(configuration(f"utility={name}").utility)
        for name in config.groups()["utility"]
        if name != "inception"
    }
    assert sizes.keys() == {"none", "light", "full"}
    assert not sizes["none"].asked
    assert 0 < sizes["light"].prompts < sizes["full"].prompts
