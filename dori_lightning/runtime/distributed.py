"""The processes of one run: rank and shard, what all of them agree on, how they are started.

Work is shared by rank and gathered by files; only a fine-tuning's gradients and what all must
agree on travel between processes. They are started by Lightning, which runs the same command again
for each further device, by ``torchrun``, or by a cluster with one task for each process.
"""

import atexit
import functools
import logging
import os
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from dori_lightning.runtime import peers, signals
from dori_lightning.runtime.logging import waiting_for
from dori_lightning.runtime.signals import Interrupted
from dori_lightning.types import InputError, first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

_WAIT = timedelta(days=7)
"""How long a process waits for another that is alive: as long as an attack takes."""

_LEAVE_WAIT = timedelta(seconds=30)
"""How long a process that was told to leave waits for the others to hear of it."""

_LEAVING = "dori/leaving"


@functools.cache
def _control() -> dist.ProcessGroup:
    """Group on the CPU for what is agreed on; a GPU's would cut long waits short."""
    group = dist.new_group(backend="gloo", timeout=_WAIT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def rank() -> int:
    """Number of this process, from 0; 0 where there is but one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that were started together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return rank() == 0


@dataclass(frozen=True)
class Shard:
    """A process's part of a batch that all processes draw.

    Attributes:
        rows: Which rows it takes.
        weight: What a mean over these rows is multiplied by, so that its mean over processes is
            the mean over the whole batch; 1 where there is one process.
        whole: Whether every process takes all rows.
    """

    rows: slice
    weight: float
    whole: bool


def shard(count: int) -> Shard:
    """This process's part of ``count`` rows: every ``world_size()``-th, or all of too few.

    Rows that all processes take give each of them the same gradient, which their mean leaves as
    it is.
    """
    if world_size() == 1 or count < world_size():
        return Shard(slice(None), 1.0, whole=True)
    own = len(range(rank(), count, world_size()))
    return Shard(slice(rank(), None, world_size()), own * world_size() / count, whole=False)


def all_reduce_sum(tensors: Sequence[torch.Tensor]) -> None:
    """Sum tensors over processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast_object(value: T) -> T:
    """The first process's value, on every process; plain values only.

    Raises:
        Interrupted: Some process leaves.
    """
    if world_size() == 1:
        return value
    barrier()
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_control())
    return values[0]


def all_gather_dict(own: dict[str, T]) -> dict[str, T]:
    """The union of every process's entries, on every process; tensors on the CPU.

    Raises:
        Interrupted: Some process leaves.
    """
    if world_size() == 1:
        return own
    barrier()
    parts: list[dict[str, T] | None] = [None] * world_size()
    dist.all_gather_object(parts, own, group=_control())
    return {key: value for part in parts if part for key, value in part.items()}


def barrier(signum: int = 0) -> None:
    """Wait until every process is here, and leave with all of them if any is to leave.

    Args:
        signum: Signal that tells this process to leave; 0 for none.

    Raises:
        Interrupted: Some process leaves.
    """
    told = signum
    if world_size() > 1:
        votes = torch.tensor([signum])
        with waiting_for("the other processes") if is_first() else nullcontext():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_control())
        told = int(votes.item())
    if told:
        raise Interrupted(told, shared=True)


def check() -> None:
    """Leave if this process, or any other, was told to; called between two steps.

    Raises:
        Interrupted: It was. The others hear of it at their next check, or where they wait for
            this one.
    """
    signum = signals.received()
    if world_size() > 1:
        store = dist.distributed_c10d._get_default_store()
        if signum:
            store.set(_LEAVING, str(signum))
        elif store.check([_LEAVING]):
            signum = int(store.get(_LEAVING))
    if signum:
        raise Interrupted(signum)


def leave(told: Interrupted) -> bool:
    """Have those who wait for this process leave too; do not wait long for them.

    Returns:
        Whether all of them leave now, at the same place as this one.
    """
    if world_size() == 1 or told.shared:
        return True
    try:
        votes = torch.tensor([told.signum])
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_control(), async_op=True)
        assert work is not None
        work.wait(_LEAVE_WAIT)
    except RuntimeError as error:
        # they are gone already, or busy: they notice that this one is gone
        log.debug("left alone: %s", error)
        return False
    finally:
        told.shared = True
    return True


class SubmititEnvironment(TorchElasticEnvironment):
    """One process for each task that submitit started without SLURM; told as torchrun tells it."""

    def __init__(self) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        # each Trainer of the job asks anew, and gets the same answer
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)

    @staticmethod
    def detect() -> bool:
        """Whether submitit's local executor started this process."""
        return os.environ.get("SUBMITIT_EXECUTOR") == "local"


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
                f"no Trainer can be made: {first_line(error)}\n"
                f"  where: trainer.*\n"
                f"  fix:   trainer=cpu where there is no GPU; else change what it names"
            ) from error
        self._signal_connector = _NoSignals(self)


def launch(trainer: L.Trainer) -> None:
    """Start the other processes of a trainer where Lightning does that; `start` joins them.

    They begin as this one did, so they read and load while this one does. Those that have not
    joined it when it ends are ended with it.

    Raises:
        InputError: Fewer or more processes were started than the trainer is set to use.
    """
    if dist.is_initialized():
        return
    _check_started(trainer)
    if trainer.world_size > 1:
        launcher = trainer.strategy.launcher
        assert launcher is not None
        launcher.launch(lambda: None, trainer=trainer)
        atexit.register(_end_alone, getattr(launcher, "procs", []))


def _end_alone(processes: list[subprocess.Popen[bytes]]) -> None:
    """End the processes that wait for this one, which leaves before it joined them."""
    alone = [*processes]
    # Lightning ends whoever loses one of these
    processes.clear()
    for process in alone:
        process.kill()
        process.wait()


def start(trainer: L.Trainer) -> None:
    """Have every process of a trainer running and joined; at once where there is but one.

    What comes before runs in the first process alone if Lightning starts the others and nobody
    called `launch`.

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
    with waiting_for("the other processes") if peers.speaks() else nullcontext():
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
    atexit.unregister(_end_alone)
    processes = [peers.this_process()] * world_size()
    dist.all_gather_object(processes, peers.this_process(), group=_control())
    peers.register_peers(processes)


def _check_started(trainer: L.Trainer) -> None:
    """Refuse a number of tasks that is not the trainer's: the processes would wait for ever."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or not environment.creates_processes_externally:
        return
    asked = f"trainer.devices={trainer.num_devices} trainer.num_nodes={trainer.num_nodes}"
    slurm = "SLURM_NTASKS" in os.environ
    variable, what = ("SLURM_NTASKS", "SLURM tasks") if slurm else ("WORLD_SIZE", "processes")
    wanted = trainer.num_devices * trainer.num_nodes
    started = os.environ.get(variable)
    if started is not None and int(started) != wanted:
        raise InputError(
            f"{started} {what} were started for {wanted} processes\n"
            f"  where: {variable}={started} and {asked}\n"
            f"  fix:   start one for each process: srun --nodes={trainer.num_nodes} "
            f"--ntasks-per-node={trainer.num_devices} python -m dori_lightning ..., or "
            f"torchrun --nnodes={trainer.num_nodes} --nproc-per-node={trainer.num_devices} "
            f"-m dori_lightning ..., or set trainer.devices and trainer.num_nodes to match"
        )


_VISIBLE = "CUDA_VISIBLE_DEVICES"
_claimed: list[FileLock] = []
"""Locks of this process's GPU; its end gives them back."""


def pin() -> None:
    """Give this worker of a sweep a GPU that no other worker uses; nothing where there is none.

    To be called before CUDA is used. A worker keeps its GPU for its life, since CUDA cannot move.

    Raises:
        InputError: There are more workers than GPUs.
    """
    if not _claimed and (names := _gpus()):
        folder = Path(tempfile.gettempdir()) / f"dori-gpus-{os.getuid()}"
        os.environ[_VISIBLE] = claim(names, folder)


def claim(names: Sequence[str], folder: Path) -> str:
    """Take the first free one of several devices.

    Args:
        names: Devices.
        folder: Where their locks are, the same for all processes of the machine.

    Raises:
        InputError: None is free, or the folder is somebody else's.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # in a folder for everybody somebody else may have been first, with links to this user's files
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise InputError(
            f"{folder} is not a folder that this user alone writes to\n"
            f"  where: TMPDIR\n"
            f"  fix:   remove it, or choose another place for temporary files: TMPDIR=FOLDER"
        )
    for name in names:
        lock = FileLock(folder / name.replace("/", "_"))
        with suppress(Timeout):
            lock.acquire(timeout=0)
            _claimed.append(lock)
            return name
    raise InputError(
        f"all {len(names)} GPUs are taken by other jobs of sweeps\n"
        f"  where: hydra.launcher.n_jobs\n"
        f"  fix:   hydra.launcher.n_jobs={len(names)}, and one sweep at a time"
    )


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` has them."""
    visible = os.environ.get(_VISIBLE)
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return [str(k) for k in range(torch.cuda.device_count())]
