"""Sweeps and runs that would go wrong without a word."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from dori_lightning import cli, config
from dori_lightning.cli import SweepGuard
from dori_lightning.runtime.artifacts import is_held
from dori_lightning.types import InputError

SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


@pytest.fixture(autouse=True)
def close() -> Iterator[None]:
    yield
    cli.forget_sweep()


def sweep(tmp_path: Path, *overrides: str, launcher: str | None = None) -> DictConfig:
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", [f"paths.output={tmp_path}", *overrides], return_hydra_config=True)
    if launcher is not None:
        with open_dict(cfg):
            cfg.hydra.launcher = {"_target_": launcher}
    return cfg


def refused(cfg: DictConfig, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        SweepGuard().on_multirun_start(cfg)
    assert left.value.code == 2
    said = capsys.readouterr().err
    for part in ("dori: ", "where: ", "fix: "):
        assert part in said
    return said


def test_every_sweep_has_its_guard(tmp_path: Path) -> None:
    for experiment in ("pruning_grid", "headline_table"):
        cfg = sweep(tmp_path, f"+experiment={experiment}")
        targets = {node._target_ for node in cfg.hydra.callbacks.values()}
        assert "dori_lightning.cli.SweepGuard" in targets


def test_two_sweeps_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = sweep(tmp_path, "sweep=mine")
    SweepGuard().on_multirun_start(cfg)
    place = tmp_path / "sweeps" / "mine"
    assert is_held(place, "sweep.lock")
    said = refused(cfg, capsys)
    assert f"another run writes to {place}" in said
    assert "sweep=NAME" in said
    cli.forget_sweep()
    assert not is_held(place, "sweep.lock")
    SweepGuard().on_multirun_start(cfg)


@pytest.mark.parametrize(
    "override",
    ["sweep=x-${now:%H%M%S}", "hydra.sweep.dir=out/${now:%Y}", "paths.output=${now:%Y}"],
)
def test_a_sweeps_folder_named_after_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    said = refused(sweep(tmp_path, override, launcher=SLURM), capsys)
    assert "each asks the clock" in said
    assert "sweep=NAME" in said


def test_in_one_process_the_clock_is_asked_once(tmp_path: Path) -> None:
    SweepGuard().on_multirun_start(sweep(tmp_path, "sweep=x-${now:%H%M%S}"))


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_sweep_that_is_started_many_times_over(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    monkeypatch.setenv(variable, "4")
    said = refused(sweep(tmp_path), capsys)
    assert "4 processes were started, and each would run the whole sweep" in said
    assert "hydra/launcher=slurm" in said


def test_a_run_folder_named_after_the_time_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = sweep(tmp_path, "name=x-${now:%H%M%S}")
    hydra = OmegaConf.create({"hydra": {"run": {"dir": "${paths.output}/${name}"}}})
    monkeypatch.setattr(cli.HydraConfig, "instance", lambda: type("C", (), {"cfg": hydra})())
    cli.refuse_clock(cfg)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="each of 2 processes"):
        cli.refuse_clock(cfg)


def test_a_launchers_tasks_may_follow_the_trainers_devices(tmp_path: Path) -> None:
    cfg = sweep(tmp_path, "trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2")
    settings = OmegaConf.create(
        {"launcher": {"nodes": "${trainer.num_nodes}", "tasks_per_node": "${trainer.devices}"}}
    )
    assert cli._launched_tasks(cfg, settings) == (4, 2)  # type: ignore[arg-type]
    assert cli._launched_tasks(cfg, OmegaConf.create({"launcher": {}})) == (1, 1)  # type: ignore[arg-type]


def test_presets_of_launchers_that_are_not_installed_say_what_to_install() -> None:
    from hydra.errors import MissingConfigException

    from dori_lightning import errors

    error = MissingConfigException(
        "x", missing_cfg_file="hydra/launcher/submitit_slurm", options=["basic"]
    )
    said = errors.explain(error, ["hydra/launcher=slurm"])
    assert said is not None
    assert "pip install 'dori_lightning[slurm]'" in said


def test_there_are_presets_for_one_gpu_several_and_one_box() -> None:
    names = {path.stem for path in (config.CONF / "hydra" / "launcher").glob("*.yaml")}
    assert {"slurm", "slurm_ddp", "gpus"} <= names
