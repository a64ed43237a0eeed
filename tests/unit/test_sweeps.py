"""What the end of a sweep leaves, with audits that are invented in place of real ones."""

from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.plugins import Plugins

from dori_lightning import cli, config
from dori_lightning.report import pages
from dori_lightning.runtime.job_status import StatusFile
from dori_lightning.types import InputError
from support.fake_audits import write_audit
from support.fake_reports import PROMPT, dori
from support.in_process import Program, program_in

SWEEPS = ("headline_table", "headline_table_sd14", "headline_table_sdxl", "pruning_grid")
FOUND = {PROMPT: {"vm": [0.9, 0.2, 0.2, 0.2]}, dori(): {"vm": 0.9}}


def audit(cfg: Any, folder: Path) -> float:
    """Stand in for an audit; random_pruning and wanda_10 fail."""
    name = cfg.mitigation.name
    if name == "random_pruning":
        raise InputError("no such luck")
    if name == "wanda_10":
        raise RuntimeError("a bug")
    write_audit(folder, name, checkpoint=cfg.checkpoint.name, reproduced=FOUND)
    return 0.0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Program]:
    """The program in this process; its task is a stand-in that writes an invented audit."""
    # figures take most of a table's time, and have tests of their own
    monkeypatch.setattr(pages, "sweep_figures", lambda *_, **__: {})
    with program_in(tmp_path) as program:
        yield lambda *arguments, task=audit: program(*arguments, task=task)


def test_a_sweep_ends_with_its_table(
    run: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-m", "+experiment=headline_table", "mitigation=none,nemo,wanda") == 0
    captured = capsys.readouterr()
    folder = tmp_path / "outputs" / "sweeps" / "headline_table-dori_tiny"
    for name in ("table.parquet", "cells.parquet", "table.md", "report.html"):
        assert (folder / name).is_file()
    assert "The attack still finds images under 2 of 2 mitigations." in captured.err
    assert "1/4  25 % [5, 70]" in captured.err
    assert len(captured.out.splitlines()) == 3, "standard output carries run folders only"


def test_a_failed_job_loses_its_row_and_not_the_table(
    run: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = "mitigation=random_pruning,none,wanda"
    assert run("-m", "+experiment=headline_table", swept) == 2, "the failed job's code"
    captured = capsys.readouterr()
    assert captured.err.count("dori: no such luck") == 1
    named = "Without a result: mitigation=random_pruning (not finished or failed, see its log)."
    assert named in captured.err
    page = tmp_path / "outputs" / "sweeps" / "headline_table-dori_tiny" / "report.html"
    assert "Not complete" in page.read_text()
    assert named in page.read_text()


def test_the_programs_own_fault_in_a_job_keeps_its_code(
    run: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-m", "+experiment=headline_table", "mitigation=none,wanda_10,nemo") == 1
    assert "RuntimeError: a bug" in capsys.readouterr().err
    assert (tmp_path / "outputs/sweeps/headline_table-dori_tiny/table.md").is_file()


def test_without_its_none_row_the_sweep_ends_without_a_table(
    run: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-m", "+experiment=headline_table", "mitigation=wanda,nemo") == 2
    said = capsys.readouterr().err
    assert "dori: no table without its none row: nothing shows what dori_tiny reproduces" in said
    assert "Traceback" not in said
    assert not (tmp_path / "outputs/sweeps/headline_table-dori_tiny/table.md").exists()


def test_a_resumed_sweep_counts_the_jobs_that_were_done_before(
    run: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("-m", "+experiment=headline_table", "mitigation=none,random_pruning")
    assert run(*command) == 2
    assert "Without a result" in capsys.readouterr().err

    def mended(cfg: Any, folder: Path) -> None:
        write_audit(folder, cfg.mitigation.name, reproduced=FOUND)

    assert run(*command, task=mended) == 0
    said = capsys.readouterr().err
    assert "Without a result" not in said
    assert "under 1 of 1 mitigation." in said


def test_an_interrupted_sweep_makes_no_table(run: Program, tmp_path: Path) -> None:
    def interrupted(cfg: Any, folder: Path) -> None:
        raise KeyboardInterrupt

    assert run("-m", "+experiment=headline_table", "mitigation=none", task=interrupted) == 130
    assert not list(tmp_path.glob("outputs/sweeps/*/table.*"))


def test_every_sweep_ends_with_its_page(run: Program, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "sweeps"
    assert run("-m", "sweep=methods", "mitigation=none,nemo") == 0
    assert (folder / "methods" / "table.md").is_file()
    assert "Mitigations compared" in (folder / "methods" / "report.html").read_text()
    # without their none row they make no table, and nobody asked for one
    assert run("-m", "sweep=alone", "mitigation=nemo,wanda") == 0
    page = (folder / "alone" / "report.html").read_text().replace("\u00a0", " ")
    assert page.count("The model holds 4 of 4") == 2
    assert page.count('/report.html">') == 2
    assert "no table without its none row" in page
    assert not list(folder.glob("alone/table.*"))


def test_single_runs_and_sweeps_without_audits_make_no_table(run: Program, tmp_path: Path) -> None:
    assert run("+experiment=audit") == 0
    assert run("-m", "seed=1,2", task=lambda cfg, folder: None) == 0
    assert not list(tmp_path.glob("outputs/**/table.*"))
    assert not list(tmp_path.glob("outputs/sweeps/*/report.html"))


def test_a_sweep_that_another_command_left_behind_is_forgotten(
    run: Program, tmp_path: Path
) -> None:
    left: Any = config.CONF  # anything that would fail if it were closed
    cli._sweep.config = left
    assert run("seed=1") == 0
    assert cli._sweep.config is None


def test_a_sweep_says_how_its_offline_runs_are_uploaded(
    run: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(cfg: Any, folder: Path) -> None:
        (folder / "wandb" / f"offline-run-{cfg.seed}").mkdir(parents=True)

    assert run("-m", "sweep=a b", "seed=1,2", task=offline) == 0
    assert "wandb sync 'outputs/sweeps/a b'/*/wandb/offline-run-*\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", [*SWEEPS, "headline_table_sd3", "headline_table_flux"])
def test_every_sweep_asks_for_its_table_and_its_baseline(name: str) -> None:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", [f"+experiment={name}"], return_hydra_config=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert cfg.hydra.callbacks.table._target_ == "dori_lightning.cli.SweepTable"
    swept = cfg.hydra.sweeper.params.mitigation.split(",")
    assert swept[0] == "none"
    assert set(swept) <= config.groups()["mitigation"].keys()
    assert cfg.attack.other_inits == ["prompt"]


@pytest.mark.parametrize("name", SWEEPS)
def test_what_an_edit_builds_on_has_its_job_before(name: str) -> None:
    """So that each edit is made once, by the job of its name."""
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        swept = compose("config", [f"+experiment={name}"], return_hydra_config=True)
        names = swept.hydra.sweeper.params.mitigation.split(",")
        likes = {
            other: compose("config", [f"mitigation={other}"]).mitigation.like.name
            for other in names
            if other.startswith("random_pruning")
        }
    assert likes
    for other, like in likes.items():
        assert names.index(like) < names.index(other)


def test_the_headline_tables_have_every_method_of_the_paper() -> None:
    for name in ("headline_table", "headline_table_sd14"):
        with initialize_config_dir(str(config.CONF), version_base="1.3"):
            cfg = compose("config", [f"+experiment={name}"], return_hydra_config=True)
        swept = cfg.hydra.sweeper.params.mitigation.split(",")
        assert {"nemo", "wanda", "wanda_10", "esd_x", "concept_ablation", "siss",
                "adversarial_finetuning", "adversarial_finetuning_lora"} <= set(swept)  # fmt: skip


def test_the_stable_diffusion_table_lacks_nothing_but_data() -> None:
    from omegaconf import OmegaConf

    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", ["+experiment=headline_table_sd14"])
    assert sorted(OmegaConf.missing_keys(cfg)) == [
        "corpus.path",
        "metrics.descriptors.sscd.weights",
        "pairs.parts[0].images",
        "pairs.parts[0].path",
        "pairs.parts[1].images",
        "pairs.parts[1].path",
    ]
    assert (cfg.sampling.images_per_pair, cfg.sampling.sampler) == (10, "ddim")
    assert cfg.attack.budget.steps == 50


def test_a_dry_run_of_a_sweep_adds_up_its_plans(
    run: Program, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dori_lightning.tasks import audit as real

    arguments = ("+experiment=headline_table_sd14", "task.dry_run=true", "mitigation=none,wanda")
    assert run(*arguments, task=real.run) == 0
    captured = capsys.readouterr()
    assert captured.err.count("nothing is computed") == 1, "one table for all jobs"
    assert "Plan of the sweep headline_table-sd14" in captured.err
    assert "edit wanda, once" in captured.err
    folder = tmp_path / "outputs" / "sweeps" / "headline_table-sd14"
    assert (folder / "plan.json").is_file()
    assert len(captured.out.splitlines()) == 2
    assert not list(folder.glob("*/report.json"))


def test_a_killed_worker_is_one_message_that_names_what_was_cut(
    run: Program,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # the class that Hydra holds: it imports its plugins' modules again
    launcher = Plugins.instance().class_name_to_class[
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    ]
    launch = launcher.launch
    folder = tmp_path / "outputs" / "sweeps" / "mine"

    def launch_one(self: Any, jobs: Any, initial_job_idx: int) -> None:
        launch(self, jobs[:1], initial_job_idx)
        (folder / "second").mkdir()
        StatusFile(folder / "second")
        raise BrokenProcessPool("a worker died")

    monkeypatch.setattr(launcher, "launch", launch_one)
    assert run("-m", "sweep=mine", "seed=1,2") == 1
    said = capsys.readouterr().err
    assert said.count("dori: ") == 1
    assert "dori: a worker of the sweep was killed" in said
    assert "cut: second\n" in said
    assert "task=status task.runs=outputs/sweeps/mine" in said
    assert "Traceback" not in said
