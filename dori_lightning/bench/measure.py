"""Time several ways of doing one thing in turn, and what their operations take alone.

What a model's layers take each by itself, and the device's fastest large matrix product, are the
limits that a loop around them can be held against.
"""

import logging
import math
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

from dori_lightning.mitigations.base import Context
from dori_lightning.models.generation import (
    GenerationRequest,
    generate_images,
    image_seeds,
    load_images,
)
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.memory import PeakMemory
from dori_lightning.runtime import distributed
from dori_lightning.runtime.batching import disable_parallel
from dori_lightning.runtime.logging import progress_bar, progress_disabled, with_progress
from dori_lightning.types import Pair, first_line, require, require_at_least_one

log = logging.getLogger(__name__)

SHORTEST = 0.2
"""Seconds that a way is timed for in its turn, at least."""


@dataclass(frozen=True)
class Row:
    """One way of doing something, measured.

    Attributes:
        name: Short name: B1, B2, ours, ...
        what: What it is, in a line.
        pairs: Pairs that were done.
        seconds: Time of each repeat.
        warm_up: Seconds of the first, untimed run: compilation, caches.
        samples: Rows through the denoiser; 0 where they were not counted.
        passes: Forward passes that these took.
        flops: Operations that the result needs, each row and step once; 0 where not counted.
        peak_bytes: Most memory that one step holds beyond what was held before it.
        planned_bytes: What the package plans with for that (``models.memory``).
        values: Further results, by name.
        skipped: Why it was not measured; empty where it was.
    """

    name: str
    what: str
    pairs: int = 1
    seconds: tuple[float, ...] = ()
    warm_up: float = 0.0
    samples: int = 0
    passes: int = 0
    flops: float = 0.0
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    values: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""

    @property
    def per_pair(self) -> float:
        """Median seconds per pair; NaN where it was not measured."""
        return statistics.median(self.seconds) / self.pairs if self.seconds else float("nan")


@dataclass(frozen=True)
class Family:
    """Ways of doing one thing, measured in turn in one process.

    Attributes:
        name: One of `FAMILIES`.
        title: What is compared, in a line.
        rows: The ways; speeds are relative to the one named B1.
        peak: Operations a second of the device's fastest large matrix product; 0 where not
            measured.
        load: Load average of the machine before and after, of the last minute.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    peak: float = 0.0
    load: tuple[float, float] = (0.0, 0.0)

    @property
    def measured(self) -> list[Row]:
        """The rows that have times."""
        return [row for row in self.rows if row.seconds]

    def ratio(self, name: str, row: Row) -> float | None:
        """Time of the row of a name over a row's; None where there is no such row."""
        return next((r.per_pair / row.per_pair for r in self.measured if r.name == name), None)

    def of_peak(self, row: Row) -> float | None:
        """Share of the device's peak that a row's work comes to; None where that is not known."""
        if not (self.peak and row.flops and row.seconds):
            return None
        return row.flops / (row.per_pair * row.pairs) / self.peak


def timed_in_turn(
    ways: Mapping[str, tuple[str, Callable[[], Any]]],
    *,
    model: LatentDiffusion,
    pairs: int,
    repeats: int,
    title: str,
    until: float = math.inf,
) -> tuple[dict[str, Row], dict[str, Any]]:
    """Run every way once to warm up, then all of them in turn, ``repeats`` times.

    So whatever slows the machine slows all of them. A way that takes less than `SHORTEST` runs
    several times in its turn. A way other than ``ours`` that fails is left out.

    Args:
        ways: Name to what is timed, in a line, and the call.
        model: Whose forward passes are counted, and whose device is waited for.
        pairs: Pairs that each way does.
        repeats: Timed rounds.
        title: What the progress line says.
        until: ``time.monotonic()`` from which nothing new begins; the first way runs once.

    Returns:
        The rows, those that were left out with the reason, and what each way returned in its
        first run.
    """
    rows = {name: Row(name, what, pairs) for name, (what, _) in ways.items()}
    results: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {}
    with progress_bar(f"bench: {title}", (repeats + 1) * len(ways)) as advance:
        for name, (_, run) in ways.items():
            distributed.check()
            if results and time.monotonic() >= until:
                rows[name] = replace(rows[name], skipped="no time left")
                continue
            try:
                with counted(model.denoiser()) as counts, progress_disabled():
                    warm_up, results[name] = _timed(run, model.device)
            except RuntimeError as error:
                if name == "ours":
                    raise
                log.exception("bench: %s, %s failed", title, name)
                rows[name] = replace(rows[name], skipped=f"it failed: {first_line(error)}")
                continue
            rows[name] = replace(rows[name], warm_up=warm_up, **vars(counts))
            seconds[name] = []
            advance(1)
        for name in [*seconds] * repeats:
            distributed.check()
            if time.monotonic() >= until:
                break
            began = time.monotonic()
            with progress_disabled():
                while True:
                    seconds[name].append(_timed(ways[name][1], model.device)[0])
                    if time.monotonic() - began >= SHORTEST:
                        break
            advance(1)
    for name, own in seconds.items():
        left = "" if own else "no time left after its warm-up"
        rows[name] = replace(rows[name], seconds=tuple(own), skipped=left)
    return rows, results


def _timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of a call, until the device is done with it, and what it returns."""
    _wait_for(device)
    started = time.perf_counter()
    result = run()
    _wait_for(device)
    return time.perf_counter() - started, result


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timer(run: Callable[[], Any]) -> Timer:
    """Times a call on as many threads as the run has; waits for the GPU where there is one."""
    return Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of a few large matrix products on a device."""
    side = 8192 if device.type == "cuda" else 768
    # numbers of ordinary size, as a model's: products of zeros draw less power and run faster
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = [_timed(lambda: first @ second, device)[0] for _ in range(10)]
    return 2 * side**3 / min(times)


@dataclass
class Counts:
    """Rows through a module so far, and the forward passes that they took."""

    samples: int = 0
    passes: int = 0


@contextmanager
def counted(module: nn.Module) -> Iterator[Counts]:
    """Count what goes through a module while open, whoever calls it, from any thread."""
    counts, lock = Counts(), threading.Lock()

    def count(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        with lock:
            counts.samples += len(inputs[0])
            counts.passes += 1

    with module.register_forward_pre_hook(count):
        yield counts


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most memory that a call holds beyond what is held before it.

    What the allocator of a GPU holds, and elsewhere the tensors that are alive, with forward
    passes one after the other.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return int(torch.cuda.max_memory_allocated(device) - before)
    with disable_parallel(), progress_disabled(), PeakMemory() as memory:
        run()
    return int(memory.peak)


def _description(value: Any) -> Any:
    """What makes two tensors take equally long; anything else as it is."""
    tensor = isinstance(value, torch.Tensor)
    return (value.shape, value.stride(), value.dtype) if tensor else value


def _like(value: Any, device: torch.device | str) -> Any:
    """A tensor of the same shape and layout on a device; anything else as it is."""
    # seeds of attention are scalars on the host, whatever the device
    if not isinstance(value, torch.Tensor) or (value.dim() == 0 and value.dtype == torch.int64):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    # numbers of ordinary size: denormals and NaN would be slower or faster
    return made.normal_() if value.dtype.is_floating_point else made.zero_()


_ATEN = torch.ops.aten
_FORMULAS = {
    **flop_registry,
    # the CPU's attention, which torch's table lacks
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _ATEN._scaled_dot_product_flash_attention
    ],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
"""Operator to the formula of its floating-point operations: two for a product and its sum."""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Matrix products, convolutions and attention that run while this is open.

    Attributes:
        calls: How often each distinct operation ran, and its function with the shapes of its
            arguments.
        flops: Floating-point operations so far. Attention's backward computes its scores again,
            which counts too.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, tuple[int, Callable[..., Any], Any]] = {}
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note its shapes."""
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet not in _FORMULAS:
            return result
        self.flops += _FORMULAS[packet](*args, **kwargs, out_val=result)
        shapes = tree_map(partial(_like, device="meta"), (args, kwargs))
        name = repr([func, *map(_description, tree_leaves(shapes))])
        self.calls[name] = (self.calls.get(name, (0,))[0] + 1, func, shapes)
        return result


def seconds_alone(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds that the operations of a call take in all if each of its shapes runs alone."""
    operations, total = Operations(), 0.0
    with disable_parallel(), progress_disabled(), operations:
        run()
    with torch.no_grad():
        calls = [*operations.calls.values()]
        for times, function, shapes in with_progress("bench: operations alone", calls):
            args, kwargs = tree_map(partial(_like, device=device), shapes)
            total += times * _timer(partial(function, *args, **kwargs)).timeit(3).median
    return total


@dataclass(frozen=True)
class RowCost:
    """Floating-point operations of one row through the denoiser.

    Attributes:
        forward: Without gradient.
        attack: With the gradient of its embedding, weights frozen.
    """

    forward: int
    attack: int


def row_cost(model: LatentDiffusion) -> RowCost:
    """Count what a row of a model takes; its count of evaluations stays as it is."""
    latents = torch.zeros(1, *model.latent_shape, device=model.device)
    timesteps = torch.zeros(1, dtype=torch.long, device=model.device)
    embedding = torch.zeros(1, *model.embedding_shape, device=model.device, requires_grad=True)
    evaluations = model.unet_evaluations
    with model.frozen(), torch.no_grad(), Operations() as forward:
        model.predict_noise(latents, timesteps, embedding)
    with model.frozen(), torch.enable_grad(), Operations() as attack:
        loss = model.denoising_loss(latents, latents, timesteps, embedding)
        torch.autograd.grad(loss.sum(), embedding)
    model.unet_evaluations = evaluations
    return RowCost(forward.flops, attack.flops)


FAMILIES = {
    "attack": 4, "nemo": 3, "sampling": 2, "wanda": 1, "finetuning": 3, "compiled": 5, "audit": 2,
}  # fmt: skip
"""What can be measured, in the order in which it is, and the share of a limited time that each
gets; what one leaves goes to the others."""


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often.

    Attributes:
        rows: Families to measure, some of `FAMILIES`, in this order.
        seconds: Time for all families together, in which each has its share; a way that has
            begun is not cut. None sets no limit.
        repeats: Timed rounds.
        pairs: Pairs of the attack.
        steps: Its steps; each takes the same time.
        noise_batch: Noise samples of a step.
        sampling_pairs: Pairs that images are generated for.
        nemo_pairs: Pairs whose neurons NeMo searches.
        wanda_pairs: Pairs that Wanda makes masks for.
        finetuning_pairs: Pairs that adversarial fine-tuning forgets.
        finetuning_updates: Its optimizer steps after one search.
        audit_pairs: Pairs of the whole audit.
        audit_steps: Steps of its attack.
        threshold: Similarity by the primary descriptor from which an image is a copy, for the
            audit, which has no controls to calibrate with.
    """

    rows: tuple[str, ...] = tuple(FAMILIES)
    seconds: float | None = None
    repeats: int = 5
    pairs: int = 16
    steps: int = 4
    noise_batch: int = 8
    sampling_pairs: int = 8
    nemo_pairs: int = 8
    wanda_pairs: int = 8
    finetuning_pairs: int = 8
    finetuning_updates: int = 10
    audit_pairs: int = 8
    audit_steps: int = 10
    threshold: float = 0.62

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        unknown = [name for name in self.rows if name not in FAMILIES]
        good = not unknown and self.rows and len(set(self.rows)) == len(self.rows)
        got = ", ".join(map(str, self.rows)) or "none"
        require(bool(good), f"task.rows must be different ones of {', '.join(FAMILIES)}", got)
        limit = self.seconds
        require(limit is None or limit > 0, "task.seconds must be > 0 or null", limit)
        counts = [item.name for item in fields(self) if item.type is int]
        require_at_least_one(self, *counts, within="task.")

    @property
    def most_pairs(self) -> int:
        """How many pairs of kind vm the list must have."""
        parts = (self.sampling_pairs, self.nemo_pairs, self.wanda_pairs, self.finetuning_pairs)
        return max(self.pairs, *parts)


@dataclass(frozen=True)
class BenchContext:
    """A checkpoint with its pairs.

    Attributes:
        model: The checkpoint.
        pairs: Pairs of kind vm.
        context: What mitigations work with: encoded pairs, reference images, sampler, seed.
        folder: Where the package's attack and sampler write; emptied between runs.
        until: ``time.monotonic()`` from which a family begins nothing new.
    """

    model: LatentDiffusion
    pairs: tuple[Pair, ...]
    context: Context
    folder: Path
    until: float = math.inf

    @cached_property
    def cost(self) -> RowCost:
        """What a row through the denoiser takes."""
        return row_cost(self.model)

    @cached_property
    def peak(self) -> float:
        """Operations a second of the fastest matrix product in what the model computes in."""
        own = next(self.model.parameters()).dtype
        return matmul_peak(self.model.device, self.model.autocast or own)

    def scratch(self, name: str) -> Path:
        """An empty folder."""
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return place

    def generate(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Images from the first pairs' embeddings (N, T, D), in batches and files, as in an audit.

        Returns:
            K images of each pair (N, K, 3, H, W) in [0, 1].
        """
        sampling, folder = self.context.sampling, self.scratch("images")
        requests = [
            GenerationRequest(folder / pair.id, embedding, pair.id)
            for pair, embedding in zip(self.pairs, embeddings, strict=False)
        ]
        generate_images(self.model, requests, sampling)
        seeds = image_seeds(sampling)
        return torch.stack([load_images(request.folder, seeds) for request in requests])
