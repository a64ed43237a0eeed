"""Go on with narrower forward passes where memory runs out.

What is halved is how many pairs, or pictures, share a pass, never what belongs to one of them,
such as its noise samples: those are part of the method. Every row of a pass is computed from its
own inputs alone, so the results stay as they are, up to the rounding of kernels that are chosen
by shape.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

__all__ = ["Passes", "out_of_memory"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_SAID = ("out of memory", "DefaultCPUAllocator", "not enough memory", "ALLOC_FAILED")
"""How allocators put it that raise nothing more special than a `RuntimeError`."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


@dataclass(frozen=True)
class Passes:
    """Forward passes of one kind.

    Attributes:
        kind: What they are for; memory's limit is remembered under this name.
        noun: What is counted, in the singular.
        limits: Widest pass that memory was found to hold, by kind; shared by all passes of a
            model, so that it runs out once and not at every batch.
        mend: What helps where a single one does not fit.
    """

    kind: str
    noun: str
    limits: MutableMapping[str, int]
    mend: str

    def width(self, wanted: int) -> int:
        """How many of ``wanted`` may share a pass, by what is known of memory."""
        return max(1, min(wanted, self.limits.get(self.kind, wanted)))

    def run(self, work: Callable[[int], T], wanted: int) -> T:
        """Call ``work`` with the width of a pass, halved until memory is enough.

        Args:
            work: Does everything anew at each call, and leaves nothing behind where it fails.
            wanted: Width where memory is no concern, >= 1.

        Raises:
            InputError: Not even a pass of width 1 fits.
        """
        width = self.width(wanted)
        while True:
            try:
                return work(width)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if width == 1:
                    raise InputError(self._too_small(error)) from error
                said = _first_line(error)
            # not in the handler: the exception's frames hold the tensors of the pass
            width = self.limits[self.kind] = width // 2
            _free()
            log.warning(
                "%s: out of memory (%s); going on with %d %s%s to a forward pass",
                self.kind, said, width, self.noun, "" if width == 1 else "s",
            )  # fmt: skip

    def _too_small(self, error: BaseException) -> str:
        return (
            f"out of memory with a single {self.noun} in a forward pass: {_first_line(error)}\n"
            f"  where: {self.kind}{_used()}\n"
            f"  mend:  {self.mend}"
        )


def _used() -> str:
    """How much of a GPU's memory was used at most, for a message."""
    if not torch.cuda.is_available():
        return ""
    most, whole = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    return f", at most {most / 2**30:.2f} GiB of {whole / 2**30:.2f} GiB"


def _free() -> None:
    """Give back what the pass that failed had reserved."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
