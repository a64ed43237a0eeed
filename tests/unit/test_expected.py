"""Recorded claims: those of the experiments are well formed, and malformed ones are seen."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dori_lightning.report.claims import METRICS, check_claims, read_claims
from dori_lightning.report.comparison import compare, headline_rows
from dori_lightning.report.record import read_run
from dori_lightning.types import InputError
from support.fake_audits import loss_cost, write_audit
from support.fake_reports import PROMPT, dori

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
RECORDED = sorted(EXPERIMENTS.glob("*/expected.json"))
ATTACKED = {
    "checkpoint": "tiny", "mitigation": "nemo", "attack": "dori", "init": "prompt",
    "norm": "none", "eps": None, "steps": 50, "kind": "vm",
}  # fmt: skip
PROMPTED = {**ATTACKED, "attack": "prompt", "init": None, "steps": 0}
ROW = {"checkpoint": "tiny", "mitigation": "nemo"}
GOOD: dict[str, Any] = {"cell": ATTACKED, "metric": "mr", "value": 0.9, "tol": 0.1}


def test_the_headline_table_has_a_file_of_claims():
    assert EXPERIMENTS / "001-headline-table" / "expected.json" in RECORDED


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.parent.name)
def test_recorded_claims_are_well_formed(path):
    for claim in read_claims(path):
        assert claim.metric in METRICS


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*/run.sh")), ids=lambda p: p.parent.name)
def test_run_scripts_hold_nothing_but_commands_of_the_program(path):
    lines = path.read_text().replace("\\\n", " ").splitlines()
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    rest = [line for line in lines[2:] if line.strip() and not line.startswith("#")]
    assert rest
    assert all(line.startswith("python -m dori_lightning ") for line in rest)


def written(tmp_path: Path, *claims: Any) -> Path:
    path = tmp_path / "expected.json"
    path.write_text(json.dumps(list(claims)))
    return path


@pytest.mark.parametrize(
    "claim",
    [
        GOOD,
        {**GOOD, "cell": PROMPTED},
        {**GOOD, "cell": {**ATTACKED, "norm": "l2", "eps": 3.25, "init": "random"}},
        {**GOOD, "metric": "similarity", "value": -0.2},
        {"cell": ROW, "metric": "denoising_loss_ratio", "value": 1.02, "tol": 0.03},
        {"cell": ROW, "metric": "unet_evaluations", "value": 120_000, "tol": 0},
        {**GOOD, "sweep": "headline_table-dori_tiny"},
    ],
)
def test_a_good_claim_is_read(tmp_path, claim):
    (read,) = read_claims(written(tmp_path, claim))
    assert read.model_dump() == {"sweep": None, **claim}


def without(claim: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in claim.items() if k != key}


@pytest.mark.parametrize(
    ("claim", "where"),
    [
        ("mr is 1", "1"),
        (without(GOOD, "tol"), "1.mr.tol"),
        ({**GOOD, "note": "x"}, "1.mr.note"),
        ({**GOOD, "sweep": 3}, "1.mr.sweep"),
        ({**GOOD, "metric": "accuracy"}, "1"),
        ({**GOOD, "value": 1.2}, "1.mr"),
        ({**GOOD, "value": "0.9"}, "1.mr.value"),
        ({**GOOD, "value": True}, "1.mr.value"),
        ({**GOOD, "value": math.nan}, "1.mr.value"),
        ({**GOOD, "tol": -0.1}, "1.mr.tol"),
        ({**GOOD, "tol": None}, "1.mr.tol"),
        ({**GOOD, "tol": math.inf}, "1.mr.tol"),
        ({**GOOD, "cell": "nemo"}, "1.mr.cell"),
        ({**GOOD, "cell": without(ATTACKED, "eps")}, "1.mr.cell.eps"),
        ({**GOOD, "cell": {**ATTACKED, "seed": 1}}, "1.mr.cell.seed"),
        ({**GOOD, "cell": ROW}, "1.mr.cell.attack"),
        ({**GOOD, "metric": "kid"}, "1.kid.cell.attack"),
        ({**GOOD, "cell": {**ATTACKED, "mitigation": ""}}, "1.mr.cell.mitigation"),
        ({**GOOD, "cell": {**ATTACKED, "kind": "xm"}}, "1.mr.cell.kind"),
        ({**GOOD, "cell": {**ATTACKED, "norm": "l1"}}, "1.mr.cell.norm"),
        ({**GOOD, "cell": {**ATTACKED, "eps": 1.0}}, "1.mr.cell"),
        ({**GOOD, "cell": {**ATTACKED, "norm": "l2"}}, "1.mr.cell"),
        ({**GOOD, "cell": {**ATTACKED, "steps": -1}}, "1.mr.cell.steps"),
        ({**GOOD, "cell": {**ATTACKED, "steps": 5.5}}, "1.mr.cell.steps"),
        ({**GOOD, "cell": {**ATTACKED, "init": None}}, "1.mr.cell"),
        ({**GOOD, "cell": {**ATTACKED, "attack": "gcg"}}, "1.mr.cell.attack"),
        ({**GOOD, "cell": {**ATTACKED, "attack": "prompt"}}, "1.mr.cell"),
    ],
)
def test_a_malformed_claim_is_named(tmp_path, claim, where):
    with pytest.raises(InputError) as refused:
        read_claims(written(tmp_path, GOOD, claim))
    assert f"\n  {where}: " in str(refused.value)
    assert "\n  0" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [("{}", "valid array"), ("[", "Invalid JSON"), (None, "cannot read")],
)
def test_a_file_that_is_no_list_is_refused(tmp_path, content, part):
    path = tmp_path / "expected.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=part):
        read_claims(path)


# --- holding them against a table


def claims_hold(tmp_path: Path, *claims: dict[str, Any]) -> list[bool]:
    found = {PROMPT: {"vm": [0.9, 0.2, 0.2, 0.2]}, dori(norm="l2", eps=3.25): {"vm": 0.9}}
    write_audit(tmp_path / "none")
    write_audit(
        tmp_path / "nemo", "nemo", reproduced=found,
        utility=loss_cost(1.02, 1.0, 1.04),
    )  # fmt: skip
    comparison = compare([read_run(tmp_path / name) for name in ("none", "nemo")])
    checked = check_claims(
        read_claims(written(tmp_path, *claims)),
        comparison.cells,
        headline_rows(comparison),
        sweeps=["mine"],
    )
    return [item.holds for item in checked]


def test_a_claim_holds_within_its_tolerance(tmp_path):
    prompted = {**GOOD, "cell": PROMPTED}
    ball = {**GOOD, "cell": {**ATTACKED, "norm": "l2", "eps": 3.2501}, "value": 1.0, "tol": 0}
    assert claims_hold(
        tmp_path,
        {**prompted, "value": 0.25, "tol": 0.0},
        {**prompted, "value": 0.35, "tol": 0.1},
        {**prompted, "value": 0.36, "tol": 0.1},
        ball,
        {**ball, "metric": "similarity", "value": 0.9},
        {"cell": ROW, "metric": "denoising_loss_ratio", "value": 1.0, "tol": 0.05},
    ) == [True, True, False, True, True, True]


def test_what_was_not_measured_does_not_hold(tmp_path):
    assert (
        claims_hold(
            tmp_path,
            {**GOOD, "cell": {**ATTACKED, "steps": 10}, "value": 0, "tol": 1},
            {**GOOD, "cell": {**PROMPTED, "mitigation": "siss"}, "value": 0, "tol": 1},
            {"cell": ROW, "metric": "kid", "value": 0, "tol": 9},
            {"cell": {**ROW, "mitigation": "siss"}, "metric": "kid", "value": 0, "tol": 9},
        )
        == [False] * 4
    )


def test_claims_about_another_sweep_are_left_to_it(tmp_path):
    wrong = {**GOOD, "cell": PROMPTED, "value": 1.0, "tol": 0.0}
    assert claims_hold(tmp_path, {**wrong, "sweep": "another"}, {**wrong, "sweep": "mine"}) == [
        False
    ]
