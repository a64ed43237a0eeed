"""What is done when all jobs of a sweep have ended: one table, or the sum of their plans.

Hydra tells its callbacks of a sweep's end only where no job failed, and turns what they raise into
warnings. A table that lacks the row of a failed job is still the table of the others, and one that
cannot be made is an error: so the callback only remembers the sweep, and the command line closes
it.
"""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

__all__ = ["SweepTable", "close_sweep", "forget_sweep"]

_open: list[DictConfig] = []


class SweepTable(Callback):
    """Have the audits of a sweep put into one table in the sweep's folder."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Remember the sweep that begins."""
        _open[:] = [config]


def forget_sweep() -> None:
    """Forget a sweep that another command left behind."""
    _open.clear()


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

        make_table([folder], folder)
