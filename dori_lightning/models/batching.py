"""How much memory a pass of the attack takes, measured before the run, and how many pairs fit.

The gradient of an embedding needs what the denoiser computed on the way forward: about 0.7 GiB for
each sample of Stable Diffusion at 512 pixels. So the number of pairs in a pass decides whether a
run ends in "out of memory". What two small passes hold at most tells what a sample costs and what
every pass costs anyway, whatever the architecture, precision and kernels are.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dori_lightning.models.protocol import TextToImage
from dori_lightning.types import InputError

PASS_PAIRS = 8
"""Pairs of a forward pass where memory does not decide."""


LANE_PAIRS = 4
"""Pairs of a forward pass where several go side by side (``lanes``): wider was no faster, and
fills up more."""


PASS_KIND = "attack"
"""Under this name a model remembers the largest batch that its memory holds (``OomBackoff``)."""


def pairs_at_once(model: TextToImage) -> int:
    """Pairs of a model that are computed at the same time where memory does not decide."""
    return LANE_PAIRS * count(model) if small(model) else PASS_PAIRS


# -------- halving
# Go on with narrower forward passes where memory runs out.
#
# What is halved is how many pairs, or pictures, share a pass, never what belongs to one of them,
# such as its noise samples: those are part of the method. Every row of a pass is computed from its
# own inputs alone, so the results stay as they are, up to the rounding of kernels that are chosen
# by shape.

T = TypeVar("T")

_SAID = ("out of memory", "DefaultCPUAllocator", "not enough memory", "ALLOC_FAILED")
"""How allocators put it that raise nothing more special than a `RuntimeError`."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


@dataclass(frozen=True)
class OomBackoff:
    """Forward passes of one kind.

    Attributes:
        kind: What they are for; memory's limit is remembered under this name.
        noun: What is counted, in the singular.
        limits: Widest pass that memory was found to hold, by kind; shared by all passes of a
            model, so that it runs out once and not at every batch.
        fix: What helps where a single one does not fit.
    """

    kind: str
    noun: str
    limits: MutableMapping[str, int]
    fix: str

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
            f"  fix:   {self.fix}"
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


# -------- lanes
# Forward passes side by side on the CPU, each on threads of its own.
#
# The kernels of a small model are too short to be shared by many threads: two passes on a thread
# each take less time than one after the other on two. A large model has its weights read from
# memory by every pass, and narrower passes read them more often: with Stable Diffusion's shape
# an attack took half as long again. Both are measured in ``experiments/003-speed``.
#
# A thread works without the interpreter's lock while it is in a kernel, so no processes are
# needed.

MOST = 4
"""Passes side by side at most; where there are more threads, each pass has several of them."""

SMALL = 100_000_000
"""Weights of a denoiser up to which its passes go side by side. Measured with 9 million, where it
pays, and with 860, where it does not; where between them it turns is not known."""

_one = False


def small(model: TextToImage) -> bool:
    """Whether a model gains by passes side by side: on the CPU, with up to ``SMALL`` weights."""
    return model.device.type == "cpu" and sum(p.numel() for p in model.parameters()) <= SMALL


def count(model: TextToImage) -> int:
    """How many of a model's passes go side by side: a thread each, up to ``MOST``, or one."""
    return min(MOST, torch.get_num_threads()) if small(model) and not _one else 1


@contextmanager
def in_one() -> Iterator[None]:
    """Let one pass follow the other while open, for those who watch the operations of a thread."""
    global _one
    before, _one = _one, True
    try:
        yield
    finally:
        _one = before


def side_by_side(work: Sequence[Callable[[], T]], lanes: int) -> list[T]:
    """Do several things at a time.

    How many threads a pass has decides about its rounding, so that is the same for every one,
    whether another pass is beside it or not.

    Args:
        work: What to do. Autograd's mode and autocast are a thread's own and begin as a new
            thread's: gradients on, no autocast.
        lanes: How many at a time, up to ``count``; 1 does all here and now, on all threads.

    Returns:
        What each of ``work`` returns, in its order.

    Raises:
        Exception: What the first that failed has raised, once none runs any more.
    """
    if lanes == 1:
        return [each() for each in work]
    threads = torch.get_num_threads()

    def on_its_threads(each: Callable[[], T]) -> T:
        torch.set_num_threads(max(1, threads // lanes))
        return each()

    try:
        waiting = [_pool(lanes).submit(on_its_threads, each) for each in work]
        wait(waiting)
    finally:
        # one setting of the matrix library is the process's and not the thread's
        torch.set_num_threads(threads)
    return [done.result() for done in waiting]


@cache
def _pool(lanes: int) -> ThreadPoolExecutor:
    """Threads for ``lanes`` passes, kept: kernels' own threads belong to them."""
    return ThreadPoolExecutor(lanes, thread_name_prefix="lane")


# -------- memory

log = logging.getLogger(__name__)

_SHARE = 0.8
"""Share of the free memory that is planned with; the rest is for what was not measured: workspaces
of kernels, an allocator's gaps, other parts of the run."""

_GIB = 2**30


class PeakMemory(TorchDispatchMode):
    """Most bytes of tensors that were made while this is open and alive at one time.

    What kernels take for themselves while they run is not among them.

    Attributes:
        peak: Bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._upper = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what is alive after it."""
        del types
        # of arguments too: what was there before is not counted when a view of it is made
        known = {_storage(x).data_ptr() for x in tree_leaves((args, kwargs)) if _is_plain(x)}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if _is_plain(value):
                storage = _storage(value)
                if storage.nbytes() and storage.data_ptr() not in known:
                    reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._alive[reference.cdata] = (reference, storage.nbytes())
                    self._upper += storage.nbytes()
        if self._upper > self.peak:  # looking through all of them at every operation takes long
            self._alive = {
                key: held
                for key, held in self._alive.items()
                if not held[0].expired()  # type: ignore[no-untyped-call]
            }
            self._upper = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._upper)
        return result


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def _storage(value: torch.Tensor) -> torch.UntypedStorage:
    return value.untyped_storage()


@dataclass(frozen=True)
class PassMemory:
    """What a forward and backward pass holds at most, besides the model's weights.

    Attributes:
        fixed: Bytes whatever the number of samples: weights in another precision, for example.
        sample: Bytes more for each sample, which is one noise sample of one pair.
    """

    fixed: int
    sample: int

    def of(self, samples: int, *, passes: int = 1) -> int:
        """Bytes of so many samples in one pass, or in several at the same time."""
        return passes * self.fixed + samples * self.sample

    def pairs(self, free: int, noise_batch: int, *, passes: int = 1) -> int:
        """Most pairs whose noise samples fit into ``free`` bytes; 0 where not one does."""
        return max(0, (free - passes * self.fixed) // (self.sample * noise_batch))


def measure_pass(model: TextToImage, *, pair_id: str | None = None) -> PassMemory:
    """Measure one pass of one sample and one of two.

    On a GPU what its allocator holds, elsewhere the tensors that are alive (``PeakTensors``). No
    result comes of it, so the model's count of evaluations is put back.

    Args:
        model: Model under attack.
        pair_id: Whose rows these are, where the model carries an edit for each pair.

    Raises:
        torch.OutOfMemoryError: Not even two samples fit.
    """
    evaluations, owners = model.unet_evaluations, model.row_pairs
    try:
        _peak(model, 1, pair_id)  # the first pass of all holds what kernels keep afterwards
        one, two = _peak(model, 1, pair_id), _peak(model, 2, pair_id)
    finally:
        model.unet_evaluations, model.row_pairs = evaluations, owners
    sample = max(1, two - one)
    return PassMemory(max(0, one - sample), sample)


def _peak(model: TextToImage, samples: int, pair_id: str | None) -> int:
    """Most bytes that a pass of ``samples`` samples holds beyond what is held before it."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _run(model, samples, pair_id)
        return torch.cuda.max_memory_allocated(device) - before
    tensors = PeakMemory()
    with tensors:
        _run(model, samples, pair_id)
    return tensors.peak


def _run(model: TextToImage, samples: int, pair_id: str | None) -> None:
    """One pass as the solver makes it; its numbers do not matter."""
    latents = torch.zeros(samples, *model.latent_shape, device=model.device)
    rows = torch.zeros(samples, *model.embedding_shape, device=model.device, requires_grad=True)
    timesteps = torch.zeros(samples, dtype=torch.long, device=model.device)
    owners = None if pair_id is None else [pair_id] * samples
    with model.frozen(), torch.enable_grad():
        loss = model.denoising_loss(latents, latents, timesteps, rows, pair_ids=owners)
        torch.autograd.grad(loss.sum(), rows)


def _size(count: int) -> str:
    """Bytes for people: GiB with two places where it is one at least, else whole MiB."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / 2**20:.0f} MiB"


def free_memory(device: torch.device) -> int | None:
    """Bytes that a run may still take on a device; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + kept)
    if device.type != "cpu":
        return None
    known = [value for value in (_of_system(), _of_control_group()) if value is not None]
    return min(known) if known else None


def _of_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else None


def _of_control_group(place: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container or a batch job leaves: the system may have far more."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((place / limit).read_text()) - int((place / used).read_text())
        except (OSError, ValueError):  # another version, or "max": no limit
            continue
    return None


def estimate_batch_size(
    model: TextToImage,
    *,
    noise_batch: int,
    wanted: int | None,
    free: int | None = None,
    pair_id: str | None = None,
) -> int:
    """Pairs of a batch: as many as were asked for, or as fit into the free memory of a GPU.

    On the CPU all passes have one width, whatever the batch, see ``fit_cpu_passes``; a batch is
    what goes side by side.

    Args:
        model: Model under attack, on its device.
        noise_batch: Noise samples of a pair.
        wanted: What the configuration fixes; None measures. Nothing is measured where it is fixed.
        free: Bytes to plan with; None asks the system.
        pair_id: Some pair, where the model carries an edit for each pair.

    Returns:
        1 to ``solver.pairs_at_once``, or ``wanted``.
    """
    if wanted is not None:
        return wanted
    if model.device.type == "cpu":
        return pairs_at_once(model)
    return _fitting(model, noise_batch, free, pair_id)


def fit_cpu_passes(
    model: TextToImage,
    *,
    noise_batch: int,
    wanted: int | None,
    free: int | None = None,
    pair_id: str | None = None,
) -> None:
    """Tell a model on the CPU how many pairs it may compute at once, where memory is short.

    Asked once. Passes of one width give a pair the same bits in any batch. Where they do not fit
    side by side they must be narrower from the start: a system that runs out of memory kills the
    process instead of raising something that could be halved.

    Args:
        model: Model under attack.
        noise_batch: Noise samples of a pair.
        wanted: Pairs at once by the configuration; where memory is short, no more than these.
        free: Bytes to plan with; None asks the system.
        pair_id: Some pair, where the model carries an edit for each pair.
    """
    asked = f"{PASS_KIND}, {noise_batch} samples"
    if model.device.type != "cpu" or asked in model.max_batch_sizes:
        return
    fit = model.max_batch_sizes[asked] = _fitting(model, noise_batch, free, pair_id)
    if fit < pairs_at_once(model):
        narrow = min(fit, wanted or fit, model.max_batch_sizes.get(PASS_KIND, fit))
        model.max_batch_sizes[PASS_KIND] = narrow


def _fitting(model: TextToImage, noise_batch: int, free: int | None, pair_id: str | None) -> int:
    """Pairs at once by the free memory, 1 to ``pairs_at_once``; says how it was found."""
    most = pairs_at_once(model)
    free = free_memory(model.device) if free is None else free
    if free is None:
        log.info("free memory of %s is not known: %d pairs at once", model.device, most)
        return most
    try:
        memory = measure_pass(model, pair_id=pair_id)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        # the attack itself says what does not fit, and what helps
        log.warning("no room to measure a pass of two samples: 1 pair at once")
        return 1
    passes = count(model)
    fit = memory.pairs(int(_SHARE * free), noise_batch, passes=passes)
    chosen = max(1, min(most, fit))
    text = (
        f"a sample takes {_size(memory.sample)} and every pass {_size(memory.fixed)} besides, "
        f"{_size(free)} are free: {chosen} pairs of {noise_batch} samples at once, "
        f"{_size(memory.of(chosen * noise_batch, passes=min(passes, chosen)))}"
    )
    if fit < 1:
        log.warning(
            "%s. That may not fit; checkpoint.gradient_checkpointing=true takes a fraction, and "
            "a smaller attack.noise_batch is a weaker attack",
            text,
        )
    else:
        log.info("%s", text)
    return chosen
