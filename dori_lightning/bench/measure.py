"""Time several ways of doing one thing in turn, and what their operations take alone.

Times are those of ``torch.utils.benchmark``. What a model's layers take each by itself is the
limit that a loop around them can be held against.
"""

import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
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
from dori_lightning.models.memory import PeakMemory
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.runtime import distributed
from dori_lightning.runtime.batching import disable_parallel
from dori_lightning.runtime.logging import progress_bar, progress_disabled
from dori_lightning.types import Pair, require, require_at_least_one


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
        peak_bytes: Most memory that one step holds beyond what was held before it.
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
    peak_bytes: int | None = None
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
        load: Load average of the machine before and after, of the last minute.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    load: tuple[float, float] = (0.0, 0.0)

    @property
    def measured(self) -> list[Row]:
        """The rows that have times."""
        return [row for row in self.rows if row.seconds]

    def ratio(self, name: str, row: Row) -> float | None:
        """Time of the row of a name over a row's; None where there is no such row."""
        return next((r.per_pair / row.per_pair for r in self.measured if r.name == name), None)


def timed_in_turn(
    ways: Mapping[str, tuple[str, Callable[[], Any]]],
    *,
    model: StableDiffusion,
    pairs: int,
    repeats: int,
    title: str,
) -> tuple[dict[str, Row], dict[str, Any]]:
    """Run every way once to warm up, then all of them in turn, ``repeats`` times.

    So whatever slows the machine slows all of them. A way that takes less than 0.2 seconds runs
    several times in its turn.

    Args:
        ways: Name to what is timed, in a line, and the call.
        model: Whose forward passes are counted.
        pairs: Pairs that each way does.
        repeats: Timed rounds.
        title: What the progress line says.

    Returns:
        The rows, and what each way returned in its first run.
    """
    counts, warm_up, results = {}, {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with progress_bar(f"bench: {title}", (repeats + 1) * len(ways)) as advance:
        for name, (_, run) in ways.items():
            distributed.check()
            started = time.perf_counter()
            with counted(model.unet) as counts[name], progress_disabled():
                results[name] = run()
            warm_up[name] = time.perf_counter() - started
            advance(1)
        for _ in range(repeats):
            for name, (_, run) in ways.items():
                distributed.check()
                with progress_disabled():
                    seconds[name] += _timer(run).blocked_autorange().times
                advance(1)
    rows = {
        name: Row(name, what, pairs, tuple(seconds[name]), warm_up[name], **vars(counts[name]))
        for name, (what, _) in ways.items()
    }
    return rows, results


def _timer(run: Callable[[], Any]) -> Timer:
    """Times a call on as many threads as the run has; waits for the GPU where there is one."""
    return Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())


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
    if not isinstance(value, torch.Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    # numbers of ordinary size: denormals and NaN would be slower or faster
    return made.normal_() if value.dtype.is_floating_point else made.zero_()


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Matrix products, convolutions and attention that run while this is open.

    Attributes:
        calls: How often each distinct operation ran, and its function with the shapes of its
            arguments.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, tuple[int, Callable[..., Any], Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note its shapes."""
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        # torch's table of what costs anything lacks the CPU's attention
        if packet not in flop_registry and "attention" not in str(packet):
            return result
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
        for times, function, shapes in operations.calls.values():
            args, kwargs = tree_map(partial(_like, device=device), shapes)
            total += times * _timer(partial(function, *args, **kwargs)).timeit(3).median
    return total


FAMILIES = ("attack", "sampling", "nemo", "wanda", "finetuning", "audit", "sd14")
"""What can be measured, in the order in which it is."""


@dataclass(frozen=True)
class ShapeSettings:
    """The attack on Stable Diffusion 1.4's UNet with random weights.

    Attributes:
        latent: Side of a latent; 64 is the checkpoint's own, 512 pixels.
        pairs: Pairs attacked.
        steps: Steps of the attack.
        noise_batch: Noise samples of a step.
        repeats: Timed rounds.
        dtype: ``bf16``: weights in it. ``fp32``: weights in it, autocast to bf16 where there is a
            GPU, as a loaded checkpoint has them.
        compile: Whether the compiled loop is measured: minutes of warm-up on a CPU.
    """

    latent: int = 64
    pairs: int = 8
    steps: int = 1
    noise_batch: int = 8
    repeats: int = 3
    dtype: str = "bf16"
    compile: bool = False

    def __post_init__(self) -> None:
        _check_counts(self, "task.sd14.")
        whole = self.latent >= 8 and self.latent % 8 == 0
        require(whole, "task.sd14.latent must be a multiple of 8", self.latent)
        known = self.dtype in ("bf16", "fp32")
        require(known, "task.sd14.dtype must be bf16 or fp32", repr(self.dtype))


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often.

    Attributes:
        rows: Families to measure, some of `FAMILIES`, in this order.
        repeats: Timed rounds.
        pairs: Pairs of the attack.
        steps: Its steps; each takes the same time.
        noise_batch: Noise samples of a step.
        compile: Whether the compiled loop is measured.
        sampling_pairs: Pairs that images are generated for.
        nemo_pairs: Pairs whose neurons NeMo searches.
        wanda_pairs: Pairs that Wanda makes masks for.
        finetuning_pairs: Pairs that adversarial fine-tuning forgets.
        finetuning_updates: Its optimizer steps after one search.
        audit_pairs: Pairs of the whole audit.
        audit_steps: Steps of its attack.
        threshold: Similarity by the primary descriptor from which an image is a copy, for the
            audit, which has no controls to calibrate with.
        sd14: The attack on Stable Diffusion 1.4's shape.
    """

    rows: tuple[str, ...] = FAMILIES
    repeats: int = 5
    pairs: int = 16
    steps: int = 4
    noise_batch: int = 8
    compile: bool = True
    sampling_pairs: int = 8
    nemo_pairs: int = 8
    wanda_pairs: int = 8
    finetuning_pairs: int = 8
    finetuning_updates: int = 10
    audit_pairs: int = 8
    audit_steps: int = 10
    threshold: float = 0.62
    sd14: ShapeSettings = field(default_factory=ShapeSettings)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        unknown = [name for name in self.rows if name not in FAMILIES]
        good = not unknown and self.rows and len(set(self.rows)) == len(self.rows)
        got = ", ".join(map(str, self.rows)) or "none"
        require(bool(good), f"task.rows must be different ones of {', '.join(FAMILIES)}", got)
        _check_counts(self, "task.")

    @property
    def most_pairs(self) -> int:
        """How many pairs of kind vm the list must have."""
        parts = (self.sampling_pairs, self.nemo_pairs, self.wanda_pairs, self.finetuning_pairs)
        return max(self.pairs, *parts)


def _check_counts(settings: Any, within: str) -> None:
    counts = [item.name for item in fields(settings) if item.type is int]
    require_at_least_one(settings, *counts, within=within)


@dataclass(frozen=True)
class BenchContext:
    """A checkpoint with its pairs.

    Attributes:
        model: The checkpoint.
        pairs: Pairs of kind vm.
        context: What mitigations work with: encoded pairs, reference images, sampler, seed.
        folder: Where the package's attack and sampler write; emptied between runs.
    """

    model: StableDiffusion
    pairs: tuple[Pair, ...]
    context: Context
    folder: Path

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
