"""Count floating-point operations, and time the shapes they come in alone: the limit of a model.

A model's layers do not reach the speed of one large matrix product, whoever calls them. What they
reach alone, each with nothing around it, is what a loop around them can be held against.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dori_lightning.progress import hushed

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Operations",
    "counted_operations",
    "matmul_peak",
    "seconds_alone",
    "synchronize",
]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    count: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return count


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    count: int = sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
    return count


# torch's own table has the attention kernels of GPUs only
_CPU_ATTENTION: dict[str, Callable[..., int]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}


@dataclass(frozen=True)
class _Spec:
    """Shape of a tensor argument: enough to make another one that takes as long."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class _Call:
    """One operation with the shapes of its arguments; equal calls take equally long."""

    function: Any
    arguments: str
    """``repr`` of arguments and keywords, which decides equality with ``function``."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Matrix products, convolutions and attention that run while this is open.

    The formulas are those of ``torch.utils.flop_counter``, one multiply-add as two operations.
    That module's own mode cannot be open around ``torch.autograd.grad`` on a leaf, which is what
    the attack does.

    Attributes:
        flop: Floating-point operations so far.
        calls: How often each operation ran with which shapes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flop = 0
        self.calls: Counter[_Call] = Counter()
        self._arguments: dict[_Call, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flop += flop_registry[packet](*args, **kwargs, out_val=result)
        elif str(packet) in _CPU_ATTENTION:
            self.flop += _CPU_ATTENTION[str(packet)](*args, **kwargs)
        else:
            return result
        arguments = tree_map(_spec_of, (args, kwargs))
        call = _Call(func, repr(arguments))
        self.calls[call] += 1
        self._arguments[call] = arguments
        return result

    def replays(self) -> list[tuple[Callable[[], Any], int]]:
        """Each distinct operation on tensors of its own, and how often it ran."""
        return [
            (_replay(call.function, self._arguments[call]), n) for call, n in self.calls.items()
        ]


def _spec_of(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return _Spec(tuple(value.shape), tuple(value.stride()), value.dtype, str(value.device))


def _tensor_of(value: Any) -> Any:
    if not isinstance(value, _Spec):
        return value
    made = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
    # numbers of ordinary size: denormals and NaN would be slower or faster
    return made.normal_() if value.dtype.is_floating_point else made.zero_()


def _replay(function: Any, arguments: tuple[Any, Any]) -> Callable[[], Any]:
    args, kwargs = tree_map(_tensor_of, arguments)
    return lambda: function(*args, **kwargs)


def counted_operations(run: Callable[[], Any]) -> Operations:
    """Run something once and count its operations; slower than without."""
    operations = Operations()
    with hushed(), operations:
        run()
    return operations


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_alone(
    operations: Operations, device: torch.device, *, repeats: int = 3, until: float = math.inf
) -> float:
    """Seconds that the operations take if each runs alone, from the median of its repeats.

    Args:
        operations: What ran.
        device: Where they run.
        repeats: Timed runs of each distinct operation, after one to warm up.
        until: Reading of ``time.perf_counter`` after which no more repeats are made than one.
    """
    total = 0.0
    with torch.no_grad():
        for replay, times in operations.replays():
            replay()
            taken = []
            for _ in range(repeats if time.perf_counter() < until else 1):
                synchronize(device)
                started = time.perf_counter()
                replay()
                synchronize(device)
                taken.append(time.perf_counter() - started)
            total += times * statistics.median(taken)
    return total


def matmul_peak(
    device: torch.device, dtype: torch.dtype, *, side: int | None = None, repeats: int = 5
) -> float:
    """Fastest matrix product that was measured, in floating-point operations per second.

    Args:
        device: Where.
        dtype: Of the factors.
        side: Rows and columns; None for 8192 on a GPU and 2048 elsewhere.
        repeats: Products that are timed, after one to warm up; the fastest counts.
    """
    side = side or (8192 if device.type == "cuda" else 2048)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for k in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        left @ right
        synchronize(device)
        if k:
            best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best
