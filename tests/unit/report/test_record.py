import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dori_lightning.report.record import read_record, write_report
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import InputError
from support import fake_reports as fakes

CELL_KEYS = {
    "checkpoint", "mitigation", "attack", "init", "budget", "kind", "n", "mr", "mr_ci95",
    "similarity", "descriptor", "threshold", "failed", "hits", "aggregation",
}  # fmt: skip
CANARY = "canary-8f3a"


def test_report_json_keeps_the_contract(tmp_path):
    path = write_report(fakes.report(tmp_path), tmp_path)
    document = json.loads(path.read_text())
    assert document["schema_version"] == 2
    assert document["invalid"] == [], "a valid audit"
    for cell in document["cells"]:
        assert set(cell) >= CELL_KEYS
        assert set(cell["budget"]) == {"norm", "eps", "steps"}
        assert len(cell["mr_ci95"]) == 2
        assert set(cell["similarity"]) == {"median", "mad"}
    attacked = next(c for c in document["cells"] if c["attack"] == "dori" and c["kind"] == "vm")
    assert attacked["init"] == "prompt"
    assert attacked["budget"] == {"norm": "none", "eps": None, "steps": 10}
    assert document["recommended_budget"]["steps"] == 50
    assert {"threshold", "rule", "auc", "roc", "null", "ceiling"} <= set(document["calibration"])
    pair = document["pairs"][0]
    assert {"id", "kind", "prompt", "repeats", "duplicate_of", "truncated", "conditions"} == set(
        pair
    )
    assert pair["conditions"][0]["best_similarity"] == pytest.approx(0.9)
    assert document["provenance"]["started"].startswith("2026-11-24T08:00:00")
    assert list(document) == sorted(document)


def test_nan_and_infinity_become_null(tmp_path):
    report = fakes.report(tmp_path)
    empty = fakes.cell("tm", fakes.PROMPT, 0, 0, failed=2)
    report = replace(
        report,
        cells=(*report.cells, empty),
        calibration=replace(report.calibration, auc=math.nan, null=()),
    )
    text = write_report(report, tmp_path).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    document = json.loads(text)
    assert document["cells"][-1]["mr"] is None
    assert document["cells"][-1]["mr_ci95"] == [None, None]
    assert document["calibration"]["auc"] is None
    assert document["calibration"]["roc"][0]["threshold"] is None


def test_failed_write_leaves_the_old_files(tmp_path):
    write_report(fakes.report(tmp_path), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert set(before) == {"report.json", "pairs.parquet"}
    with pytest.raises(TypeError, match="object"):
        write_report(fakes.report(tmp_path, config={"bad": object()}), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    report = fakes.report(tmp_path)
    old = write_report(report, tmp_path).read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dori_lightning.runtime.artifacts.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(replace(report, verdict="new"), tmp_path)
    assert (tmp_path / "report.json").read_bytes() == old
    assert not list(tmp_path.glob(".*.tmp"))


def test_parquet_has_one_row_for_every_picture(tmp_path):
    report = fakes.report(tmp_path, vm=2, control=1)
    diverged = fakes.outcome(
        report.outcomes[0].pair, fakes.dori(50), (math.nan,) * 3, restart=1, status="diverged"
    )
    report = replace(report, outcomes=(*report.outcomes, diverged))
    write_report(report, tmp_path)
    frame = pd.read_parquet(tmp_path / "pairs.parquet")
    assert len(frame) == (3 * 3 + 1) * 3  # pairs x conditions, one more restart, seeds
    assert {
        "similarity_ncc", "similarity_ssim", "prompt", "kind", "repeats", "status", "loss_first",
        "loss_last", "displacement", "threshold", "image", "attack", "init", "norm", "eps",
        "steps",
        "restart", "seed", "checkpoint", "mitigation", "pair_id",
    } <= set(frame.columns)  # fmt: skip
    kept = frame[frame["status"] == "ok"]
    assert all((tmp_path / name).is_file() for name in kept["image"])
    assert not any(Path(name).is_absolute() for name in kept["image"])
    lost = frame[frame["status"] == "diverged"]
    assert len(lost) == 3
    assert lost["similarity_ncc"].isna().all()
    assert kept["similarity_ncc"].notna().all()


def test_rows_refuse_a_wrong_number_of_similarities(tmp_path):
    report = fakes.report(tmp_path)
    broken = replace(report.outcomes[0], similarity={"ncc": np.array([0.1])})
    with pytest.raises(ValueError, match="3 seeds but 1 similarities"):
        write_report(replace(report, outcomes=(broken,)), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "Invalid JSON"),
        ("[]", "all of it"),
        ('{"schema_version": 99}', "schema_version"),
        ('{"schema_version": 1}', "checkpoint"),
        ('{"schema_version": 1, "checkpoint": 1}', "checkpoint"),
    ],
)
def test_reading_names_what_is_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        read_record(tmp_path)
    assert "report.json" in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda d: d.update(cells=3), "cells"),
        (lambda d: d.update(cells=[3]), "cells.0"),
        (lambda d: d.update(cells=[{}]), "cells.0.checkpoint"),
        (lambda d: d["cells"][1].update(kind="dog"), "cells.1.kind"),
        (lambda d: d["cells"][0].update(attack="magic"), "cells.0.condition.attack"),
        (lambda d: d["cells"][0].update(n="many"), "cells.0.n"),
        (lambda d: d["cells"][0].update(mr_ci95=[0.1]), "cells.0.mr_ci95.1"),
        (lambda d: d["cells"][0].update(similarity=0.5), "cells.0.similarity_median"),
        (lambda d: d["cells"][0].pop("hits"), "cells.0.hits"),
        (lambda d: d["calibration"].pop("rule"), "calibration.rule"),
        (lambda d: d["calibration"].update(roc=[{}]), "calibration.roc.0.0"),
        (lambda d: d.update(calibration=None), "calibration"),
        (lambda d: d.update(flags=[{"name": "x"}]), "flags.0.severity"),
        (lambda d: d.update(utility={"prompts": 3}), "utility.descriptor"),
        (lambda d: d["provenance"].pop("finished"), "provenance.finished"),
    ],
)
def test_a_record_that_no_audit_writes_is_refused_by_key(tmp_path, damage, where):
    path = write_report(fakes.report(tmp_path, vm=1, control=1), tmp_path)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        read_record(tmp_path)
    assert f"  {where}: " in str(caught.value)
    assert "report.json" in str(caught.value)
    assert "fix:" in str(caught.value)


def test_a_rate_of_nothing_is_read_back(tmp_path):
    report = fakes.report(tmp_path, vm=1, control=1)
    report = replace(report, cells=(*report.cells, fakes.cell("tm", fakes.PROMPT, 0, 0, failed=2)))
    write_report(report, tmp_path)
    back = read_record(tmp_path)
    assert back.cells[:-1] == report.cells[:-1]
    assert math.isnan(back.cells[-1].mr), "null is read as NaN"


@pytest.mark.parametrize(
    "name",
    ["key", "api_key", "apiKey", "API_KEY", "wandb.key", "hub_token", "token", "secret",
     "HF_TOKEN", "password", "db_password", "credential", "aws_credentials",
     "access-key", "secretName"],
)  # fmt: skip
def test_secrets_go(name):
    assert CANARY not in repr(redact({"outer": [{name: CANARY}]}))
    assert CANARY not in repr(redact({"outer": {name: {"deep": CANARY}}}))
    assert CANARY not in repr(redact({"overrides": [f"+logger.{name}={CANARY}"]}))


@pytest.mark.parametrize(
    "name", ["num_tokens", "max_tokens", "token_mask", "monkey", "keyboard", "tokenizer", "turkey"]
)
def test_harmless_names_stay(name):
    assert redact({name: "value 1"}) == {name: "value 1"}


def test_urls_lose_their_user():
    clean = redact({"hub": f"https://me:{CANARY}@hub.example/x?token={CANARY}&page=2"})
    assert clean == {"hub": "https://hub.example/x?token=<redacted>&page=2"}
    # what a path makes of it
    assert redact(f"no https:/me:{CANARY}@hub.example/x") == "no https:/hub.example/x"
    assert redact({"token": None, "use_token": True}) == {"token": None, "use_token": True}
    assert redact(clean) == clean


def test_no_secret_reaches_the_file(tmp_path):
    report = fakes.report(tmp_path, config={"logger": {"api_key": CANARY}})
    assert CANARY not in write_report(report, tmp_path).read_text()
