import json
import math
from pathlib import Path
from typing import Any

import pytest

from dori_lightning.report.comparison import Comparison, compare
from dori_lightning.report.record import read_run
from dori_lightning.types import Cell, InputError
from support.fake_audits import SETTINGS, write_audit, write_sweep
from support.fake_reports import PROMPT, dori


def comparison(folder: Path, *names: str, **more: Any) -> Comparison:
    chosen = [folder / name for name in names] or sorted(folder.iterdir())
    return compare([read_run(place) for place in chosen], **more)


def cell(found: Comparison, label: str, condition: Any, kind: str = "vm") -> Cell:
    (one,) = [
        c for c in found.cells if (c.mitigation, c.condition, c.kind) == (label, condition, kind)
    ]
    return one


BOTH = {PROMPT: {"vm": 0.9}, dori(): {"vm": 0.9}}


def test_a_run_is_read_back_as_it_was_written(tmp_path):
    lost = {PROMPT: {"vm": [0.9, 0.2, math.nan, 0.4]}, dori(10, norm="l2", eps=3.25): {"tm": 0.6}}
    run = read_run(write_audit(tmp_path / "x", "nemo", reproduced=lost))
    assert (run.checkpoint, run.mitigation, run.edit) == ("tiny", "nemo", None)
    assert run.report.calibration.threshold == 0.5
    by_id = {o.pair.id: o for o in run.report.outcomes if o.condition == PROMPT}
    assert by_id["vm0"].similarity["ncc"].tolist() == [0.9, 0.8]
    assert by_id["vm2"].status == "diverged"
    assert {o.condition for o in run.report.outcomes} == set(lost)


def test_one_threshold_for_all_rows_of_a_checkpoint(tmp_path):
    """A mitigation that spoils its own pictures moves its own threshold; the table's does not."""
    half = {PROMPT: {"vm": [0.9, 0.45, 0.45, 0.2]}}
    write_sweep(tmp_path, none={"threshold": 0.4}, wanda={"threshold": 0.8, "reproduced": half})
    found = comparison(tmp_path)
    assert {c.threshold for c in found.cells} == {0.4}
    assert cell(found, "wanda", PROMPT).hits == 3, "under its own threshold it is 1"
    (note,) = [text for text in found.notes if "one threshold" in text]
    assert "0.400 by ncc, calibrated on the run without mitigation" in note
    assert "by themselves the runs had 0.400 by ncc, 0.800 by ncc" in note


def test_the_table_counts_as_the_audit_counts(tmp_path):
    write_sweep(tmp_path, none={"reproduced": BOTH}, wanda={"reproduced": BOTH})
    found = comparison(tmp_path)
    for name in ("none", "wanda"):
        recorded = json.loads((tmp_path / name / "report.json").read_text())["cells"]
        assert [(c["hits"], c["n"], c["mr"]) for c in recorded] == [
            (c.hits, c.n, c.mr) for c in found.cells if c.mitigation == name
        ]


def test_diverged_pairs_are_no_evidence(tmp_path):
    write_sweep(
        tmp_path, none={}, wanda={"reproduced": {PROMPT: {"vm": [0.9, math.nan, 0.1, 0.1]}}}
    )
    found = comparison(tmp_path)
    assert (cell(found, "wanda", PROMPT).n, cell(found, "wanda", PROMPT).failed) == (3, 1)
    wanda = next(e for e in found.entries if e.label == "wanda")
    assert wanda.reproduced[PROMPT, "vm"] == {"vm0": True, "vm1": None, "vm2": False, "vm3": False}


def test_no_table_without_its_none_row(tmp_path):
    write_audit(tmp_path / "a", "none", checkpoint="tiny")
    write_audit(tmp_path / "b", "wanda", checkpoint="tiny")
    write_audit(tmp_path / "c", "wanda", checkpoint="other")
    with pytest.raises(InputError, match=r"without its none row.*other") as refused:
        comparison(tmp_path, unfinished=["mitigation=none (not finished or failed)"])
    assert "tiny" not in str(refused.value)
    assert "mitigation=none (not finished" in str(refused.value)
    assert "mitigation=none under the same settings" in str(refused.value)


def test_nothing_to_compare_is_said(tmp_path):
    with pytest.raises(InputError, match=r"no run has a result yet.*mitigation=none"):
        compare([], unfinished=["mitigation=none"])


def test_missing_cells_are_named(tmp_path):
    more = {**BOTH, dori(init="random"): {"vm": 0.9}}
    write_sweep(tmp_path, none={"reproduced": BOTH}, nemo={"reproduced": more}, esd={})
    found = comparison(tmp_path, unfinished=["siss"])
    assert found.unfinished == ("siss",)
    assert sorted(found.missing) == [
        "tiny, esd: attack from random embeddings, 50 steps, no radius limit (vm, tm, control)",
        "tiny, esd: attack from the image's own prompt, 50 steps, no radius limit "
        "(vm, tm, control)",
        "tiny, none: attack from random embeddings, 50 steps, no radius limit (vm, tm, control)",
    ]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"fingerprint": "0" * 16}, ["checkpoint 0000", "there ffff"]),
        ({"sizes": {"vm": 3, "tm": 1, "control": 3}}, ["lacks the pairs vm3"]),
        ({"sizes": {"vm": 4, "tm": 2, "control": 3}}, ["has the pairs tm1"]),
        ({"prompts": {"vm1": "another"}}, ["has other prompts or images for vm1"]),
        ({"config": {"sampling": {**SETTINGS["sampling"], "steps": 50}}},
         ["sampling.steps is 50, there 5"]),
        ({"config": {"attack": {**SETTINGS["attack"], "restarts": 3, "lr": 0.2}}},
         ["attack.restarts is 3, there 1", "attack.lr is 0.2, there 0.1"]),
        ({"config": {"seed": 1}}, ["seed is 1, there 0"]),
        ({"config": {"metrics": {**SETTINGS["metrics"], "descriptors": {"ncc": {"size": 9}}}}},
         ["metrics.descriptors.ncc.size is 9, there None"]),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused_by_name(tmp_path, arguments, parts):
    write_sweep(tmp_path, none={}, wanda=arguments)
    with pytest.raises(InputError, match="do not belong into one table") as refused:
        comparison(tmp_path)
    for part in ("wanda: ", *parts):
        assert part in str(refused.value)


def stopping(**more: Any) -> dict[str, Any]:
    attack = {**SETTINGS["attack"], "early_stop": True, "snapshots": [1, 10], **more}
    return {"config": {"attack": attack}}


@pytest.mark.parametrize(
    ("none", "wanda", "part"),
    [
        ({}, stopping(), "attack.early_stop is True, there False"),
        (stopping(), stopping(early_stop=False), "attack.early_stop is False, there True"),
        (stopping(), stopping(snapshots=[1]), "may stop after [1] steps, there after [1, 10]"),
        (stopping(), stopping(looks=[4]), "may stop after [1, 4, 10] steps, there after [1, 10]"),
        (stopping(), stopping(futility=0.05), "attack.futility is 0.05, there None"),
        (stopping(one_image=True), stopping(), "attack.one_image is None, there True"),
        ({**stopping(), "threshold": 0.4}, {**stopping(), "threshold": 0.8},
         "attacks were stopped by ncc above 0.800, there by ncc above 0.400"),
    ],
)  # fmt: skip
def test_attacks_stopped_in_another_way_are_not_counted_again(tmp_path, none, wanda, part):
    """A row that stopped under one threshold has no result under another."""
    write_sweep(tmp_path, none=none, wanda=wanda)
    with pytest.raises(InputError, match="do not belong into one table") as refused:
        comparison(tmp_path)
    assert part in str(refused.value)


def test_attacks_stopped_in_the_same_way_stand_in_one_table(tmp_path):
    write_sweep(tmp_path, none=stopping(), wanda=stopping())
    assert len(comparison(tmp_path).entries) == 2


def test_another_initial_point_budget_or_threshold_may_stand_in_one_table(tmp_path):
    attack = {**SETTINGS["attack"], "inits": ["random"], "budget": {"steps": 9}, "snapshots": [1]}
    descriptors = {"ncc": {"_target_": "x.NCC", "threshold": 0.9}, "ssim": {}}
    config = {"attack": attack, "metrics": {**SETTINGS["metrics"], "descriptors": descriptors}}
    write_sweep(tmp_path, none={}, wanda={"config": config})
    assert len(comparison(tmp_path).entries) == 2


def test_checkpoints_have_their_own_pairs_and_thresholds(tmp_path):
    for name, threshold, vm in (("small", 0.4, 2), ("large", 0.7, 4)):
        for mitigation in ("none", "wanda"):
            write_audit(
                tmp_path / f"{name}-{mitigation}", mitigation, checkpoint=name,
                threshold=threshold, fingerprint=name, sizes={"vm": vm, "control": 2},
            )  # fmt: skip
    found = comparison(tmp_path)
    assert [(e.checkpoint, e.label) for e in found.entries] == [
        ("large", "none"), ("large", "wanda"), ("small", "none"), ("small", "wanda"),
    ]  # fmt: skip
    assert {c.threshold for c in found.cells if c.checkpoint == "small"} == {0.4}
    assert not found.missing


def test_runs_of_a_grid_join_into_one_row(tmp_path):
    narrow, wide = dori(norm="l2", eps=1.5), dori()
    for mitigation in ("wanda", "none"):
        for name, condition in (("narrow", narrow), ("wide", wide)):
            write_audit(
                tmp_path / f"{mitigation}-{name}", mitigation,
                reproduced={PROMPT: {"vm": 0.9}, condition: {"vm": 0.9}},
                edit={"identity": "e", "key": "k", "made": name == "narrow"},
            )  # fmt: skip
    found = comparison(tmp_path, "wanda-narrow", "wanda-wide", "none-narrow", "none-wide")
    assert [e.label for e in found.entries] == ["none", "wanda"], "the baseline leads"
    assert {c.condition for c in found.cells} == {PROMPT, narrow, wide}
    assert not found.missing
    assert not [n for n in found.notes if "were asked in" in n]
    assert "Edits: 1 made, 1 read from the cache, 1 different ones." in found.notes


def test_repeated_prompts_that_differ_are_said_and_not_averaged(tmp_path):
    write_audit(tmp_path / "a", reproduced={PROMPT: {"vm": 0.9}, dori(10): {}})
    write_audit(tmp_path / "b", reproduced={PROMPT: {"vm": 0.2}, dori(20): {}})
    found = comparison(tmp_path)
    assert cell(found, "none", PROMPT).hits == 4
    assert any(
        "measured in a and in b, with similarities up to 0.7 apart" in n for n in found.notes
    )


def test_the_same_attack_twice_is_refused(tmp_path):
    for name in ("a", "b"):
        write_audit(tmp_path / name, reproduced=BOTH)
    with pytest.raises(InputError, match="two runs hold none, attack") as refused:
        comparison(tmp_path)
    assert str(tmp_path / "a") in str(refused.value)


def test_one_name_under_several_settings_makes_several_rows(tmp_path):
    write_audit(tmp_path / "none")
    for fraction in (0.01, 0.1):
        write_audit(tmp_path / f"w{fraction}", "wanda", settings={"fraction": fraction, "by": 1})
    labels = [e.label for e in comparison(tmp_path).entries]
    assert labels == ["none", "wanda[fraction=0.01]", "wanda[fraction=0.1]"]


def test_a_row_has_one_edit(tmp_path):
    write_audit(tmp_path / "none")
    for k, condition in enumerate((dori(10), dori(20))):
        write_audit(
            tmp_path / f"w{k}", "wanda", reproduced={PROMPT: {}, condition: {}},
            edit={"identity": f"edit {k}", "made": True},
        )  # fmt: skip
    with pytest.raises(InputError, match="the runs of wanda carry different edits"):
        comparison(tmp_path)


def test_files_of_different_audits_are_refused(tmp_path):
    write_audit(tmp_path / "a")
    write_audit(tmp_path / "b", reproduced={PROMPT: {"vm": 0.1}})
    (tmp_path / "a" / "pairs.parquet").write_bytes((tmp_path / "b" / "pairs.parquet").read_bytes())
    with pytest.raises(InputError, match="do not say the same"):
        read_run(tmp_path / "a")


@pytest.mark.parametrize(("name", "part"), [("pairs.parquet", "cannot be read"),
                                            ("edit.json", "Invalid JSON")])  # fmt: skip
def test_damaged_files_are_named(tmp_path, name, part):
    write_audit(tmp_path)
    (tmp_path / name).write_text("no")
    with pytest.raises(InputError, match=part) as refused:
        read_run(tmp_path)
    assert name in str(refused.value)
