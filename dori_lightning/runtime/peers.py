"""Track the processes of a run: which one this is, who the others are, which of them died.

Needs no torch: the command line asks, too.
"""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


_AMONG_ALL = ("RANK", "SLURM_PROCID", "SUBMITIT_LOCAL_GLOBALID")
RANKS = (*_AMONG_ALL, "LOCAL_RANK", "GROUP_RANK", "NODE_RANK")
"""How Lightning, torchrun, SLURM and submitit number a process; the first one is 0 in all."""


NUMBERS = (*RANKS, "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_NTASKS",
           "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID")  # fmt: skip
"""Variables in which a launcher gives a number; libraries read some of them too."""


def number_in(variable: str, default: int = 0) -> int:
    """The number in a launcher's variable.

    Raises:
        InputError: The variable is set to something else, such as nothing.
    """
    value = os.environ.get(variable)
    if value is None:
        return default
    if not re.fullmatch(r"[0-9]+", value):
        raise InputError(
            f"the environment variable {variable} holds no number: {value!r}",
            where=variable,
            fix=f"unset {variable} where no launcher starts several processes; else let the "
            f"launcher (torchrun, srun) set it",
        )
    return int(value)


def check_environment() -> None:
    """Refuse variables of launchers that hold no number.

    Raises:
        InputError: Names the first of them.
    """
    for variable in NUMBERS:
        number_in(variable)


def speaks() -> bool:
    """Whether this process is the first of its run, or the only one."""
    return not any(map(number_in, RANKS))


def label() -> str:
    """What tells this process's files from those of the others; empty for the first one.

    Its rank among all where the launcher says it, else its place on its node, with the node's
    number before it where there are several.
    """
    if speaks():
        return ""
    for name in _AMONG_ALL:
        if number_in(name):
            return os.environ[name]
    node, place = (os.environ.get(name, "0") for name in ("NODE_RANK", "LOCAL_RANK"))
    return place if node == "0" else f"{node}.{place}"


_SECONDS = 5.0
"""Time within which a process that closed its connections has ended, too."""

_PROCESSES = Path("/proc")


@dataclass(frozen=True)
class Peer:
    """One process of a run.

    Attributes:
        host: Its machine.
        pid: Its number there.
        label: What tells its files from those of the others; empty for the first one.
    """

    host: str
    pid: int
    label: str

    @property
    def log(self) -> str:
        """Name of its log in the run folder."""
        return f"dori-{self.label}.log" if self.label else "dori.log"


_peers: list[Peer] = []


def this_process() -> Peer:
    """This process."""
    return Peer(socket.gethostname(), os.getpid(), label())


def register_peers(peers: Sequence[Peer]) -> None:
    """Remember all processes of the run, by rank."""
    _peers[:] = peers


def dead_peers() -> tuple[str, str]:
    """Which processes died, after a connection has broken, and the names of their logs.

    Processes of other machines cannot be seen from here: where all of this machine live, the other
    machines are named.

    Returns:
        Words such as "the process of rank 1", and the names of their logs.
    """
    here = socket.gethostname()
    ended = _ended({rank: peer for rank, peer in enumerate(_peers) if peer.host == here})
    if ended:
        ranks = ", ".join(map(str, ended))
        return f"the process of rank {ranks}", ", ".join(peer.log for peer in ended.values())
    hosts = ", ".join(dict.fromkeys(peer.host for peer in _peers if peer.host != here))
    return f"another process of this run{f', on {hosts},' if hosts else ''}", "dori-RANK.log"


def _ended(peers: dict[int, Peer]) -> dict[int, Peer]:
    """Peers that have ended; waits a little for the one whose connections are closed already."""
    if not _PROCESSES.joinpath("self", "stat").exists():
        return {}  # no Linux
    deadline = time.monotonic() + _SECONDS
    while True:
        ended = {rank: peer for rank, peer in peers.items() if not _lives(peer.pid)}
        if ended or len(peers) < 2 or time.monotonic() > deadline:
            return ended
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        text = _PROCESSES.joinpath(str(pid), "stat").read_text()
    except OSError:
        return False
    # its name, in brackets, may hold anything
    return text.rpartition(")")[2].split()[0] not in "ZX"
