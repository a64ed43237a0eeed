"""Command line: Hydra composes, one task runs, and every way to end has its exit code.

0 done, 2 the command or its input must be mended, 1 anything else that failed, 130 interrupted,
143 terminated.
Standard output carries run folders only, one line per run; everything else goes to standard error.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dori_lightning import config, errors
from dori_lightning.report.claims import ClaimsFailedError
from dori_lightning.runtime import peers, signals
from dori_lightning.runtime.artifacts import one_writer, remove_partials
from dori_lightning.runtime.job_status import status_of
from dori_lightning.runtime.logging import quiet_libraries
from dori_lightning.runtime.redaction import redact
from dori_lightning.runtime.signals import Interrupted
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from hydra.conf import HydraConf


# -------- guards
# Commands that would go wrong without a word, refused with the right one in the message.

CLOCK = "${now:"
"""How a setting asks the clock."""

_ONE_DEVICE = ("trainer.devices", "trainer.num_nodes")


def refuse_rerun(arguments: list[str]) -> None:
    """Refuse the one flag of Hydra's that unpickles a file."""
    for argument in arguments:
        if argument.startswith("--e"):
            raise InputError(
                f"{argument.partition('=')[0]} loads a pickle, which may execute anything\n"
                "  where: command line\n"
                "  fix:   give the command of the run again; it finishes what is missing"
            )


def refuse_device_sweep(arguments: list[str]) -> None:
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
                "  fix:   one run for each value:\n"
                + "\n".join(command([*rest, f"{override.key_or_group}={v}"]) for v in values)
            )


def refuse_sweep_over_processes(cfg: DictConfig, settings: HydraConf) -> None:
    """Refuse a sweep whose jobs would relaunch the whole sweep to get their other processes."""
    if settings.mode is not RunMode.MULTIRUN:
        return
    swept = OmegaConf.select(settings, "sweeper.params") or {}  # type: ignore[arg-type]
    over = next((key for key in _ONE_DEVICE if key in swept), None)
    devices = cfg.trainer.get("devices", 1)
    nodes = cfg.trainer.get("num_nodes", 1)
    several = str(devices) not in ("1", "[0]", "0,") or nodes != 1
    # submitit starts one task per rank itself: nothing is relaunched
    ranks_started = _tasks(cfg, settings) == (devices, nodes)
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
        "  fix:   run each job by itself, as in\n"
        f"{command([*overrides, f'trainer.devices={devices}'])}\n"
        "         or sweep with one device per job: trainer.devices=1 trainer.num_nodes=1\n"
        "         or on SLURM, which starts every process itself: hydra/launcher=slurm_ddp\n"
    )
    # Not an error of this job alone: the rest of the sweep must not start.
    sys.exit(2)


def _tasks(cfg: DictConfig, settings: HydraConf) -> tuple[Any, Any]:
    """Tasks per node and nodes that the launcher starts for a job; its own may follow trainer."""
    # a job's Hydra node stands alone, and what it says of the trainer's would lead nowhere
    launcher = OmegaConf.to_container(settings.launcher, resolve=False)
    view = OmegaConf.create({"trainer": cfg.trainer, "launcher": launcher})
    return view.launcher.get("tasks_per_node", 1), view.launcher.get("nodes", 1)


def refuse_clock(cfg: DictConfig) -> None:
    """Refuse a folder named after the time where several processes would each ask the clock."""
    started = max(
        int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
    )
    # those that Lightning starts are told the folder
    if started == 1:
        return
    given = OmegaConf.to_container(cfg, resolve=False)
    hydra = OmegaConf.to_container(HydraConfig.instance().cfg, resolve=False)
    assert isinstance(given, dict)
    assert isinstance(hydra, dict)
    settings = {
        "hydra.run.dir": hydra["hydra"]["run"]["dir"],
        "paths.output": given["paths"]["output"],
        "name": given["name"],
    }
    for key, text in settings.items():
        if CLOCK in str(text):
            raise InputError(
                f"each of {started} processes would have a folder of its own: all ask the clock\n"
                f"  where: {key}={text}\n"
                f"  fix:   give the run a fixed name: name=NAME"
            )


def command(arguments: list[str]) -> str:
    """The command line of some arguments, indented as messages have it."""
    return f"         python -m dori_lightning {shlex.join(arguments)}"


# -------- sweeps
# A sweep's beginning and end: what must not start, and the one table or the sum of the plans.
#
# Hydra tells its callbacks of a sweep's end only where no job failed, and turns what they raise
# into warnings. A table that lacks the row of a failed job is still the table of the others, and
# one that cannot be made is an error: so the callbacks only remember the sweep, and the command
# line closes it. What must not start ends the program, which is no exception that Hydra catches.

SWEEP_LOCK = "sweep.lock"

_open: list[DictConfig] = []
_held: list[Path] = []
_locks = ExitStack()


class SweepTable(Callback):
    """Have the audits of a sweep put into one table in the sweep's folder."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Remember the sweep that begins."""
        _open[:] = [config]


class SweepGuard(Callback):
    """Refuse sweeps that would go wrong without a word, and let no two into one folder."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check the sweep that begins, and hold its folder until the program ends.

        Raises:
            SystemExit: It must not start; why was said.
        """
        try:
            _refuse_many_of_it()
            _refuse_clock(config)
            if not config.task.get("dry_run"):
                place = Path(str(OmegaConf.select(config, "hydra.sweep.dir")))
                _locks.enter_context(one_writer(place, SWEEP_LOCK))
                _held[:] = [place]
        except InputError as error:
            sys.stderr.write(f"dori: {error}\n")
            sys.exit(2)


def _refuse_many_of_it() -> None:
    """Refuse a sweep that torchrun or srun started several times over."""
    for variable in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        count = os.environ.get(variable, "1")
        if count != "1":
            raise InputError(
                f"{count} processes were started, and each would run the whole sweep\n"
                f"  where: {variable}={count}\n"
                f"  fix:   start the sweep once, and have SLURM start its jobs:\n"
                + command([*sys.argv[1:], "hydra/launcher=slurm"])
            )


def _refuse_clock(config: DictConfig) -> None:
    """Refuse a folder named after the time where jobs are composed anew, each by its own clock."""
    launcher = str(OmegaConf.select(config, "hydra.launcher._target_"))
    if launcher.endswith(".BasicLauncher"):
        return
    for key in ("hydra.sweep.dir", "hydra.sweep.subdir", "sweep", "paths.output"):
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        plain = OmegaConf.to_container(node, resolve=False)
        assert isinstance(plain, dict)
        if CLOCK in str(plain[name]):
            raise InputError(
                f"every job would have a sweep's folder of its own: each asks the clock\n"
                f"  where: {key}={plain[name]}\n"
                f"  fix:   give the sweep a fixed name, which also lets the same command finish "
                f"what is missing: sweep=NAME"
            )


def forget_sweep() -> None:
    """Forget a sweep that another command left behind, and give its folder back."""
    _open.clear()
    _held.clear()
    _locks.close()


def lost_worker() -> str:
    """Say that a process that works on a sweep's jobs was killed, and which jobs that has cut.

    To be called when no job runs any more: its launcher ends all workers over one.
    """
    from dori_lightning.runtime.job_status import FILE, read_status

    cut, where = [], "hydra.launcher"
    for place in _held:
        folders = sorted(path.parent for path in place.glob(f"*/{FILE}"))
        statuses = [(folder.name, read_status(folder)) for folder in folders]
        # nobody was there to write anything else
        cut = [name for name, status in statuses if status and status.state == "running"]
        where = f"{place}; task=status task.runs={place} shows every job"
    return (
        f"a worker of the sweep was killed, by the system perhaps for want of memory; cut: "
        f"{'; '.join(cut) or 'no job'}\n"
        f"  where: {where}\n"
        f"  fix:   give the same command again; what is finished is kept. If memory was short, "
        f"with fewer jobs at once: hydra.launcher.n_jobs=N"
    )


def close_sweep() -> None:
    """Aggregate the sweep that has ended; nothing where none asked for it.

    Raises:
        InputError: Its runs give no table: none finished, or the one without mitigation is
            missing.
    """
    if not _open:
        return
    config = _open.pop()
    folder = Path(str(OmegaConf.select(config, "hydra.sweep.dir")))
    # late: tasks import torch, and help must not
    if config.task.get("dry_run"):
        from dori_lightning.tasks.plan import sum_plans

        sum_plans(folder)
    else:
        from dori_lightning.tasks.report import make_table

        make_table(
            [folder],
            folder,
            images=config.report.images.value,
            max_pairs=config.report.max_pairs,
        )


# -------- cli

log = logging.getLogger(__name__)

# At import, so that the workers of a cluster know the resolvers and the checks too.
config.register()
config.guard()

_FULL_ERROR = "HYDRA_FULL_ERROR"
_USERS_FULL_ERROR = os.environ.get(_FULL_ERROR)


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
    forget_sweep()
    try:
        config.refuse_secrets(arguments)
        refuse_rerun(arguments)
        refuse_device_sweep(arguments)
        try:
            # Hydra would print its own errors and exit with 1; this makes it hand them over.
            with _environment_variable(_FULL_ERROR, "1"):
                _run_hydra()
        except JobFailed as failed:
            code = failed.code
        except BrokenProcessPool:
            _say(f"dori: {lost_worker()}\n")
            code = 1
        # Also after a failed job: the others have earned their table.
        close_sweep()
    except Interrupted as told:
        _say_how_to_go_on(signal.Signals(told.signum).name, arguments)
        return told.code
    except KeyboardInterrupt:
        _say_how_to_go_on("interrupted", arguments)
        return 130
    except Exception as error:
        reported = _report(error, errors.explain(error, arguments))
        return code or reported
    finally:
        forget_sweep()
    return code


def _say_how_to_go_on(why: str, arguments: list[str]) -> None:
    if peers.speaks():
        sys.stderr.write(
            f"dori: {why}; what is finished is kept. To go on from here:\n{command(arguments)}\n"
        )


@hydra.main(config_path=str(config.CONF), config_name="config", version_base="1.3")
def _run_hydra(cfg: DictConfig) -> float | None:
    """One job: run the task, or report why not and leave with the exit code."""
    try:
        with _environment_variable(_FULL_ERROR, _USERS_FULL_ERROR):
            return _run_task(cfg)
    except Interrupted as told:
        from dori_lightning.runtime.distributed import leave

        leave(told)
        signals.hand_on(told.signum)
        raise
    except Exception as error:
        code = _report(error, errors.explain_in_task(error))
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
    # again: a cluster's job begins here
    os.umask(0o077)
    _safe_environment()
    # W&B stages artifacts in the home folder otherwise: a copy of the run folder lacks them.
    for variable, place in {
        "WANDB_DIR": folder,
        "WANDB_DATA_DIR": folder / "wandb" / "data",
        "WANDB_CACHE_DIR": folder / "wandb" / "cache",
    }.items():
        os.environ[variable] = str(place)
    refuse_sweep_over_processes(cfg, settings)
    refuse_clock(cfg)
    with ExitStack() as until_the_end:
        status = None
        if peers.speaks() and not cfg.task.get("dry_run"):
            until_the_end.enter_context(one_writer(folder))
            remove_partials(folder)
            status = until_the_end.enter_context(status_of(folder))
        task = _checked(cfg)
        # late: errors above come at once, and these import torch
        from dori_lightning.runtime.distributed import pin
        from dori_lightning.runtime.logging import listening

        quiet_libraries()
        on_gpu = OmegaConf.select(cfg, "checkpoint.device") != "cpu"
        if "joblib" in str(settings.launcher.get("_target_")) and on_gpu:
            pin()
        if status is not None:
            until_the_end.enter_context(listening(status.progress))
        until_the_end.enter_context(signals.handling())
        result: float | None = task.run(cfg, folder)
    if peers.speaks():
        sys.stdout.write(f"{folder}\n")
        sys.stdout.flush()
    return result


def _checked(cfg: DictConfig) -> Any:
    """Module of the task that a config asks for, if nothing is wrong with the config."""
    config.check_keys(cfg)
    if not cfg.task.get("dry_run"):  # a plan needs no data
        config.check_missing(cfg)
    config.check_targets(cfg)
    task = _task(cfg.task.get("name"))
    config.check_signatures(cfg)
    return task


def _task(name: Any) -> Any:
    """Module of `dori_lightning.tasks` by name; only names of its files are imported."""
    known = sorted(file.stem for file in (config.CONF / "task").glob("*.yaml"))
    if name not in known:
        raise InputError(
            f"no task {name!r}\n  where: task.name\n  fix:   one of {', '.join(known)}: task=NAME"
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


def _report(error: Exception, explanation: str | None) -> int:
    """Say once what happened; a traceback only for the program's own faults or on request."""
    if isinstance(error, ClaimsFailedError):
        _say(f"dori: {error}\n")
        return 1
    lost = errors.lost_process(error)
    if explanation is None and lost is not None:
        sys.stderr.write(f"dori: {lost}\n")
        return 1
    if explanation is None:
        if logging.getLogger().handlers:
            log.error("failed", exc_info=error)
        else:  # the run folder's log is not open yet
            _say("".join(traceback.format_exception(error)))
        return 1
    if _USERS_FULL_ERROR == "1":
        _say("".join(traceback.format_exception(error)))
    _say(f"dori: {explanation}\n")
    return 2


def _say(text: str) -> None:
    """Write to standard error, which clusters and loggers keep in files."""
    sys.stderr.write(redact(text))
