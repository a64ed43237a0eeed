import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from dori_lightning.types import InputError
from support.processes import PROGRAM, ended
from support.records import report_json, results, written
from support.runs import SMALL, on_tiny, run_task, write_pairs

AUDIT = (
    *SMALL, "utility=light", "report.images=full", "attack.budget.steps=3", "attack.snapshots=[1]",
    "attack.inits=[prompt,random]", "sampling.steps=3", "sampling.images_per_pair=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_task(folder, *on_tiny(material, *AUDIT), whole=True)
    return folder


def test_the_run_folder_holds_what_the_contract_names(finished):
    report = report_json(finished)
    conditions = {
        (c["attack"], c["init"], c["budget"]["steps"], c["kind"], c["n"]) for c in report["cells"]
    }
    assert conditions == {
        (attack, init, steps, kind, n)
        for attack, init, steps in (
            ("prompt", None, 0),
            ("dori", "prompt", 1),
            ("dori", "prompt", 3),
            ("dori", "random", 1),
            ("dori", "random", 3),
        )
        for kind, n in (("vm", 2), ("control", 3))
    }
    for cell in report["cells"]:
        assert {
            "checkpoint", "mitigation", "attack", "init", "budget", "kind", "n", "mr", "mr_ci95",
            "similarity", "descriptor", "threshold",
        } <= cell.keys()  # fmt: skip
        assert cell["mr_ci95"][0] <= cell["mr"] <= cell["mr_ci95"][1]
        assert cell["threshold"] == 0.5
    rows = pd.read_parquet(finished / "pairs.parquet")
    assert len(rows) == 5 * 5 * 2, "pairs x conditions x images"
    page = (finished / "report.html").read_text()
    assert page.count("data:image/") >= 10
    assert list((finished / "figures").glob("*.png"))
    assert report["utility"] is None, "nothing to compare with"
    assert not (finished / "utility.json").exists()
    assert 'id="cost"' not in page


def test_the_embeddings_are_kept_with_what_they_were_made_from(finished):
    with safe_open(
        finished / "attacks" / "random" / "pair1.r0.safetensors", framework="pt"
    ) as file:
        metadata = file.metadata()
        assert file.get_tensor("embeddings").shape == (2, 8, 12)
        assert file.get_tensor("losses").shape == (3,)
        assert file.get_tensor("snapshots").tolist() == [1, 3]
    assert metadata.keys() == {"checkpoint", "edit", "seed", "attack", "inputs", "parts"}


def test_golden_numbers_of_a_tiny_audit(finished):
    """Losses of the first attack steps on fixed random weights: a change of the method shows."""
    losses = []
    for name in ("pair0", "pair3"):
        path = finished / "attacks" / "prompt" / f"{name}.r0.safetensors"
        with safe_open(path, framework="np") as file:
            losses.append(file.get_tensor("losses"))
    assert np.allclose(losses, GOLDEN_LOSSES, rtol=1e-3), np.array2string(
        np.array(losses), precision=6
    )


GOLDEN_LOSSES = [[1.124319, 1.084437, 1.060386], [1.109535, 1.096017, 1.169250]]


def test_running_again_computes_nothing_and_changes_nothing(material, finished):
    before, times = results(finished), written(finished)
    run_task(finished, *on_tiny(material, *AUDIT))
    assert results(finished) == before
    assert times
    assert times == written(finished)


@pytest.mark.parametrize("width", [1, 3])  # the finished run has all in one
def test_batch_width_changes_no_bit(material, finished, tmp_path, width):
    widths = (f"attack.pairs_per_forward={width}", f"sampling.batch={width}")
    run_task(tmp_path / "narrow", *on_tiny(material, *AUDIT, *widths))
    assert results(tmp_path / "narrow") == results(finished)


def test_other_settings_in_the_same_folder_are_refused_by_name(material, finished):
    with pytest.raises(InputError, match=r"attack\.lr: 0\.1 there, 0\.2 now"):
        run_task(finished, *on_tiny(material, *AUDIT, "attack.lr=0.2"))


@pytest.mark.slow
def test_two_processes_find_what_one_finds(material, finished, tmp_path):
    done = ended(
        tmp_path, PROGRAM, "+experiment=audit", *on_tiny(material, *AUDIT),
        "attack.other_inits=null", f"paths.output={tmp_path}", "name=run",
        "trainer=ddp", "trainer.accelerator=cpu",
    )  # fmt: skip
    assert done.stdout.splitlines() == [str(tmp_path / "run")]
    assert results(tmp_path / "run") == results(finished)


def test_a_list_without_controls_is_audited_and_the_gap_is_said(material, tmp_path):
    pairs = write_pairs(tmp_path / "none", control=0)
    run_task(tmp_path / "run", *on_tiny(material, *AUDIT, f"pairs.path={pairs}"))
    report = report_json(tmp_path / "run")
    assert "no_controls" in {flag["name"] for flag in report["flags"]}
    assert {row["answer"] for row in report["images"]} <= {"no", "cannot_tell"}
