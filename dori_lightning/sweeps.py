"""A sweep's beginning and end: what must not start, and the one table or the sum of the plans.

Hydra tells its callbacks of a sweep's end only where no job failed, and turns what they raise into
warnings. A table that lacks the row of a failed job is still the table of the others, and one that
cannot be made is an error: so the callbacks only remember the sweep, and the command line closes
it. What must not start ends the program, which is no exception that Hydra catches.
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dori_lightning.guards import CLOCK, command
from dori_lightning.tasks._lock import one_writer
from dori_lightning.types import InputError

__all__ = ["SweepGuard", "SweepTable", "close_sweep", "forget_sweep", "lost_worker"]

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
                f"  mend:  start the sweep once, and have SLURM start its jobs:\n"
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
                f"  mend:  give the sweep a fixed name, which also lets the same command finish "
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
    from dori_lightning.tasks._job_status import FILE, read_status

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
        f"  mend:  give the same command again; what is finished is kept. If memory was short, "
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
        from dori_lightning.tasks._plan import sum_plans

        sum_plans(folder)
    else:
        from dori_lightning.tasks.report import make_table

        make_table(
            [folder],
            folder,
            images=config.report.images.value,
            max_pairs=config.report.max_pairs,
        )
