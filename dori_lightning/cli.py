"""Command line: Hydra composes a configuration, one task runs, and each end has its exit code.

0 done, 1 failed, 2 the command or its input must be fixed, 130 interrupted, 143 terminated.
Standard output carries run folders only, one line per run; everything else goes to standard error.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from dori_lightning import config, errors
from dori_lightning.runtime import job_status, peers, signals
from dori_lightning.runtime.artifacts import one_writer, released_on_failure, remove_partials
from dori_lightning.runtime.logging import quiet_libraries
from dori_lightning.runtime.redaction import redact
from dori_lightning.runtime.signals import Interrupted
from dori_lightning.types import ClaimsFailedError, InputError

if TYPE_CHECKING:
    from hydra.conf import HydraConf


log = logging.getLogger(__name__)

# at import, so that the workers of a cluster know the resolvers and the checks too
config.register()
config.guard()

SWEEP_LOCK = "sweep.lock"

_CLOCK = "${now:"
"""How a setting asks the clock."""

_WITHOUT_PAIRS = ("report", "statistics", "status")
"""Tasks that read no list of pairs."""

_LISTS = "dori_lightning.pairs.readers."
"""Where readers of lists of text are, which are imported without torch."""

_HOLDS_IMAGES = f"{_LISTS}ParquetPairs"
"""The reader among them whose files may hold the images too, and so are long."""

_PROCESSES = ("trainer.devices", "trainer.num_nodes")
_NOT_SWEPT = "cannot be swept: jobs of one sweep share a process"
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
    try:
        return _main([_with_home(argument) for argument in sys.argv[1:]])
    except BrokenPipeError:  # whoever reads, such as head, has enough
        return 0
    finally:
        _close_output()


def _with_home(argument: str) -> str:
    """An override whose value begins with ``~`` with the home folder: Hydra would refuse it."""
    name, equals, value = argument.partition("=")
    at_home = re.match(r"~[\w.-]*(/|$)", value)
    return f"{name}={os.path.expanduser(value)}" if equals and at_home else argument  # noqa: PTH111


def _close_output() -> None:
    """Write what standard output still holds; nobody is told where nobody reads."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # the interpreter flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(arguments: list[str]) -> int:
    """Run a command line; returns as `main` does."""
    if not arguments:
        sys.stderr.write(
            "Nothing chosen. Two commands to begin with:\n\n"
            "    python -m dori_lightning +experiment=audit    audit the embedded benchmark\n"
            "    python -m dori_lightning --help               what can be chosen and set\n"
        )
        return 2
    _protect()
    # argparse takes no overrides on both sides of a flag: a=1 -m b=2
    overrides = [a for a in arguments if not a.startswith("-") and "=" in a]
    sys.argv[1:] = [*overrides, *(a for a in arguments if a not in overrides)]
    code = 0
    forget_sweep()
    try:
        peers.check_environment()
        config.refuse_secrets(arguments)
        refuse_flags(arguments)
        refuse_device_sweep(arguments)
        try:
            # Hydra would print its own errors and exit with 1; this makes it raise them
            with _full_errors("1"):
                _run_hydra()
        except JobFailed as failed:
            code = failed.code
        except BrokenProcessPool:
            _say(f"dori: {lost_worker()}\n")
            code = 1
        _say_how_to_sync()
        # also after a failed job: the others have a table all the same
        close_sweep()
    except Interrupted as received:
        _say_how_to_resume(signal.Signals(received.signum).name, arguments)
        return received.code
    except KeyboardInterrupt:
        _say_how_to_resume("interrupted", arguments)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        reported = _report(error, errors.explain(error, arguments))
        return code or reported
    finally:
        forget_sweep()
    return code


@hydra.main(config_path=str(config.CONF), config_name="config", version_base="1.3")
def _run_hydra(cfg: DictConfig) -> float | None:
    """One job: run the task, or report why not and leave with the exit code."""
    try:
        with _full_errors(_USERS_FULL_ERROR):
            return _run_task(cfg)
    except Interrupted as received:
        from dori_lightning.runtime.distributed import leave

        leave(received)
        signals.hand_on(received.signum)
        raise
    except Exception as error:
        code = _report(error, errors.explain_in_task(error))
        # Hydra keeps the exceptions of a sweep; their frames would keep every failed job's model
        for link in errors.chain(error):
            traceback.clear_frames(link.__traceback__)
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        raise JobFailed(code)
    sys.exit(code)


def _run_task(cfg: DictConfig) -> float | None:
    settings = HydraConfig.get()
    folder = Path(settings.runtime.output_dir)
    _protect()  # again: a cluster's job begins here
    # W&B stages artifacts in the home folder otherwise: a copy of the run folder lacks them
    os.environ["WANDB_DIR"] = str(folder)
    os.environ["WANDB_DATA_DIR"] = str(folder / "wandb" / "data")
    os.environ["WANDB_CACHE_DIR"] = str(folder / "wandb" / "cache")
    refuse_sweep_over_processes(cfg, settings)
    refuse_clock(cfg)
    with ExitStack() as stack:
        status = None
        if peers.speaks() and not cfg.task.get("dry_run"):
            stack.enter_context(one_writer(folder))
            remove_partials(folder)
            status = stack.enter_context(job_status.status_of(folder))
            stack.enter_context(released_on_failure(folder))
        task = _checked_task(cfg)
        # late: the errors above come at once, and these import torch
        from dori_lightning.runtime.distributed import pin
        from dori_lightning.runtime.logging import listening

        quiet_libraries()
        on_gpu = OmegaConf.select(cfg, "checkpoint.device") != "cpu"
        if "joblib" in str(settings.launcher.get("_target_")) and on_gpu:
            pin()
        if status is not None:
            stack.enter_context(listening(status.progress))
        stack.enter_context(signals.handling())
        result: float | None = task.run(cfg, folder)
    if peers.speaks():
        sys.stdout.write(f"{folder}\n")
        sys.stdout.flush()
    return result


def _checked_task(cfg: DictConfig) -> Any:
    """Module of the task that a config asks for, if nothing is wrong with the config."""
    config.check_keys(cfg)
    if not cfg.task.get("dry_run"):  # a plan needs no data
        config.check_missing(cfg)
    config.check_targets(cfg)
    if not cfg.task.get("dry_run"):
        check_inputs(cfg)
    task = _task(cfg.task.get("name"))
    config.check_signatures(cfg)
    return task


def check_inputs(cfg: DictConfig) -> None:
    """Look for files, and read the list of pairs without its images: all before torch is imported.

    Raises:
        InputError: A file is not there, something is wrong with the list, or it has too few
            controls for the error rate asked for.
    """
    config.check_files(cfg)
    # an edit that is given has been found for its pairs already
    if cfg.task.get("name") in _WITHOUT_PAIRS or cfg.task.get("edit"):
        return
    named = [node["_target_"] for _, node in config.targets(cfg, "pairs")]
    # others may need torch, such as the embedded benchmark's, which draws its images
    if _HOLDS_IMAGES in named or not all(name.startswith(_LISTS) for name in named):
        return
    config.check_signatures(cfg, under="pairs")
    from dori_lightning.pairs.copies import check_evidence
    from dori_lightning.pairs.validation import names_only

    with names_only():
        pairs = instantiate(cfg.pairs).read()
    if cfg.task.get("name") == "audit":
        config.check_signatures(cfg, under="evidence")
        evidence, reference = instantiate(cfg.evidence), bool(cfg.reference)
        check_evidence(pairs, cfg.pairs.self_controls, evidence, reference=reference)


def _task(name: Any) -> Any:
    """Module of `dori_lightning.tasks` by name; only those with a ``conf/task/*.yaml``."""
    known = sorted(file.stem for file in (config.CONF / "task").glob("*.yaml"))
    if name not in known:
        raise InputError(
            f"no task {name!r}", where="task.name", fix=f"one of {', '.join(known)}: task=NAME"
        )
    return import_module(f"dori_lightning.tasks.{name}")


def _protect() -> None:
    """Keep results private, since they reproduce training images, and run no downloaded code.

    What ``trainer.deterministic=true`` asks of cuBLAS is set here: torch looks at the first matrix
    product, which is long before there is a Trainer, and refuses all later ones without it.
    """
    os.umask(0o077)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@contextmanager
def _full_errors(value: str | None) -> Iterator[None]:
    """Set Hydra's variable that lets exceptions through; None leaves it out."""
    before = os.environ.get(_FULL_ERROR)
    try:
        _set_full_errors(value)
        yield
    finally:
        _set_full_errors(before)


def _set_full_errors(value: str | None) -> None:
    os.environ.pop(_FULL_ERROR, None)
    if value is not None:
        os.environ[_FULL_ERROR] = value


def _report(error: Exception, explanation: str | None) -> int:
    """Say once what happened; a traceback only for the program's own faults or on request."""
    if isinstance(error, ClaimsFailedError):
        _say(f"dori: {error}\n")
        return 1
    if explanation is None:
        lost = errors.lost_process(error)
        if lost is not None:
            sys.stderr.write(f"dori: {lost}\n")
        elif logging.getLogger().handlers:
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


def _say_how_to_resume(why: str, arguments: list[str]) -> None:
    if peers.speaks():
        sys.stderr.write(
            f"dori: {why}; finished results are kept. To resume:\n{command(arguments)}\n"
        )


def command(arguments: list[str]) -> str:
    """The command line of some arguments, indented as messages have it."""
    return f"         python -m dori_lightning {shlex.join(arguments)}"


# Commands that would go wrong without a message of their own.


def refuse_flags(arguments: list[str]) -> None:
    """Refuse settings written as flags, and the one flag of Hydra's that unpickles a file."""
    settings = {*config.groups(), *(item.name for item in fields(config.Config))}
    for argument, following in pairwise([*arguments, ""]):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("--"):
            continue
        if name in settings or name.partition(".")[0] in settings:
            plus = "+" if name == "experiment" else ""
            raise InputError(
                f"{name} is a setting, not a flag",
                where=argument,
                fix=f"write {plus}{name}={value if equals else following or 'VALUE'}",
            )
        if name.startswith("e"):
            raise InputError(
                f"--{name} loads a pickle, which may execute anything",
                where="command line",
                fix="give the command of the run again; it finishes what is missing",
            )


def refuse_device_sweep(arguments: list[str]) -> None:
    """Refuse ``trainer.devices=1,2``: the first job's process group leaks into the second."""
    parser = OverridesParser.create()
    for argument in arguments:
        if not argument.lstrip("+").startswith(_PROCESSES):
            continue
        override = parser.parse_override(argument)
        if override.is_sweep_override():
            key = override.key_or_group
            rest = [a for a in arguments if a not in (argument, "-m", "--multirun")]
            runs = [command([*rest, f"{key}={v}"]) for v in override.sweep_string_iterator()]
            raise InputError(
                f"{key} {_NOT_SWEPT}",
                where=argument,
                fix="one run for each value:\n" + "\n".join(runs),
            )


def refuse_sweep_over_processes(cfg: DictConfig, settings: HydraConf) -> None:
    """End a sweep whose jobs would relaunch the whole sweep to get their other processes."""
    if settings.mode is not RunMode.MULTIRUN:
        return
    swept = OmegaConf.select(settings, "sweeper.params") or {}  # type: ignore[arg-type]
    key = next((key for key in _PROCESSES if key in swept), None)
    devices, nodes = cfg.trainer.get("devices", 1), cfg.trainer.get("num_nodes", 1)
    one_process = str(devices) in ("1", "[0]", "0,") and nodes == 1
    # submitit starts one task per rank itself: nothing is relaunched
    if key is None and (one_process or _launched_tasks(cfg, settings) == (devices, nodes)):
        return
    what, where = f"{key} {_NOT_SWEPT}", "hydra.sweeper.params"
    if key is None:
        asked = f"trainer.devices={devices}, trainer.num_nodes={nodes}"
        what, where = f"a sweep runs one device per job, not {asked}", "trainer"
    overrides = [
        o for o in settings.overrides.task if not o.lstrip("+").startswith("trainer.devices=")
    ]
    one_run = command([*overrides, f"trainer.devices={devices}"])
    error = InputError(
        what,
        where=where,
        fix=f"run each job by itself, as in\n{one_run}\n"
        "         or sweep with one device per job: trainer.devices=1 trainer.num_nodes=1\n"
        "         or on SLURM, which starts every process itself: hydra/launcher=slurm_ddp",
    )
    _end_sweep(error)


def _end_sweep(error: InputError) -> None:
    """Leave the program: Hydra would catch an exception, and start the rest of the sweep."""
    sys.stderr.write(f"dori: {error}\n")
    sys.exit(2)


def _launched_tasks(cfg: DictConfig, settings: HydraConf) -> tuple[Any, Any]:
    """Tasks per node and nodes that the launcher starts for a job; they may follow the trainer."""
    # a job's Hydra node stands alone: its references to the trainer would lead nowhere
    launcher = OmegaConf.to_container(settings.launcher, resolve=False)
    view = OmegaConf.create({"trainer": cfg.trainer, "launcher": launcher})
    return view.launcher.get("tasks_per_node", 1), view.launcher.get("nodes", 1)


def refuse_clock(cfg: DictConfig) -> None:
    """Refuse a folder named after the time where several processes would each ask the clock."""
    count, _ = _started_processes()
    # those that Lightning starts are told the folder
    if count == 1:
        return
    root: Any = HydraConfig.instance().cfg
    setting = _clock_setting(root, "hydra.run.dir") or _clock_setting(cfg, "paths.output", "name")
    if setting is not None:
        raise InputError(
            f"each of {count} processes would have a folder of its own: all ask the clock",
            where=setting,
            fix="give the run a fixed name: name=NAME",
        )


def _started_processes() -> tuple[int, str]:
    """How many processes torchrun or srun started, and the variable that says so."""
    counts = {name: peers.number_in(name, 1) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")}
    name = max(counts, key=counts.__getitem__)
    return counts[name], name


def _clock_setting(cfg: DictConfig, *keys: str) -> str | None:
    """The first of some settings that asks the clock, as ``key=value``."""
    for key in keys:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.to_container(OmegaConf.select(cfg, parent) if parent else cfg)
        assert isinstance(node, dict)
        if _CLOCK in str(node[name]):
            return f"{key}={node[name]}"
    return None


# Hydra tells its callbacks of a sweep's end only where no job failed, and turns what they raise
# into warnings. A table that lacks the row of a failed job is still the table of the others, and
# one that cannot be made is an error: so the callbacks only remember the sweep, and the command
# line closes it.


@dataclass
class _Sweep:
    """The sweep that runs.

    Attributes:
        config: Its configuration.
        wants_table: Whether it asked for one table; it fails where there can be none.
        folder: Its folder; None where it is not locked.
        lock: Holds the folder's lock.
    """

    config: DictConfig | None = None
    wants_table: bool = False
    folder: Path | None = None
    lock: ExitStack = field(default_factory=ExitStack)


_sweep = _Sweep()


class SweepTable(Callback):
    """Have the audits of a sweep put into one table in the sweep's folder."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Remember that the sweep that begins is to have one."""
        del config
        _sweep.wants_table = True


class SweepGuard(Callback):
    """Refuse sweeps that would fail without a message, and let no two write to one folder."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check the sweep that begins, and lock its folder until the program ends.

        Raises:
            SystemExit: It must not start; the reason was printed.
        """
        try:
            _check_sweep(config)
            _sweep.config = config
            if not config.task.get("dry_run"):
                folder = _sweep_folder(config)
                _sweep.lock.enter_context(one_writer(folder, SWEEP_LOCK))
                _sweep.folder = folder
        except InputError as error:
            _end_sweep(error)


def _check_sweep(config: DictConfig) -> None:
    """Refuse a sweep that was started several times over, or whose jobs would not share a folder.

    Raises:
        InputError: torchrun or srun started several processes, or a launcher that composes each
            job anew would name the sweep's folder after the time of each.
    """
    count, variable = _started_processes()
    if count != 1:
        raise InputError(
            f"{count} processes were started, and each would run the whole sweep",
            where=f"{variable}={count}",
            fix="start the sweep once, and have SLURM start its jobs:\n"
            + command([*sys.argv[1:], "hydra/launcher=slurm"]),
        )
    keys = ("hydra.sweep.dir", "hydra.sweep.subdir", "sweep", "paths.output")
    setting = _clock_setting(config, *keys)
    launcher = str(OmegaConf.select(config, "hydra.launcher._target_"))
    if setting is not None and not launcher.endswith(".BasicLauncher"):
        raise InputError(
            "every job would have a sweep's folder of its own: each asks the clock",
            where=setting,
            fix="give the sweep a fixed name, which also lets the same command finish what is "
            "missing: sweep=NAME",
        )


def _sweep_folder(config: DictConfig) -> Path:
    return Path(str(OmegaConf.select(config, "hydra.sweep.dir")))


def forget_sweep() -> None:
    """Forget the sweep of an earlier command, and release its folder."""
    global _sweep
    _sweep.lock.close()
    _sweep = _Sweep()


def lost_worker() -> str:
    """Say that a worker of a sweep was killed, and which jobs were cut short.

    To be called when no job runs any more: its launcher ends all workers over one.
    """
    cut, where = [], "hydra.launcher"
    if _sweep.folder is not None:
        where = f"{_sweep.folder}; task=status task.runs={_sweep.folder} shows every job"
        for path in sorted(_sweep.folder.glob(f"*/{job_status.FILE}")):
            status = job_status.read_status(path.parent)
            if status is not None and status.state == "running":  # its process left no other word
                cut.append(path.parent.name)
    return str(
        InputError(
            f"a worker of the sweep was killed, perhaps by the system for lack of memory; cut: "
            f"{'; '.join(cut) or 'no job'}",
            where=where,
            fix="give the same command again; finished results are kept. If memory was short, "
            "with fewer jobs at once: hydra.launcher.n_jobs=N",
        )
    )


def _say_how_to_sync() -> None:
    """Say how the runs of a sweep are uploaded that were written offline."""
    if _sweep.folder is None or not any(_sweep.folder.glob("*/wandb")):
        return
    from dori_lightning.tracking import has_offline_runs, sync_command  # late: imports torch

    if has_offline_runs(_sweep.folder, sweep=True):
        command = sync_command(_sweep.folder, sweep=True)
        log.info("Weights & Biases: offline. To upload the runs of this sweep:\n%s", command)


def close_sweep() -> None:
    """Write the page of the sweep that has ended, and its table where its audits make one.

    Raises:
        InputError: It asked for a table and its runs give none: none finished, or the one without
            mitigation is missing.
    """
    cfg, wants_table = _sweep.config, _sweep.wants_table
    _sweep.config, _sweep.wants_table = None, False
    if cfg is None:
        return
    folder = _sweep_folder(cfg)
    if not wants_table and not any(folder.glob("*/report.json")):
        return
    # late: tasks import torch, and help must not
    if cfg.task.get("dry_run"):
        from dori_lightning.tasks.plan import sum_plans

        sum_plans(folder)
    else:
        from dori_lightning.tasks.report import make_table

        images, max_pairs = cfg.report.images.value, cfg.report.max_pairs
        make_table([folder], folder, images=images, max_pairs=max_pairs, or_list=not wants_table)
