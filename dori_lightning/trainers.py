"""How the processes of one run come about.

They are started by whoever is there to do it: Lightning, which runs the same command again for
each further device, ``torchrun``, or a cluster with one task for each process.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import lightning.pytorch as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from dori_lightning import processes
from dori_lightning.types import InputError

__all__ = ["SubmititEnvironment", "Trainer", "start"]


class SubmititEnvironment(ClusterEnvironment):
    """One process for each task that submitit started without SLURM."""

    def __init__(self) -> None:
        import submitit

        self._job = submitit.JobEnvironment()
        self._group = submitit.helpers.TorchDistributedEnvironment()

    @property
    def creates_processes_externally(self) -> bool:
        """Always: submitit started them."""
        return True

    @property
    def main_address(self) -> str:
        """Host of the first process."""
        return str(self._group.master_addr)

    @property
    def main_port(self) -> int:
        """Port of the first process."""
        return int(self._group.master_port)

    @staticmethod
    def detect() -> bool:
        """Whether submitit's local executor started this process."""
        return os.environ.get("SUBMITIT_EXECUTOR") == "local"

    def world_size(self) -> int:
        """Number of processes."""
        return int(self._job.num_tasks)

    def set_world_size(self, size: int) -> None:
        """Nothing to set: submitit decided."""

    def global_rank(self) -> int:
        """Number of this process among all."""
        return int(self._job.global_rank)

    def set_global_rank(self, rank: int) -> None:
        """Nothing to set: submitit decided."""

    def local_rank(self) -> int:
        """Number of this process on its node."""
        return int(self._job.local_rank)

    def node_rank(self) -> int:
        """Number of this node."""
        return int(self._job.node)


class _NoSignals(_SignalConnector):
    """Leave signals to the program.

    Lightning's handler of SIGTERM talks to the other processes from within, in the middle of
    whatever they are doing, and the one it has for SLURM writes its checkpoint there.
    """

    def register_signal_handlers(self) -> None:
        """Register none."""


class Trainer(L.Trainer):
    """Lightning's Trainer, on the processes that a cluster started, if any; signals are not its.

    Takes what Lightning's does.

    Raises:
        InputError: Its settings contradict each other or the machine.
    """

    @functools.wraps(L.Trainer.__init__)  # type: ignore[misc]
    def __init__(self, **settings: Any) -> None:
        given = settings.pop("plugins", None) or []
        plugins = [*(given if isinstance(given, list | tuple) else [given])]
        if not any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
            if SLURMEnvironment.detect():
                # submitit, or the user, puts a job back into the queue
                plugins.append(SLURMEnvironment(auto_requeue=False))
            elif SubmititEnvironment.detect():
                plugins.append(SubmititEnvironment())
        try:
            super().__init__(**settings, plugins=plugins or None)
        except MisconfigurationException as error:
            # settings that contradict each other or the machine, such as a GPU that is not there
            raise InputError(
                f"no Trainer can be made: {str(error).splitlines()[0]}\n"
                f"  where: trainer.*\n"
                f"  mend:  trainer=cpu where there is no GPU; else change what it names"
            ) from error
        self._signal_connector = _NoSignals(self)


def start(trainer: L.Trainer) -> None:
    """Have every process of a trainer running and joined; at once where there is but one.

    What comes before runs in the first process alone if Lightning starts the others.

    Raises:
        InputError: Fewer or more processes were started than the trainer is set to use.
    """
    if dist.is_initialized():
        return
    _check_started(trainer)
    if trainer.world_size == 1:
        return
    launcher = trainer.strategy.launcher
    assert launcher is not None
    launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
    processes.prepare()


def _check_started(trainer: L.Trainer) -> None:
    """Refuse a number of tasks that is not the trainer's: the processes would wait for ever."""
    wanted = trainer.num_devices * trainer.num_nodes
    asked = f"trainer.devices={trainer.num_devices} trainer.num_nodes={trainer.num_nodes}"
    for variable, what in (("SLURM_NTASKS", "SLURM tasks"), ("WORLD_SIZE", "processes")):
        started = os.environ.get(variable)
        if started is None or not _external(trainer):
            continue
        if int(started) != wanted:
            raise InputError(
                f"{started} {what} were started for {wanted} processes\n"
                f"  where: {variable}={started} and {asked}\n"
                f"  mend:  start one for each process: srun --nodes={trainer.num_nodes} "
                f"--ntasks-per-node={trainer.num_devices} python -m dori_lightning ..., or "
                f"torchrun --nnodes={trainer.num_nodes} --nproc-per-node={trainer.num_devices} "
                f"-m dori_lightning ..., or set trainer.devices and trainer.num_nodes to match"
            )
        return


def _external(trainer: L.Trainer) -> bool:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return environment is not None and environment.creates_processes_externally
