"""Who speaks for a run before its processes have met; needs no torch, for the command line."""

from __future__ import annotations

import os

__all__ = ["RANKS", "label", "speaks"]

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
