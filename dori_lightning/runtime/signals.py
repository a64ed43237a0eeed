"""Graceful shutdown: a signal sets a flag, and the work ends between two steps.

The first signal lets the step in progress end; the second leaves at once, which is safe too, since
files are complete or absent.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


_received: list[int] = []
_previous: dict[int, Callable[..., Any]] = {}

_OURS = (signal.SIGINT, signal.SIGTERM)
_SUBMITITS = signal.SIGUSR2


class Interrupted(BaseException):
    """The run was told to leave. No `Exception`: nothing that handles errors may handle this one.

    Attributes:
        signum: Which signal told it.
        shared: Whether the other processes of the run know.
    """

    def __init__(self, signum: int, *, shared: bool = False) -> None:
        super().__init__(signum)
        self.signum, self.shared = signum, shared

    @property
    def code(self) -> int:
        """Exit code: 130 for Ctrl+C, 143 for SIGTERM."""
        return 128 + self.signum


def received() -> int:
    """The signal that told this process to leave; 0 where none did."""
    return _received[0] if _received else 0


@contextmanager
def handling() -> Iterator[None]:
    """Turn signals into a flag while open.

    SIGTERM under submitit stays submitit's, which ignores it: there a signal of its own, caught
    here too, comes before the end of a job's time, and SLURM puts a preempted job back by itself.
    """
    _received.clear()
    replaced: dict[int, Any] = {}
    for signum in _OURS:
        before = signal.getsignal(signum)
        if before in (signal.SIG_DFL, signal.default_int_handler):
            replaced[signum] = before
            signal.signal(signum, _note)
    submitits = signal.getsignal(_SUBMITITS)
    if callable(submitits):
        replaced[_SUBMITITS] = submitits
        _previous[_SUBMITITS] = submitits
        signal.signal(_SUBMITITS, _note)
    try:
        yield
    finally:
        for caught, earlier in replaced.items():
            signal.signal(caught, earlier)
        # whoever leaves carries the signal; what comes after was not told anything
        _received.clear()


def hand_on(signum: int) -> None:
    """Give a signal to whom it was for, now that the work is safe; submitit requeues the job."""
    previous = _previous.get(signum)
    if previous is not None:
        previous(signum, None)


def _note(signum: int, _frame: Any) -> None:
    # os.write: a handler must not wait for a stream that it interrupted
    if _received:
        os.write(2, b"dori: leaving at once\n")
        os._exit(128 + signum)
    _received.append(signum)
    name = signal.Signals(signum).name
    os.write(2, f"dori: {name}: leaving after this step; once more to leave at once\n".encode())
