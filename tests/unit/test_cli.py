"""How the program begins and ends: help, exit codes, messages, run folders, refused sweeps."""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict

from dori_lightning import cli, config, errors
from dori_lightning.cli import SweepGuard
from dori_lightning.runtime import peers
from dori_lightning.runtime.artifacts import claim_folder, is_held, write_atomically
from dori_lightning.runtime.redaction import redact
from dori_lightning.types import InputError
from support.in_process import Program

ROOT = Path(__file__).resolve().parents[2]
SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def program(
    *arguments: str, cwd: Path, code: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    start = ["-c", code] if code else ["-m", "dori_lightning"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- beginning


def test_nothing_chosen_names_two_commands_that_exist(tmp_path: Path):
    done = program(cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("python -m dori_lightning ") == 2
    assert "+experiment=audit" in done.stderr
    assert "audit" in config.groups()["experiment"]
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_option_and_imports_no_torch(tmp_path: Path):
    code = (
        "import sys, dori_lightning\n"
        "from dori_lightning.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as leaving:\n    code = leaving.code\n"
        "heavy = {'torch', 'lightning', 'diffusers', 'transformers', 'pandas', 'matplotlib'}\n"
        "sys.exit(f'imported {heavy & set(sys.modules)}' if heavy & set(sys.modules) else code)"
    )
    done = program("--help", cwd=tmp_path, code=code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    listed = {**config.groups(), **config.launchers()}
    folders = {f.parent.relative_to(config.CONF).as_posix() for f in config.CONF.rglob("*.yaml")}
    own = {group for group in folders if not group.startswith(("hydra", "mitigation/tuned", "."))}
    assert set(listed) == own | {"hydra/launcher"}
    for group, options in listed.items():
        assert any(line.split("   ")[0].strip() == group for line in lines), group
        for name, claim in options.items():
            assert claim, f"{group}/{name}.yaml begins with no comment that says what it is"
            assert any(line.split() == [name, *claim.split()] for line in lines), (group, name)


GOOD_ROWS = "file_name,prompt\na.png,x\n"


@pytest.mark.parametrize(
    ("rows", "settings", "parts"),
    [
        ("file_name,title\na.png,x\n", (), ["no column prompt"]),
        ("file_name,prompt\na.png,x\ngone.png,y\n", (), ["line 3", "no such file"]),
        ("file_name,prompt,kind\na.png,x,verbatim\n", (), ["'verbatim' is no kind"]),
        (GOOD_ROWS, ("evidence.false_discovery_rate=0.01",), ["at least 99", "this audit has 2"]),
        (GOOD_ROWS, ("checkpoint.source=/gone",), ["no file or folder /gone", "a hub id"]),
        (GOOD_ROWS, ("metrics=sscd", "metrics.descriptors.sscd.weights=./gone.pt"), ["./gone.pt"]),
    ],
)
def test_an_input_with_a_mistake_is_refused_before_torch_is_imported(
    tmp_path: Path, rows: str, settings: tuple[str, ...], parts: list[str]
):
    (tmp_path / "a.png").write_bytes(b"no image: that is told later")
    (tmp_path / "metadata.csv").write_text(rows)
    code = (
        "import sys\nfrom dori_lightning.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as leaving:\n    code = leaving.code\n"
        "sys.exit('imported torch' if 'torch' in sys.modules else code)"
    )
    arguments = ("+experiment=audit", "pairs=folder", f"pairs.path={tmp_path}", *settings)
    done = program(*arguments, cwd=tmp_path, code=code)
    assert done.returncode == 2, done.stderr
    for part in (*parts, "dori: "):
        assert part in done.stderr


def test_works_from_another_folder(tmp_path: Path):
    done = program("+experiment=audit", "--cfg", "job", "--resolve", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "name: audit-dori_tiny" in done.stdout


def test_overrides_on_both_sides_of_a_flag(run: Program, capsys: pytest.CaptureFixture[str]):
    assert run("+experiment=audit", "--cfg", "job", "seed=7") == 0
    assert "seed: 7" in capsys.readouterr().out


# --- ending


def test_last_line_is_the_run_folder_and_the_same_command_finds_it_again(
    run: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    seen: list[Path] = []

    def task(cfg: Any, folder: Path) -> None:
        logging.getLogger("dori_lightning.x").info("at work")
        seen.append(folder)

    assert run("+experiment=audit", task=task) == 0
    captured = capsys.readouterr()
    folder = tmp_path / "outputs" / "audit-dori_tiny"
    assert captured.out == f"{folder}\n"
    assert "at work" in captured.err
    assert folder.stat().st_mode & 0o077 == 0
    assert run("+experiment=audit", task=task) == 0
    assert seen == [folder, folder]


def test_a_task_sees_a_safe_environment_inside_its_run_folder(run: Program):
    def task(cfg: Any, folder: Path) -> None:
        assert os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] == "1"
        assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
        for variable in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            assert Path(os.environ[variable]).is_relative_to(folder)
        assert "HYDRA_FULL_ERROR" not in os.environ

    assert run("seed=1", task=task) == 0


def fail(error: BaseException) -> Callable[..., None]:
    def task(cfg: Any, folder: Path) -> None:
        raise error

    return task


def wrapped(cfg: Any, folder: Path) -> None:
    try:
        raise InputError("row 3: no such picture")
    except InputError as error:
        raise RuntimeError("while building pairs") from error


@pytest.mark.parametrize(
    ("task", "code", "part", "traceback"),
    [
        (fail(InputError("row 3: no such picture")), 2, "dori: row 3: no such picture\n", False),
        (wrapped, 2, "dori: row 3: no such picture\n", False),
        (fail(RuntimeError("a bug")), 1, "RuntimeError: a bug", True),
        (
            fail(RuntimeError("[gloo/pair.cc:1] Connection closed by peer [10.0.0.1]:5")),
            1,
            "dori: another process of this run is gone",
            False,
        ),
        (
            fail(OSError(28, "No space left on device", "outputs/x")),
            2,
            "dori: cannot write: No space left on device",
            False,
        ),
        (fail(KeyboardInterrupt()), 130, "interrupted", False),
    ],
)
def test_how_a_task_ends(
    run: Program,
    capsys: pytest.CaptureFixture[str],
    task: Callable[..., None],
    code: int,
    part: str,
    traceback: bool,
):
    assert run("seed=1", task=task) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count(part) == 1
    assert ("Traceback" in captured.err) is traceback


def test_full_errors_on_request(
    run: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cli, "_USERS_FULL_ERROR", "1")
    assert run("seed=1", task=fail(InputError("no such picture"))) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["seeed=3"], ["unknown key seeed", "where: seeed=3", "did you mean seed?"]),
        (["sampling.stepz=3"], ["unknown key sampling.stepz", "did you mean sampling.steps?"]),
        (["guidance=3"], ["unknown key guidance", "did you mean sampling.guidance?"]),
        (["+paths.outputs=x"], ["unknown key paths.outputs", "did you mean paths.output?"]),
        (["+foo=1"], ["unknown key foo", "where: +foo"]),
        (["checkpont=sd14"], ["unknown key checkpont", "did you mean checkpoint?"]),
        (["checkpoint=sd41"], ["no option 'sd41' in the group 'checkpoint'", "sd14", "sd21"]),
        (["+experiment=audti"], ["no option 'audti'", "did you mean experiment=audit?"]),
        (["experiment=audit"], ["write +experiment=audit"]),
        (["attack/budget=l2_smal"], ["did you mean attack/budget=l2_small?"]),
        (["seed=one"], ["'one'", "where: seed=one"]),
        (["seed=1,2"], ["where: seed=1,2", "add -m"]),
        (["seed=[1"], ["cannot read an override", "where: seed=[1"]),
        (["report.images=some"], ["'some'", "full"]),
        (
            ["checkpoint.source=???"],
            [
                "missing value for checkpoint.source",
                "checkpoint.source=VALUE",
                "checkpoint.source: a diffusers folder, a hub id",
            ],
        ),
        (["name=???"], ["name"]),
        (
            ["checkpoint._target_=os.system"],
            ["refused to build 'os.system'", "checkpoint._target_"],
        ),
        (["--experimental-rerun=x.pickle"], ["loads a pickle"]),
        (["--experiment=audit"], ["a setting, not a flag", "write +experiment=audit\n"]),
        (["--experiment", "audit"], ["write +experiment=audit\n"]),
        (["--sampling.steps=3"], ["write sampling.steps=3\n"]),
        (["~attack"], ["attack was deleted", "where: ~attack", "attack=NAME"]),
        (["~seed"], ["seed was deleted"]),
        (["~attack/budget"], ["attack/budget was deleted", "attack/budget=NAME"]),
        (["~attack.budget"], ["attack.budget was deleted", "attack/budget=NAME"]),
        (["mitigation=[none,nemo]"], ["takes one option", "-m: mitigation=none,nemo\n"]),
        (["attack/budget=[l2_small,unbounded]"], ["takes one option"]),
        (["attack=null"], ["takes the name of an option", "where: attack=null"]),
        (["checkpoint.source="], ["checkpoint.source is empty", "a diffusers folder, a hub id"]),
        (["pairs=nemo_lists", "pairs.parts.1.path="], ["pairs.parts[1].path is empty"]),
        (["name="], ["name is empty"]),
        (["paths.output="], ["paths.output is empty"]),
        (["paths.cache='~nobody-here/x'"], ["no such user", "where: paths.cache"]),
    ],
)
def test_mistakes_get_one_message_and_code_2(
    run: Program, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
):
    started: list[Path] = []
    assert run(*arguments, task=lambda cfg, folder: started.append(folder)) == 2
    captured = capsys.readouterr()
    assert started == []
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert captured.err.count("dori: ") == 1
    for part in (*parts, "where: ", "fix: "):
        assert part in captured.err


@pytest.mark.parametrize("name", [item.name for item in fields(config.Config)])
def test_no_part_of_the_configuration_can_be_deleted(name: str):
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        whole = OmegaConf.to_container(compose("config", return_hydra_config=True))
    assert isinstance(whole, dict)
    config._refuse_incomplete(whole, [])
    without = {key: value for key, value in whole.items() if key != name}
    with pytest.raises(InputError, match=f"(?s){name} was deleted.*where: ~{name}"):
        config._refuse_incomplete(without, [f"~{name}"])


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"lr:\n\tb: 1\n", ["attack/mine.yaml, line 2", "indent with spaces"]),
        (b"lr: [1\n", ["attack/mine.yaml, line 2", "correct the file"]),
        (b"lr: 1\nlr: 2\n", ["duplicate key lr", "line 2"]),
        (b"lr: caf\xe9\n", ["not UTF-8", "mine/attack/mine.yaml"]),
        (b"\0", ["special characters", "attack/mine.yaml"]),
        (b"- 1\n", ["attack/mine", "Cannot merge DictConfig with ListConfig"]),
        (b"defaults: 3\n", ["attack/mine", "write a list"]),
    ],
)
def test_mistakes_in_a_file_of_the_users_own(
    run: Program, capsys: pytest.CaptureFixture[str], content: bytes, parts: list[str]
):
    Path("mine/attack").mkdir(parents=True)
    Path("mine/attack/mine.yaml").write_bytes(content)
    assert run("--config-dir", "mine", "attack=mine") == 2
    said = capsys.readouterr().err
    assert said.count("dori: ") == 1
    assert "Traceback" not in said
    for part in (*parts, "where: ", "fix: "):
        assert part in said


@pytest.mark.parametrize("content", ["seed: 3\n", "defaults:\n  - override /task: audit\n"])
def test_an_experiment_that_is_not_global_is_told(
    run: Program, capsys: pytest.CaptureFixture[str], content: str
):
    Path("mine/experiment").mkdir(parents=True)
    Path("mine/experiment/bare.yaml").write_text(content)
    assert run("--config-dir", "mine", "+experiment=bare") == 2
    said = capsys.readouterr().err
    assert "begin experiment/bare.yaml with the line: # @package _global_" in said


PATHS = (
    "/a/b (c)/d", "/a/[b]/c", "[a]/b", "{a}", "it's", 'say "so"', "/a,b", "/a#b", "a@b!c&d;e",
    "/$(x)/`y`", "/a=b, c", "~/x", "/a/'b\"c", "tab\there", "/café —/写真",
    "/a*b?", "\\\\server\\share name", "/ends with \\",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_cannot_be_read_comes_back_quoted_so_that_it_can(path: str):
    said = errors.explain(OverrideParseException(override=f"pairs.path={path}", message="no"), [])
    assert said is not None
    assert "<redacted>" not in redact(said)
    advised = said.partition("quote it: ")[2]
    (override,) = shlex.split(advised)
    read = OverridesParser.create().parse_override(override)
    assert read.key_or_group == "pairs.path"
    assert read.value() == path


def test_several_values_may_have_been_one_text(
    run: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert run("paths.output=a,b") == 2
    said = capsys.readouterr().err
    assert "<redacted>" not in said
    (override,) = shlex.split(said.strip().rpartition("quote it: ")[2])
    assert run(override) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/a,b/")


def test_the_home_folder_in_every_path(
    run: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    seen: list[DictConfig] = []
    settings = (
        "paths.output=~/out", 'pairs.path="~/list"', "pairs=folder",
        "+task.runs=['~/a','~/b']", "checkpoint.source='~'",
    )  # fmt: skip
    assert run(*settings, task=lambda cfg, folder: seen.append(cfg)) == 0
    (cfg,) = seen
    home = str(tmp_path / "home")
    assert cfg.pairs.path == f"{home}/list"
    assert list(cfg.task.runs) == [f"{home}/a", f"{home}/b"]
    assert cfg.checkpoint.source == home
    assert (tmp_path / "home" / "out" / "audit-dori_tiny").is_dir()
    assert not Path("~").exists()


@pytest.mark.parametrize("variable", peers.NUMBERS)
@pytest.mark.parametrize("value", ["", "two"])
def test_a_launchers_variable_that_holds_no_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str, value: str
):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", ["dori-lightning", "seed=1"])
    assert cli.main() == 2
    said = capsys.readouterr().err
    assert said.count("dori: ") == 1
    assert f"where: {variable}\n" in said


def test_nobody_reads_and_nothing_is_said(tmp_path: Path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "dori_lightning", "--help"],
        cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("result", [None, "attacks/random/a.safetensors", "report.json"])
def test_a_failed_start_claims_its_folder_only_with_a_result(
    run: Program, capsys: pytest.CaptureFixture[str], result: str | None
):
    def task(cfg: Any, folder: Path) -> None:
        claim_folder(folder, {"seed": cfg.seed})
        if cfg.seed == 1:
            if result:
                write_atomically(folder / result, b"")
            raise InputError("no such luck")

    assert run("seed=1", task=task) == 2
    assert run("seed=2", task=task) == (2 if result else 0)
    assert ("holds results of other settings" in capsys.readouterr().err) is (result is not None)


def test_the_real_program_has_these_codes_too(tmp_path: Path):
    done = program("seeed=3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("dori: unknown key seeed\n")
    assert "did you mean seed?" in done.stderr


def test_unknown_task(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="no task '__init__'"):
        cli._task("__init__")
    with pytest.raises(InputError, match="no task None"):
        cli._task(None)


def test_unwritable_folder_ends_before_the_task(
    run: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "file").write_text("in the way")
    started: list[Path] = []
    assert run("paths.output=file", task=lambda cfg, folder: started.append(folder)) == 2
    message = capsys.readouterr().err
    assert "cannot write the run folder" in message
    assert "paths.output=FOLDER" in message
    assert started == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_ends_before_the_task(run: Program, tmp_path: Path):
    (tmp_path / "outputs").mkdir(mode=0o500)
    assert run("seed=1") == 2


# --- sweeps


def test_a_sweep_has_a_folder_for_each_job_and_runs_on_after_a_failure(
    run: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def task(cfg: Any, folder: Path) -> float:
        if cfg.seed == 1:
            raise InputError("seed 1 is unlucky")
        return float(cfg.seed)

    assert run("-m", "+experiment=audit", "seed=1,2", "attack/budget=l2_small", task=task) == 2
    captured = capsys.readouterr()
    folder = tmp_path / "outputs" / "sweeps" / "audit" / "attack.budget=l2_small,seed=2"
    assert captured.out == f"{folder}\n"
    assert captured.err.count("dori: seed 1 is unlucky") == 1


def test_a_failed_job_does_not_keep_its_objects(run: Program):
    import gc
    import weakref

    class Model:
        pass

    alive: list[weakref.ref[Model]] = []

    def task(cfg: Any, folder: Path) -> None:
        gc.collect()
        assert not any(ref() for ref in alive), "the job before still holds its model"
        model = Model()
        alive.append(weakref.ref(model))
        raise RuntimeError("out of memory")

    assert run("-m", "seed=1,2,3", task=task) == 1
    assert len(alive) == 3


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["trainer.devices=2"],
            ["trainer.devices=2", "python -m dori_lightning seed=1 trainer.devices=2"],
        ),
        (["trainer=ddp"], ["one device per job", "trainer=ddp"]),
        (["trainer.devices=auto"], ["one device per job"]),
        (["trainer.num_nodes=2"], ["one device per job"]),
        (
            ["trainer.devices=1,2"],
            ["cannot be swept", "trainer.devices=1\n", "trainer.devices=2\n"],
        ),
    ],
)
def test_sweeps_that_go_wrong_silently_are_refused(
    run: Program, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
):
    started: list[Path] = []
    code = run("-m", "seed=1,2", *arguments, task=lambda cfg, folder: started.append(folder))
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert started == []
    assert captured.err.count("dori: ") == 1
    for part in (*parts, "where: ", "fix: "):
        assert part in captured.err


def test_a_grid_file_may_not_sweep_over_devices(
    run: Program, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "grid.yaml").write_text(
        "# @package _global_\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      trainer.devices: 1,2\n"
    )
    started: list[Path] = []
    arguments = ("--config-dir", "mine", "+experiment=grid")
    assert run(*arguments, task=lambda cfg, folder: started.append(folder)) == 2
    assert "trainer.devices cannot be swept" in capsys.readouterr().err
    assert started == []


def test_one_device_may_be_swept_over(run: Program, capsys: pytest.CaptureFixture[str]):
    assert run("-m", "seed=1,2", "trainer.devices=1") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_only_the_first_process_prints(
    run: Program, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run("seed=1") == 0
    assert capsys.readouterr().out == ""


# --- what a sweep checks before its first job


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
    error = MissingConfigException(
        "x", missing_cfg_file="hydra/launcher/submitit_slurm", options=["basic"]
    )
    said = errors.explain(error, ["hydra/launcher=slurm"])
    assert said is not None
    assert "pip install 'dori_lightning[slurm]'" in said


def test_there_are_presets_for_one_gpu_several_and_one_box() -> None:
    names = {path.stem for path in (config.CONF / "hydra" / "launcher").glob("*.yaml")}
    assert {"slurm", "slurm_ddp", "gpus"} <= names
