"""Count floating-point operations, and time the shapes they come in alone: the limit of a model.

A model's layers do not reach the speed of one large matrix product, whoever calls them. What they
reach alone, each with nothing around it, is what a loop around them can be held against.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.runtime import distributed
from dori_lightning.runtime.logging import progress_bar, progress_disabled

# -------- counters
# Count what a task asks of a model: rows through its denoiser, autoencoder and text encoder.


@dataclass
class Counts:
    """Rows through each part so far, and the forward passes they went in.

    Attributes:
        unet: Rows through the denoiser.
        unet_passes: Its forward passes.
        encoded: Pictures that were encoded.
        decoded: Latents that were decoded.
        prompts: Prompts that were encoded.
    """

    unet: int = 0
    unet_passes: int = 0
    encoded: int = 0
    decoded: int = 0
    prompts: int = 0


@contextmanager
def counted(model: StableDiffusion) -> Iterator[Counts]:
    """Count by the modules themselves while open, whoever calls them and from which thread."""
    counts, one = Counts(), threading.Lock()

    def unet(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        with one:
            counts.unet += len(inputs[0])
            counts.unet_passes += 1

    def encoder(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        counts.encoded += len(inputs[0])

    def decoder(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        with one:
            counts.decoded += len(inputs[0])

    def text(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        counts.prompts += len(inputs[0] if inputs else keywords["input_ids"])

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module, hook in (
            (model.unet, unet),
            # the autoencoder's own forward is not used
            (model.autoencoder.encoder, encoder),
            (model.autoencoder.decoder, decoder),
            (model.text_encoder, text),
        )
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# -------- operations


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
    with progress_disabled(), operations:
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


# -------- timing
# Time several ways of doing one thing in turn, so that whatever slows the machine slows all.


@dataclass(frozen=True)
class Timed:
    """What one way took.

    Attributes:
        warm_up: Seconds of the first run, which is not among ``seconds``: compilation, caches.
        seconds: Seconds of each repeat.
        peak_bytes: On a GPU, most memory that its allocator held for a repeat beyond what it held
            before; None elsewhere, see ``attacks.memory.PeakTensors``.
        result: What the last repeat returned.
    """

    warm_up: float
    seconds: tuple[float, ...]
    peak_bytes: int | None
    result: Any


def _allocated(device: torch.device) -> int:
    """Bytes that a GPU's allocator holds now, from where its highest mark begins again."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def timed_in_turn(
    ways: Mapping[str, Callable[[], Any]], *, repeats: int, device: torch.device, title: str
) -> dict[str, Timed]:
    """Run every way once to warm up, then all of them in turn, ``repeats`` times.

    Args:
        ways: Name to what is timed.
        repeats: Timed rounds.
        device: Where the work is done; waited for before and after each run.
        title: What the progress line says.
    """
    warm: dict[str, float] = {}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int | None] = dict.fromkeys(ways)
    results: dict[str, Any] = {}
    with progress_bar(f"bench: {title}", (repeats + 1) * len(ways)) as advance:
        for number in range(repeats + 1):
            for name, run in ways.items():
                distributed.check()
                synchronize(device)
                before = _allocated(device)
                started = time.perf_counter()
                with progress_disabled():
                    results[name] = run()
                synchronize(device)
                seconds = time.perf_counter() - started
                if number == 0:
                    warm[name] = seconds
                else:
                    taken[name].append(seconds)
                if device.type == "cuda":
                    held = torch.cuda.max_memory_allocated(device) - before
                    peaks[name] = max(held, peaks[name] or 0)
                advance(1)
    return {
        name: Timed(warm[name], tuple(taken[name]), peaks[name], results[name]) for name in ways
    }
