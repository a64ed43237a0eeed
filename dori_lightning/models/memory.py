"""Estimate how many pairs of an attack fit into memory, from two small batches before the run.

The gradient of an embedding needs what the denoiser computed on the way forward: about 0.7 GiB for
each sample of Stable Diffusion at 512 pixels. So the number of pairs in a batch decides whether a
run ends in "out of memory". The peak memory of a batch of one sample and of a batch of two tells
what a sample costs and what every batch costs anyway, whatever the architecture, precision and
kernels are.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime.batching import is_out_of_memory, is_small, parallel_batches

log = logging.getLogger(__name__)

MAX_PAIRS = 8
"""Pairs of a batch where memory does not decide."""

PARALLEL_PAIRS = 4
"""Pairs of each batch where several run in parallel: larger ones were no faster, and more of a
batch is padding."""

ATTACK = "attack"
"""Kind of batch: under this name a model remembers the largest that fits (``OomBackoff``)."""

_SHARE = 0.8
"""Share of the free memory that is planned with; the rest is for what was not measured: workspaces
of kernels, an allocator's gaps, other parts of the run."""


def pairs_at_once(model: TextToImage) -> int:
    """Pairs that are computed at the same time where memory does not decide."""
    return PARALLEL_PAIRS * parallel_batches(model) if is_small(model) else MAX_PAIRS


def estimate_batch_size(
    model: TextToImage,
    *,
    noise_batch: int,
    wanted: int | None,
    free: int | None = None,
    pair_id: str | None = None,
) -> int:
    """Pairs of a batch, by the free memory, which is measured once for each ``noise_batch``.

    On the CPU the solver cuts every batch into the same shapes, and this limits them by the memory
    (``model.max_batch_sizes``). They must fit from the start: a system that runs out of memory
    kills the process instead of raising something after which a batch could be halved.

    Args:
        model: Model under attack, on its device.
        noise_batch: Noise samples of a pair.
        wanted: Pairs by the configuration; None for as many as fit. On a GPU nothing is measured
            where they are given.
        free: Bytes to plan with; None asks the system.
        pair_id: Some pair, where the model carries an edit for each pair.

    Returns:
        1 to ``pairs_at_once``, or ``wanted``.
    """
    cpu, most = model.device.type == "cpu", pairs_at_once(model)
    if wanted is not None and not cpu:
        return wanted
    limits, measured = model.max_batch_sizes, f"{ATTACK}, {noise_batch} samples"
    if measured not in limits:
        fit = limits[measured] = _fitting_pairs(model, noise_batch, free, pair_id)
        if cpu and fit < most:
            limits[ATTACK] = min(fit, wanted or fit, limits.get(ATTACK, fit))
    return wanted or (most if cpu else limits[measured])


def _fitting_pairs(
    model: TextToImage, noise_batch: int, free: int | None, pair_id: str | None
) -> int:
    """Pairs at once by the free memory, 1 to ``pairs_at_once``; logs the numbers."""
    most = pairs_at_once(model)
    free = free_memory(model.device) if free is None else free
    if free is None:
        log.info("free memory of %s is not known: %d pairs at once", model.device, most)
        return most
    try:
        memory = measure_batch(model, pair_id=pair_id)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # the attack itself says what does not fit, and what helps
        log.warning("no memory to measure a batch of two samples: 1 pair at once")
        return 1
    parallel = parallel_batches(model)
    fit = memory.pairs(int(_SHARE * free), noise_batch, parallel=parallel)
    chosen = max(1, min(most, fit))
    taken = memory.total(chosen * noise_batch, parallel=min(parallel, chosen))
    text = (
        f"a sample takes {_size(memory.sample)} and every batch {_size(memory.fixed)} besides, "
        f"{_size(free)} are free: {chosen} pairs of {noise_batch} samples at once, "
        f"{_size(taken)}"
    )
    if fit < 1:
        log.warning(
            "%s. That may not fit; checkpoint.gradient_checkpointing=true takes a fraction, "
            "attack.samples_per_forward=1 computes the samples of a pair in turn, and a smaller "
            "attack.noise_batch is a weaker attack",
            text,
        )
    else:
        log.info("%s", text)
    return chosen


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


@dataclass(frozen=True)
class BatchMemory:
    """Peak memory of a forward and backward pass, besides the model's weights.

    Attributes:
        fixed: Bytes whatever the number of samples: weights in another precision, for example.
        sample: Bytes more for each sample, which is one noise sample of one pair.
    """

    fixed: int
    sample: int

    def total(self, samples: int, *, parallel: int = 1) -> int:
        """Bytes of so many samples in one batch, or in several parallel ones."""
        return parallel * self.fixed + samples * self.sample

    def pairs(self, free: int, noise_batch: int, *, parallel: int = 1) -> int:
        """Most pairs whose noise samples fit into ``free`` bytes; 0 where not one does."""
        return max(0, (free - parallel * self.fixed) // (self.sample * noise_batch))


def measure_batch(model: TextToImage, *, pair_id: str | None = None) -> BatchMemory:
    """Measure the peak memory of a batch of one sample and of one of two.

    On a GPU what its allocator holds, elsewhere the tensors that are alive (``PeakMemory``). No
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
    return BatchMemory(max(0, one - sample), sample)


def _peak(model: TextToImage, samples: int, pair_id: str | None) -> int:
    """Most bytes that a batch takes beyond those in use before it."""
    device = model.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _run(model, samples, pair_id)
        return int(torch.cuda.max_memory_allocated(device) - before)
    memory = PeakMemory()
    with memory:
        _run(model, samples, pair_id)
    return memory.peak


def _run(model: TextToImage, samples: int, pair_id: str | None) -> None:
    """One batch as the solver makes it; its numbers do not matter."""
    latents = torch.zeros(samples, *model.latent_shape, device=model.device)
    rows = torch.zeros(samples, *model.embedding_shape, device=model.device, requires_grad=True)
    timesteps = torch.zeros(samples, dtype=torch.long, device=model.device)
    owners = None if pair_id is None else [pair_id] * samples
    with model.frozen(), torch.enable_grad():
        loss = model.denoising_loss(latents, latents, timesteps, rows, pair_ids=owners)
        torch.autograd.grad(loss.sum(), rows)


class PeakMemory(TorchDispatchMode):
    """Peak bytes of the tensors that are made while this is open.

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
        known = {storage.data_ptr() for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage.nbytes() and storage.data_ptr() not in known:
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._alive[reference.cdata] = (reference, storage.nbytes())
                self._upper += storage.nbytes()
        if self._upper > self.peak:  # looking through all of them at every operation takes long
            self._alive = {
                key: alive
                for key, alive in self._alive.items()
                if not alive[0].expired()  # type: ignore[no-untyped-call]
            }
            self._upper = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._upper)
        return result


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [
        value.untyped_storage()
        for value in tree_leaves(values)
        if isinstance(value, torch.Tensor) and value.layout is torch.strided
    ]


def free_memory(device: torch.device) -> int | None:
    """Bytes that a run may still take on a device; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    if device.type != "cpu":
        return None
    known = [value for value in (_of_system(), _of_control_group()) if value is not None]
    return min(known) if known else None


def _of_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next(
        (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None
    )


def _of_control_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container or a batch job leaves: the system may have far more."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return int((folder / limit).read_text()) - int((folder / used).read_text())
        except (OSError, ValueError):  # another version, or "max": no limit
            continue
    return None
