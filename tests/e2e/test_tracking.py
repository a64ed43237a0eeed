"""What W&B and csv loggers get of real audits on a tiny checkpoint, read back from their files."""

import csv
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import wandb

from dori_lightning.tracking import has_offline_runs, sync_command
from support.in_process import bytes_with, program_in
from support.offline_runs import files_of, inspected, offline_runs
from support.processes import PROGRAM, ended
from support.records import report_json
from support.runs import SMALL, on_tiny, write_material

CANARY = "hunter2canary"
MITIGATIONS = ("none", "sparse")
BUDGETS = ("l2_small", "unbounded")
SETTINGS = (
    "+experiment=audit", *SMALL, "report.images=full", "attack.snapshots=[1]",
    "logger=[csv,wandb]",
)  # fmt: skip
SECRETS = {
    "HF_TOKEN": f"hf_{CANARY * 2}",
    "DORI_PASSWORD": CANARY,
    "DORI_PLACE": f"https://user:{CANARY}@example.org/pairs",
}


@contextmanager
def client(place):
    """W&B's client, which reads its environment once, with nobody's settings or keys."""
    wandb.teardown()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name, value in {**SECRETS, "HOME": str(place / "home")}.items():
            patch.setenv(name, value)
        yield
        wandb.teardown()


def program(place, *arguments):
    """Run the program in ``place`` in this process; its exit code."""
    overrides = on_tiny(place, *SETTINGS, *arguments)
    with client(place), program_in(place) as run:
        return run("--config-dir", "mine", *overrides, task=None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, pairs, and a pruning method of one's own."""
    place = write_material(tmp_path_factory.mktemp("tracking"))
    (place / "home").mkdir()
    method = place / "mine" / "mitigation" / "sparse.yaml"
    method.parent.mkdir(parents=True)
    method.write_text(
        "# of this test\n_target_: dori_lightning.mitigations.wanda.Wanda\n"
        "_convert_: all\nname: sparse\nfraction: 0.2\nsteps: 2\n"
    )
    return place


@pytest.fixture(scope="module")
def sweep(place):
    """A finished sweep of two mitigations x two budgets."""
    choices = (f"mitigation={','.join(MITIGATIONS)}", f"attack/budget={','.join(BUDGETS)}")
    assert program(place, "-m", *choices) == 0
    return place / "outputs" / "sweeps" / "audit"


@pytest.fixture(scope="module")
def runs(sweep):
    """The W&B run of each job, by run folder."""
    folders = sorted(path.parent for path in sweep.glob("*/report.json"))
    found = {folder: offline_runs(folder) for folder in folders}
    assert [len(own) for own in found.values()] == [1] * 4, "one run for each job"
    return {folder: inspected(own[0]) for folder, own in found.items()}


def test_the_jobs_of_a_sweep_are_one_group_of_named_runs(runs):
    about = [run.about for run in runs.values()]
    assert len({one["run_group"] for one in about}) == 1
    assert about[0]["run_group"].startswith("audit-")
    assert len({one["run_id"] for one in about}) == 4
    assert {one["job_type"] for one in about} == {"audit"}
    assert {one["display_name"] for one in about} == {
        f"mitigation={mitigation}, budget={budget}"
        for mitigation in MITIGATIONS
        for budget in BUDGETS
    }
    assert {one["tags"][1] for one in about} == set(MITIGATIONS)
    assert all(run.exit_code == 0 for run in runs.values())


def dry_run(line):
    """What the client would upload for a line of a shell, by name of the part's folder."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        ["bash", "-c", f"{line} --dry-run"], capture_output=True, text=True, timeout=300,
        env={**env, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    parts = [line.split("/")[-2] for line in said.splitlines() if line.endswith(".wandb")]
    assert f"Would sync {len(parts)} run(s)" in said
    return parts


def test_the_line_that_is_told_uploads_a_run_a_resumed_run_and_a_sweep(sweep, tmp_path):
    place = tmp_path / "a sweep [1]"
    shutil.copytree(sweep, place, symlinks=True)
    job = sorted(path.parent for path in place.glob("*/report.json"))[0]
    (first,) = offline_runs(job)
    assert dry_run(sync_command(job)) == [first.name]
    resumed = first.with_name(f"offline-run-20991231_235959-{first.name.rpartition('-')[2]}")
    shutil.copytree(first, resumed)
    assert dry_run(sync_command(job)) == [first.name, resumed.name], "the oldest first"
    assert len(dry_run(sync_command(place, sweep=True))) == 4 + 1
    assert has_offline_runs(job)
    assert has_offline_runs(place, sweep=True)
    assert not has_offline_runs(place)


def test_a_run_says_how_it_is_uploaded(runs):
    for folder in runs:
        assert sync_command(folder) in (folder / "dori.log").read_text()


def test_a_run_says_what_it_was_made_from(runs):
    for folder, run in runs.items():
        assert run.config["seed"] == 0
        assert run.config["attack"]["budget"]["steps"] == 2, "resolved"
        assert run.config["run"]["choices"]["task"] == "audit"
        assert run.config["run"]["folder"] == str(folder)
        assert "torch" in run.config["run"]["packages"]


def test_curves_have_steps_of_their_own(runs):
    for run in runs.values():
        losses = {
            row["attack/step"]: row["attack/loss/prompt/vm"]
            for row in run.history
            if "attack/loss/prompt/vm" in row
        }
        assert sorted(losses) == [1, 2]
        rates = [row for row in run.history if "audit/memorization_rate/prompt/vm" in row]
        assert [row["audit/steps"] for row in rates] == [0, 1, 2]
        assert all(
            row["audit/memorization_rate_low/prompt/vm"]
            <= row["audit/memorization_rate/prompt/vm"]
            <= row["audit/memorization_rate_high/prompt/vm"]
            for row in rates
        )
        assert run.step_metrics["attack/loss/prompt/vm"] == "attack/step"
        assert run.step_metrics["audit/memorization_rate/prompt/vm"] == "audit/steps"
        assert "*" not in run.step_metrics, "nothing is plotted against trainer/global_step"


def test_the_summary_has_what_a_sweep_sorts_by(runs):
    for folder, run in runs.items():
        report = report_json(folder)
        cells = [c for c in report["cells"] if c["kind"] == "vm"]
        # random weights hold nothing, so an audit of a mitigation is invalid: no rate to minimise
        invalid = report["mitigation"] != "none"
        assert run.summary["final/invalid"] == float(invalid)
        assert run.summary.get("final/objective") == (
            None if invalid else max(c["mr"] for c in cells)
        )
        assert run.summary["final/threshold"] == 0.5
        assert run.summary["verdict"] == report["verdict"]
        assert {
            "final/mr_prompt_vm", "final/mr_attack_vm", "final/mr_attack_control",
            "final/similarity_attack_vm", "final/failed", "final/unet_evaluations",
            "final/seconds",
        } <= run.summary.keys()  # fmt: skip
        mitigated = report["mitigation"] != "none"
        assert ("final/mr_before_vm" in run.summary) is mitigated
        assert (run.summary["final/edit_weights"] > 0) is mitigated


def test_one_grid_for_each_start_and_one_table(runs):
    for folder, run in runs.items():
        grids = [row for row in run.history if "pictures/prompt._type" in row]
        assert len(grids) == 1
        assert "threshold 0.50" in grids[0]["pictures/prompt.caption"]
        place = offline_runs(folder)[0] / "files"
        assert (place / grids[0]["pictures/prompt.path"]).is_file()
        tables = [row for row in run.history if "audit/pairs._type" in row]
        assert len(tables) == 1
        table = json.loads((place / tables[0]["audit/pairs.path"]).read_text())
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        own = [
            row
            for row in rows
            if row["mitigation"] == run.config["mitigation"].get("name", "none")
        ]
        assert len(own) == 5 * 3, "pairs x (prompt and two snapshots)"
        assert all(row["picture"] for row in own if row["attack"] == "prompt")
        assert {row["status"] for row in own} == {"ok"}


def test_files_are_artifacts_whose_bytes_lie_in_the_run_folder(runs, place):
    for folder, run in runs.items():
        embeddings = files_of(run.artifacts["embedding"])
        assert len(embeddings) == 5
        assert {"report.json", "report.html", "pairs.parquet", "edit.json"} <= files_of(
            run.artifacts["report"]
        ).keys()
        mitigated = run.config["mitigation"]["name"] != "none"
        assert ("edit" in run.artifacts) is mitigated
        for artifact in run.artifacts.values():
            for file in files_of(artifact).values():
                assert file.is_relative_to(folder)
                assert file.is_file()
    assert not list((place / "home").rglob("*wandb*")), "nothing is staged in the home folder"


def test_csv_gets_the_same_numbers(runs):
    for folder, run in runs.items():
        with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        for key, step in (
            ("attack/loss/prompt/vm", "attack/step"),
            ("audit/memorization_rate/prompt/control", "audit/steps"),
        ):
            here = {float(row[step]): float(row[key]) for row in rows if row[key]}
            there = {row[step]: row[key] for row in run.history if key in row}
            assert here == pytest.approx(there)
        rates = [row["final/mr_attack_vm"] for row in rows if row["final/mr_attack_vm"]]
        assert [float(value) for value in rates] == [run.summary["final/mr_attack_vm"]]


def test_no_byte_of_a_sweep_holds_a_secret_and_nobody_else_may_read_any(sweep, place):
    assert bytes_with(CANARY, place) == []
    found = [path for path in (place / "outputs").rglob("*") if not path.is_symlink()]
    assert any(path.suffix == ".wandb" for path in found)
    assert [path for path in found if path.stat().st_mode & 0o077] == []


def test_failing_jobs_are_marked_failed_and_say_why_without_secrets(place, capsys):
    assert program(place, "pairs.path=${oc.env:DORI_PLACE}") == 2, "before a run begins"
    assert program(place, "-m", "seed=1,2", "sweep=failing", "sampling.steps=5000") == 2
    folders = sorted((place / "outputs" / "sweeps" / "failing").glob("[!.]*/"))
    assert len(folders) == 2
    runs = [inspected(run) for folder in folders for run in offline_runs(folder)]
    assert [run.exit_code for run in runs] == [2, 2]
    assert len({run.about["run_group"] for run in runs}) == 1
    for run in runs:
        assert run.summary["error"].startswith("InputError: ")
    said = capsys.readouterr()
    assert CANARY not in said.out + said.err
    assert bytes_with(CANARY, place) == []


@pytest.mark.slow
def test_two_processes_are_one_run_and_a_resumed_run_is_the_same(place):
    command = (
        PROGRAM, *on_tiny(place, *SETTINGS), "trainer=ddp", "trainer.accelerator=cpu",
        "name=pair", "report.images=none",
        "mitigation=esd_x", "mitigation.steps=2", "mitigation.sampling_steps=2",
    )  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env |= {"HOME": str(place / "home")}
    ended(place, *command, env=env)
    folder = place / "outputs" / "pair"
    assert len(offline_runs(folder)) == 1
    assert len(list((folder / "csv").iterdir())) == 1
    first = inspected(offline_runs(folder)[0])
    assert "run_group" not in first.about, "a run on its own"
    assert first.about["display_name"] == "pair"
    assert [row["attack/step"] for row in first.history if "attack/step" in row] == [1, 2]
    trained = [row for row in first.history if "finetune/loss" in row]
    assert [row["finetune/step"] for row in trained] == [0, 1]
    assert first.step_metrics["finetune/loss"] == "finetune/step"
    assert not any("pictures/prompt._type" in row for row in first.history), "images=none"
    media = offline_runs(folder)[0] / "files" / "media" / "images"
    assert not media.exists()
    ended(place, *command, env=env)
    ids = [inspected(run).about["run_id"] for run in offline_runs(folder)]
    assert ids == [first.about["run_id"]] * 2
    assert len(list((folder / "csv").iterdir())) == 2, "the first start's numbers stay"
