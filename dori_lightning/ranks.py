"""Who speaks for a run before its processes have met; needs no torch, for the command line."""

from __future__ import annotations

import os

__all__ = ["RANKS", "speaks"]

RANKS = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "SUBMITIT_LOCAL_GLOBALID",
)  # fmt: skip
"""How Lightning, torchrun, SLURM and submitit number a process; the first one is 0 in all."""


def speaks() -> bool:
    """Whether this process is the first of its run, or the only one."""
    return not any(int(os.environ.get(name, 0)) for name in RANKS)
