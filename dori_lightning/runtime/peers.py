"""Who speaks for a run before its processes have met; needs no torch, for the command line."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


# -------- ranks

RANKS = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "SUBMITIT_LOCAL_GLOBALID",
)  # fmt: skip
"""How Lightning, torchrun, SLURM and submitit number a process; the first one is 0 in all."""


def speaks() -> bool:
    """Whether this process is the first of its run, or the only one."""
    return not any(int(os.environ.get(name, 0)) for name in RANKS)


def label() -> str:
    """What tells this process's files from those of the others; empty for the first one.

    Its rank among all where the launcher says it, else its place on its node, with the node's
    number before it where there are several.
    """
    if speaks():
        return ""
    for name in ("RANK", "SLURM_PROCID", "SUBMITIT_LOCAL_GLOBALID"):
        if int(os.environ.get(name, 0)):
            return os.environ[name]
    node, place = (os.environ.get(name, "0") for name in ("NODE_RANK", "LOCAL_RANK"))
    return place if node == "0" else f"{node}.{place}"


# -------- roster
# Who the processes of a run are, and which of them have ended when a connection breaks.
#
# Needs no torch: the command line asks, too.

_SECONDS = 5.0
"""Within which a process that closed its connections has ended, too."""

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


_members: list[Peer] = []


def this_process() -> Peer:
    """This process."""
    return Peer(socket.gethostname(), os.getpid(), label())


def register_peers(members: Sequence[Peer]) -> None:
    """Remember all processes of the run, by rank."""
    _members[:] = members


def dead_peers() -> tuple[str, str]:
    """Who is gone, now that a connection has broken, and where to read about it.

    Processes of other machines cannot be seen from here: where all of this one live, the other
    machines are named.

    Returns:
        Words such as "the process of rank 1", and the names of their logs.
    """
    here = socket.gethostname()
    ended = _ended([(k, member) for k, member in enumerate(_members) if member.host == here])
    if ended:
        ranks = ", ".join(str(k) for k, _ in ended)
        return f"the process of rank {ranks}", ", ".join(m.log for _, m in ended)
    hosts = ", ".join(dict.fromkeys(m.host for m in _members if m.host != here))
    return f"another process of this run{f', on {hosts},' if hosts else ''}", "dori-RANK.log"


def _ended(near: Sequence[tuple[int, Peer]]) -> list[tuple[int, Peer]]:
    """Those that have ended, waiting a little for the one whose connections are closed already."""
    if not _PROCESSES.joinpath("self", "stat").exists():
        return []  # no Linux
    deadline = time.monotonic() + _SECONDS
    while True:
        found = [(k, member) for k, member in near if not _lives(member.pid)]
        if found or len(near) < 2 or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        text = _PROCESSES.joinpath(str(pid), "stat").read_text()
    except OSError:
        return False
    # its name, in brackets, may hold anything
    return text.rpartition(")")[2].split()[0] not in "ZX"
