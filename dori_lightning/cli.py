"""Command line: Hydra composes, one task runs, and every way to end has its exit code.

0 done, 2 the command or its input must be mended, 1 anything else that failed, 130 interrupted.
Standard output carries run folders only, one line per run; everything else goes to standard error.
"""

import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dori_lightning import mistakes, schema, sweeps
from dori_lightning.report.claims import ClaimsFailedError
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from hydra.conf import HydraConf

__all__ = ["JobFailed", "main"]

log = logging.getLogger(__name__)

# At import, so that the workers of a cluster know the resolvers too.
schema.register()

_FULL_ERROR = "HYDRA_FULL_ERROR"
_USERS_FULL_ERROR = os.environ.get(_FULL_ERROR)
_ONE_DEVICE = ("trainer.devices", "trainer.num_nodes")


class JobFailed(Exception):  # noqa: N818  # a state that is passed on, already reported
    """A job of a sweep failed and said so; carries its exit code, nothing that keeps a model."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def main() -> int:
    """Run the command line in ``sys.argv``.

    Returns:
        Exit code of a run that came back; single jobs that fail leave by `SystemExit` with theirs.
    """
    arguments = sys.argv[1:]
    if not arguments:
        sys.stderr.write(
            "Nothing chosen. Two commands to begin with:\n\n"
            "    python -m dori_lightning +experiment=audit    audit the embedded benchmark\n"
            "    python -m dori_lightning --help               what can be chosen and set\n"
        )
        return 2
    # Results reproduce training images: private unless the user opens them.
    os.umask(0o077)
    _safe_environment()
    # argparse takes no overrides on both sides of a flag: a=1 -m b=2
    overrides = [a for a in arguments if not a.startswith("-") and "=" in a]
    sys.argv[1:] = [*overrides, *(a for a in arguments if a not in overrides)]
    code = 0
    sweeps.forget_sweep()
    try:
        _refuse_rerun(arguments)
        _refuse_device_sweep(arguments)
        try:
            # Hydra would print its own errors and exit with 1; this makes it hand them over.
            with _environment_variable(_FULL_ERROR, "1"):
                _run_hydra()
        except JobFailed as failed:
            code = failed.code
        # Also after a failed job: the others have earned their table.
        sweeps.close_sweep()
    except KeyboardInterrupt:
        sys.stderr.write("dori: interrupted; the same command goes on from here\n")
        return 130
    except Exception as error:
        reported = _report(error, mistakes.explain(error, arguments))
        return code or reported
    return code


@hydra.main(config_path=str(schema.CONF), config_name="config", version_base="1.3")
def _run_hydra(cfg: DictConfig) -> float | None:
    """One job: run the task, or report why not and leave with the exit code."""
    try:
        with _environment_variable(_FULL_ERROR, _USERS_FULL_ERROR):
            return _run_task(cfg)
    except Exception as error:
        code = _report(error, mistakes.explain_in_task(error))
        # Hydra keeps the exceptions of a sweep; their frames would keep every failed job's model.
        while_handling: BaseException | None = error
        while while_handling is not None:
            traceback.clear_frames(while_handling.__traceback__)
            while_handling = while_handling.__cause__ or while_handling.__context__
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        raise JobFailed(code)
    sys.exit(code)


def _run_task(cfg: DictConfig) -> float | None:
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    _safe_environment()
    # W&B stages artifacts in the home folder otherwise: a copy of the run folder lacks them.
    for variable, place in {
        "WANDB_DIR": folder,
        "WANDB_DATA_DIR": folder / "wandb" / "data",
        "WANDB_CACHE_DIR": folder / "wandb" / "cache",
    }.items():
        os.environ[variable] = str(place)
    _refuse_sweep_over_processes(cfg, settings)
    schema.check_keys(cfg)
    if not cfg.task.get("dry_run"):  # a plan needs no data
        schema.check_missing(cfg)
    schema.check_targets(cfg)
    task = _task(cfg.task.get("name"))
    schema.check_signatures(cfg)
    result: float | None = task.run(cfg, folder)
    if _rank() == 0:
        sys.stdout.write(f"{folder}\n")
        sys.stdout.flush()
    return result


def _task(name: Any) -> Any:
    """Module of `dori_lightning.tasks` by name; only names of its files are imported."""
    here = Path(__file__).resolve().parent / "tasks"
    known = sorted(file.stem for file in here.glob("*.py") if not file.stem.startswith("_"))
    if name not in known:
        raise InputError(
            f"no task {name!r}\n  where: task.name\n  mend:  one of {', '.join(known)}: task=NAME"
        )
    return import_module(f"dori_lightning.tasks.{name}")


def _safe_environment() -> None:
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@contextmanager
def _environment_variable(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.get(name)
    _set(name, value)
    try:
        yield
    finally:
        _set(name, before)


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _rank() -> int:
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if variable in os.environ:
            return int(os.environ[variable])
    return 0


def _report(error: Exception, explanation: str | None) -> int:
    """Say once what happened; a traceback only for the program's own faults or on request."""
    if isinstance(error, ClaimsFailedError):
        sys.stderr.write(f"dori: {error}\n")
        return 1
    if explanation is None:
        if logging.getLogger().handlers:
            log.error("failed", exc_info=error)
        else:  # the run folder's log is not open yet
            traceback.print_exception(error)
        return 1
    if _USERS_FULL_ERROR == "1":
        traceback.print_exception(error)
    sys.stderr.write(f"dori: {explanation}\n")
    return 2


def _refuse_rerun(arguments: list[str]) -> None:
    """Refuse the one flag of Hydra's that unpickles a file."""
    for argument in arguments:
        if argument.startswith("--e"):
            raise InputError(
                f"{argument.partition('=')[0]} loads a pickle, which may execute anything\n"
                "  where: command line\n"
                "  mend:  give the command of the run again; it finishes what is missing"
            )


def _refuse_device_sweep(arguments: list[str]) -> None:
    """Refuse ``trainer.devices=1,2``: the first job's process group leaks into the second."""
    parser = OverridesParser.create()
    for argument in arguments:
        if not argument.lstrip("+").startswith(_ONE_DEVICE):
            continue
        override = parser.parse_override(argument)
        if override.is_sweep_override():
            rest = [a for a in arguments if a not in (argument, "-m", "--multirun")]
            values = override.sweep_string_iterator()
            raise InputError(
                f"{override.key_or_group} cannot be swept: jobs of one sweep share a process\n"
                f"  where: {argument}\n"
                "  mend:  one run for each value:\n"
                + "\n".join(_command([*rest, f"{override.key_or_group}={v}"]) for v in values)
            )


def _refuse_sweep_over_processes(cfg: DictConfig, settings: "HydraConf") -> None:
    """Refuse a sweep whose jobs would relaunch the whole sweep to get their other processes."""
    if settings.mode is not RunMode.MULTIRUN:
        return
    swept = OmegaConf.select(settings, "sweeper.params") or {}  # type: ignore[arg-type]
    over = next((key for key in _ONE_DEVICE if key in swept), None)
    devices = cfg.trainer.get("devices", 1)
    nodes = cfg.trainer.get("num_nodes", 1)
    launcher = settings.launcher
    # submitit starts one task per rank itself: nothing is relaunched
    ranks_started = launcher.get("tasks_per_node") == devices and launcher.get("nodes", 1) == nodes
    several = str(devices) not in ("1", "[0]", "0,") or nodes != 1
    if over is None and (not several or ranks_started):
        return
    overrides = [
        o for o in settings.overrides.task if not o.lstrip("+").startswith("trainer.devices=")
    ]
    if over is None:
        asked = f"trainer.devices={devices}, trainer.num_nodes={nodes}"
        what = f"a sweep runs one device per job, not {asked}"
    else:
        what = f"{over} cannot be swept: jobs of one sweep share a process"
    sys.stderr.write(
        f"dori: {what}\n"
        f"  where: {'hydra.sweeper.params' if over else 'trainer'}\n"
        "  mend:  run each job by itself, as in\n"
        f"{_command([*overrides, f'trainer.devices={devices}'])}\n"
        "         or sweep with one device per job: trainer.devices=1 trainer.num_nodes=1\n"
    )
    # Not an error of this job alone: the rest of the sweep must not start.
    sys.exit(2)


def _command(arguments: list[str]) -> str:
    return f"         python -m dori_lightning {shlex.join(arguments)}"
