"""The processes of one run: who does what, and what all of them agree on.

Work is shared by rank and gathered by files; only a fine-tuning's gradients and what all must
agree on travel between processes. How they come about: `trainers`.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from dori_lightning import interruption, roster
from dori_lightning.interruption import Interrupted

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Share",
    "barrier",
    "check",
    "from_first",
    "gathered",
    "is_first",
    "leave",
    "prepare",
    "rank",
    "share",
    "sum_of_all",
    "vote",
    "world",
]

log = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE = timedelta(days=7)
"""How long a process waits for another that is alive: as long as a search of triggers takes."""

_FAREWELL = timedelta(seconds=30)
"""How long a process that was told to leave waits for the others to hear of it."""

_LEAVING = "dori/leaving"


def prepare() -> None:
    """Make what they agree through, and tell who they are; called right after they have met."""
    found = [roster.me()] * world()
    dist.all_gather_object(found, roster.me(), group=_control())
    roster.meet(found)


@functools.cache
def _control() -> dist.ProcessGroup:
    """Group on the CPU for what is agreed on; a GPU's would cut long waits short."""
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


def rank() -> int:
    """Number of this process, from 0; 0 where there is but one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes that were started together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return rank() == 0


@dataclass(frozen=True)
class Share:
    """A process's part of a batch that all of them draw.

    Attributes:
        rows: Which rows it takes.
        weight: What a mean over these rows is multiplied by, so that its mean over processes is
            the mean over the whole batch; 1 where there is one process.
        whole: Whether every process takes all rows.
    """

    rows: slice
    weight: float
    whole: bool


def share(count: int) -> Share:
    """This process's part of ``count`` rows: every ``world()``-th, or all of too few.

    Rows that all processes take give each of them the same gradient, which their mean leaves as
    it is.
    """
    if world() == 1 or count < world():
        return Share(slice(None), 1.0, whole=True)
    own = len(range(rank(), count, world()))
    return Share(slice(rank(), None, world()), own * world() / count, whole=False)


def sum_of_all(tensors: Sequence[torch.Tensor]) -> None:
    """Sum tensors over processes, in place."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def from_first(value: T) -> T:
    """The first process's value, on every process; plain values only.

    Raises:
        Interrupted: Some process leaves.
    """
    if world() == 1:
        return value
    vote()
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_control())
    return values[0]


def gathered(own: dict[str, T]) -> dict[str, T]:
    """What all processes hold under their own keys, on every process; tensors on the CPU.

    Raises:
        Interrupted: Some process leaves.
    """
    if world() == 1:
        return own
    vote()
    parts: list[dict[str, T] | None] = [None] * world()
    dist.all_gather_object(parts, own, group=_control())
    return {key: value for part in parts if part for key, value in part.items()}


def vote(signum: int = 0) -> None:
    """Meet all other processes here, and leave with them if any is to leave.

    Args:
        signum: Signal that tells this process to leave; 0 where none does.

    Raises:
        Interrupted: Some process leaves.
    """
    told = signum
    if world() > 1:
        votes = torch.tensor([signum])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_control())
        told = int(votes.item())
    if told:
        raise Interrupted(told, shared=True)


def barrier() -> None:
    """Wait until every process is here.

    Raises:
        Interrupted: Some process leaves.
    """
    vote()


def check() -> None:
    """Leave if this process, or any other, was told to; called between two steps.

    Raises:
        Interrupted: It was. The others hear of it at their next check, or where they wait for
            this one.
    """
    signum = interruption.received()
    if world() > 1:
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
    if world() == 1 or told.shared:
        return True
    try:
        votes = torch.tensor([told.signum])
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=_control(), async_op=True)
        assert work is not None
        work.wait(_FAREWELL)
    except RuntimeError as error:
        # they are gone already, or busy: they notice that this one is gone
        log.debug("left alone: %s", error)
        return False
    finally:
        told.shared = True
    return True
