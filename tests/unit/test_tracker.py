import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from dori_lightning import config
from dori_lightning.attacks.embedding_attack import Conditioning
from dori_lightning.runtime import peers
from dori_lightning.runtime.signals import Interrupted
from dori_lightning.tasks import run_record
from dori_lightning.tasks.results_logging import track_attack
from dori_lightning.tracking import RunIdentity, Tracker, WeightsAndBiases, kept_id
from dori_lightning.types import Budget, Condition, InputError, Pair
from support.fake_audits import write_sweep
from support.fake_reports import PROMPT, dori
from support.offline_runs import files_of, inspected, offline_runs
from support.runs import configuration, run_task


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    return Tracker([CSVLogger(tmp_path, name="csv")])


def test_scalars_keep_their_own_steps(tracker: Tracker, tmp_path: Path) -> None:
    tracker.scalars(
        [(1, {"attack/loss": 2.0}), (2, {"attack/loss": 1.0})], step_metric="attack/step"
    )
    tracker.scalars([(0, {"audit/rate": 0.5})], step_metric="audit/steps")
    tracker.finish()
    rows = rows_of(tmp_path)
    assert [row["attack/step"] for row in rows] == ["1", "2", ""]
    assert [row["audit/steps"] for row in rows] == ["", "", "0"]
    assert [row["step"] for row in rows] == ["1", "2", "0"]


def test_the_summary_leaves_out_what_is_no_number(tracker: Tracker, tmp_path: Path) -> None:
    tracker.summary({"final/a": 1.0, "final/b": float("nan"), "final/c": None, "verdict": "clean"})
    tracker.finish()
    assert rows_of(tmp_path) == [{"final/a": "1.0", "step": "0"}]


def test_what_a_training_logs_has_the_stage_s_step(tracker: Tracker, tmp_path: Path) -> None:
    logger = tracker.training("finetune")
    logger.log_metrics({"finetune/loss": 0.5, "epoch": 0}, step=7)
    logger.finalize("success")
    tracker.finish()
    assert rows_of(tmp_path) == [{"finetune/loss": "0.5", "finetune/step": "7", "step": "7"}]


def test_without_loggers_nothing_happens(tmp_path: Path) -> None:
    tracker = Tracker()
    tracker.scalars([(1, {"a/b": 1.0})], step_metric="a/step")
    tracker.image("pictures/x", Image.new("RGB", (4, 4)), caption="")
    tracker.artifact("x", kind="report", files={"x": tmp_path})
    tracker.finish(1)
    assert list(tmp_path.iterdir()) == []


def attacked(name: str, kind: str, losses: list[float]) -> Conditioning:
    return Conditioning(
        Pair(name, kind, "p", Path("x.png")),  # type: ignore[arg-type]
        Condition("dori", "random", Budget(steps=len(losses))),
        1,
        torch.zeros(2, 2),
        losses=torch.tensor(losses),
    )


def test_an_attacks_curve_is_the_mean_over_pairs_of_a_kind(
    tracker: Tracker, tmp_path: Path
) -> None:
    nan = float("nan")
    track_attack(
        tracker,
        [
            attacked("a", "vm", [4.0]), attacked("a", "vm", [4.0, 2.0]),
            attacked("b", "vm", [2.0, nan]), attacked("c", "control", [8.0, 7.0]),
        ],
    )  # fmt: skip
    tracker.finish()
    rows = rows_of(tmp_path)
    assert [row["attack/step"] for row in rows] == ["1", "2"]
    assert [row["attack/loss/random_r1/vm"] for row in rows] == ["3.0", "2.0"]
    assert [row["attack/loss/random_r1/control"] for row in rows] == ["8.0", "7.0"]


def test_ids_are_made_once_for_each_purpose(tmp_path: Path) -> None:
    first = kept_id(tmp_path, "run")
    assert kept_id(tmp_path, "run") == first
    sweep = kept_id(tmp_path, "sweep 1", prefix="grid-")
    assert sweep.startswith("grid-")
    assert kept_id(tmp_path, "sweep 1", prefix="later-") == sweep
    assert len({first, sweep, kept_id(tmp_path, "sweep 2")}) == 3
    assert json.loads((tmp_path / "tracking.json").read_text())["run"] == first


def test_one_run_has_one_id_whoever_chose_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "agents1")
    cfg = configuration("name=x")
    assert run_record._identity(cfg, tmp_path, ()).id == "agents1"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert run_record._identity(cfg, tmp_path, ()).id == "agents1", "the oldest one"


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False),
        ({"SUBMITIT_LOCAL_GLOBALID": "1"}, False),
        # relaunched by Lightning in a shell that SLURM gave
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),
    ],
)
def test_one_process_of_a_run_speaks(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], first: bool
) -> None:
    for name in peers.RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert peers.speaks() is first


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no"), 2), (RuntimeError("no"), 1), (KeyboardInterrupt(), 130),
        (Interrupted(15), 143), (SystemExit(0), 0), (SystemExit(3), 3), (SystemExit("no"), 1),
    ],
)  # fmt: skip
def test_a_logger_is_told_how_a_task_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, code: int
) -> None:
    told: list[int] = []
    monkeypatch.setattr(Tracker, "finish", lambda self, exit_code=0: told.append(exit_code))
    with pytest.raises(type(error)), run_record.tracked(configuration(), tmp_path):
        raise error
    assert told == [code]


def test_a_job_is_named_by_what_is_swept() -> None:
    given = [
        "attack/budget=l2_small,unbounded", "+experiment=audit", "pairs.path=/a/b", "seed=1",
        "mitigation=none,wanda", "attack/budget=l2_small", "sampling.steps=range(1,3)",
    ]  # fmt: skip
    own = ["+experiment=audit", "pairs.path=/a/b", "mitigation=wanda", "sampling.steps=2"]
    assert run_record._differing(own, given) == "mitigation=wanda, sampling.steps=2"
    assert config.unescaped(r"pairs.path=https\://a\:b@c/d") == "pairs.path=https://a:b@c/d"


@pytest.fixture
def fresh_client() -> Iterator[None]:
    """The client reads its environment once in a process."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("fresh_client")
@pytest.mark.parametrize(
    ("offline", "environment", "mode"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": "x" * 40}, "online"),
        (True, {"WANDB_API_KEY": "x" * 40}, "offline"),
        (False, {}, "online"),
        (None, {"WANDB_MODE": "disabled", "WANDB_API_KEY": "x" * 40}, None),
        (None, {"NETRC": "netrc"}, "online"),
    ],
)
def test_offline_where_no_key_is_set(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    offline: bool | None,
    environment: dict[str, str],
    mode: str | None,
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if "NETRC" in environment:
        netrc = tmp_path / "netrc"
        netrc.write_text("machine api.wandb.ai\n  login user\n  password " + "x" * 40 + "\n")
        environment = {"NETRC": str(netrc)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert WeightsAndBiases(offline=offline)._mode() == mode


@pytest.mark.usefixtures("fresh_client")
def test_online_without_a_key_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(InputError, match=r"logger\.wandb\.offline=true"):
        WeightsAndBiases(offline=False).start(RunIdentity("a", "a", None, "audit"), tmp_path)


@pytest.mark.usefixtures("fresh_client")
def test_a_table_of_audits_is_a_table_and_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "table"
    for name, place in (("DIR", ""), ("DATA_DIR", "wandb/data"), ("CACHE_DIR", "wandb/cache")):
        monkeypatch.setenv(f"WANDB_{name}", str(folder / place))
    runs = write_sweep(
        tmp_path / "runs",
        none={"reproduced": {PROMPT: {"vm": 0.9}, dori(): {"vm": 0.9}}},
        wanda={"reproduced": {PROMPT: {"vm": 0.1}, dori(): {"vm": 0.8}}},
    )
    run_task(folder, "task=report", f"task.runs={runs}", "logger=wandb", "name=table")
    run = inspected(offline_runs(folder)[0])
    assert run.about["job_type"] == "report"
    assert run.exit_code == 0
    logged = next(row for row in run.history if "report/table._type" in row)
    assert logged["report/table.nrows"] == run.summary["final/rows"] == 2
    assert {"table.parquet", "report.html"} <= files_of(run.artifacts["table"]).keys()
