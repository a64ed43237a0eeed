"""Command line: Hydra composes, one task runs, and every way to end has its exit code.

0 done, 2 the command or its input must be mended, 1 anything else that failed, 130 interrupted,
143 terminated.
Standard output carries run folders only, one line per run; everything else goes to standard error.
"""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from dori_lightning import (
    composition,
    guards,
    interruption,
    mistakes,
    ranks,
    schema,
    sweeps,
)
from dori_lightning.files import remove_partials
from dori_lightning.interruption import Interrupted
from dori_lightning.quiet import quiet_libraries
from dori_lightning.redaction import redact
from dori_lightning.report.claims import ClaimsFailedError
from dori_lightning.tasks._job_status import status_of
from dori_lightning.tasks._lock import one_writer
from dori_lightning.types import InputError

__all__ = ["JobFailed", "main"]

log = logging.getLogger(__name__)

# At import, so that the workers of a cluster know the resolvers and the checks too.
schema.register()
composition.guard()

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
    sweeps.forget_sweep()
    try:
        composition.refuse_secrets(arguments)
        guards.refuse_rerun(arguments)
        guards.refuse_device_sweep(arguments)
        try:
            # Hydra would print its own errors and exit with 1; this makes it hand them over.
            with _environment_variable(_FULL_ERROR, "1"):
                _run_hydra()
        except JobFailed as failed:
            code = failed.code
        except BrokenProcessPool:
            _say(f"dori: {sweeps.lost_worker()}\n")
            code = 1
        # Also after a failed job: the others have earned their table.
        sweeps.close_sweep()
    except Interrupted as told:
        _say_how_to_go_on(signal.Signals(told.signum).name, arguments)
        return told.code
    except KeyboardInterrupt:
        _say_how_to_go_on("interrupted", arguments)
        return 130
    except Exception as error:
        reported = _report(error, mistakes.explain(error, arguments))
        return code or reported
    finally:
        sweeps.forget_sweep()
    return code


def _say_how_to_go_on(why: str, arguments: list[str]) -> None:
    if ranks.speaks():
        sys.stderr.write(
            f"dori: {why}; what is finished is kept. To go on from here:\n"
            f"{guards.command(arguments)}\n"
        )


@hydra.main(config_path=str(schema.CONF), config_name="config", version_base="1.3")
def _run_hydra(cfg: DictConfig) -> float | None:
    """One job: run the task, or report why not and leave with the exit code."""
    try:
        with _environment_variable(_FULL_ERROR, _USERS_FULL_ERROR):
            return _run_task(cfg)
    except Interrupted as told:
        from dori_lightning.processes import leave

        leave(told)
        interruption.hand_on(told.signum)
        raise
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
    guards.refuse_sweep_over_processes(cfg, settings)
    guards.refuse_clock(cfg)
    with ExitStack() as until_the_end:
        status = None
        if ranks.speaks() and not cfg.task.get("dry_run"):
            until_the_end.enter_context(one_writer(folder))
            remove_partials(folder)
            status = until_the_end.enter_context(status_of(folder))
        task = _checked(cfg)
        # late: errors above come at once, and these import torch
        from dori_lightning.devices import pin
        from dori_lightning.progress import heard_by

        quiet_libraries()
        on_gpu = OmegaConf.select(cfg, "checkpoint.device") != "cpu"
        if "joblib" in str(settings.launcher.get("_target_")) and on_gpu:
            pin()
        if status is not None:
            until_the_end.enter_context(heard_by(status.progress))
        until_the_end.enter_context(interruption.handling())
        result: float | None = task.run(cfg, folder)
    if ranks.speaks():
        sys.stdout.write(f"{folder}\n")
        sys.stdout.flush()
    return result


def _checked(cfg: DictConfig) -> Any:
    """Module of the task that a config asks for, if nothing is wrong with the config."""
    schema.check_keys(cfg)
    if not cfg.task.get("dry_run"):  # a plan needs no data
        schema.check_missing(cfg)
    schema.check_targets(cfg)
    task = _task(cfg.task.get("name"))
    schema.check_signatures(cfg)
    return task


def _task(name: Any) -> Any:
    """Module of `dori_lightning.tasks` by name; only names of its files are imported."""
    known = sorted(file.stem for file in (schema.CONF / "task").glob("*.yaml"))
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


def _report(error: Exception, explanation: str | None) -> int:
    """Say once what happened; a traceback only for the program's own faults or on request."""
    if isinstance(error, ClaimsFailedError):
        _say(f"dori: {error}\n")
        return 1
    lost = mistakes.lost_process(error)
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
