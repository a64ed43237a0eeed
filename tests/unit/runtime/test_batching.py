import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from dori_lightning.runtime import batching
from dori_lightning.runtime.batching import OomBackoff, map_batches
from dori_lightning.types import InputError
from support.threads import threads


@pytest.fixture
def two_threads():
    with threads(2):
        yield


def of_size(weights, device="cpu"):
    """What is asked of a model; weights without memory."""
    halves = [torch.empty(weights // 2, device="meta") for _ in range(2)]
    return SimpleNamespace(
        device=torch.device(device), parameters=lambda: iter(halves), max_batch_sizes={}
    )


def test_a_small_model_has_a_parallel_batch_for_each_thread_and_others_one(two_threads):
    tiny = of_size(10)
    assert batching.parallel_batches(tiny) == 2
    assert batching.parallel_batches(of_size(batching.SMALL_WEIGHTS)) == 2
    assert batching.parallel_batches(of_size(batching.SMALL_WEIGHTS + 2)) == 1
    assert batching.parallel_batches(of_size(10, "cuda")) == 1
    with batching.disable_parallel():
        assert batching.parallel_batches(tiny) == 1
    torch.set_num_threads(batching.MAX_PARALLEL + 3)
    assert batching.parallel_batches(tiny) == batching.MAX_PARALLEL


def test_two_are_done_at_the_same_time_in_order_on_a_thread_each(two_threads):
    both = threading.Barrier(2, timeout=60)

    def work(number):
        if number < 2:
            both.wait()  # breaks where the other one has not begun
        return number, torch.get_num_threads(), threading.current_thread().name

    found = batching.run_parallel([partial(work, k) for k in range(5)], 2)
    assert [number for number, _, _ in found] == [0, 1, 2, 3, 4]
    assert {own for _, own, _ in found} == {1}
    assert len({name for _, _, name in found}) == 2
    assert torch.get_num_threads() == 2


def test_a_single_batch_is_in_the_callers_thread_with_all_its_threads(two_threads):
    found = batching.run_parallel([threading.get_ident, torch.get_num_threads], 1)
    assert found == [threading.get_ident(), 2]


def test_what_fails_is_raised_when_nothing_runs_any_more(two_threads):
    begun, done = threading.Event(), []

    def slow():
        begun.set()
        done.append(threading.Event().wait(0.2))

    def fails():
        assert begun.wait(60)
        raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        batching.run_parallel([slow, fails], 2)
    assert done == [False]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("device", "pad", "count", "shapes"),
    [
        ("cpu", True, 1, [2] * 3),
        ("cpu", False, 1, [2, 2, 1]),
        ("cpu", True, 2, [2] * 3),
        ("cuda", True, 1, [2, 2, 1]),
    ],
)
def test_items_are_mapped_in_order_in_batches_of_one_shape(device, pad, count, shapes):
    model, seen = of_size(10, device), []

    def double(items):
        seen.append(len(items))
        return [2 * item for item in items]

    backoff = OomBackoff("doubling", "number", "none")
    with threads(count):
        found = map_batches(
            double, range(5), at_once=2 * count, model=model, backoff=backoff, pad=pad
        )
    assert found == [0, 2, 4, 6, 8]
    assert sorted(seen, reverse=True) == shapes
    assert model.max_batch_sizes == {}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        MemoryError(),
    ],
)
def test_batches_are_halved_once_where_memory_runs_out(error, caplog):
    model, seen, room = of_size(10, "cuda"), [], 2

    def work(items):
        seen.append(len(items))
        if len(items) > room:
            raise error
        return items

    backoff = OomBackoff("working", "number", "buy memory")
    again = partial(map_batches, work, model=model, backoff=backoff)
    assert again(range(6), at_once=8) == [*range(6)]
    assert seen == [6, 4, 2, 2, 2]
    assert again(range(2), at_once=8) == [0, 1]
    assert seen[5:] == [2], "what was found is remembered"
    assert caplog.text.count("working: out of memory") == 2
    room = 0
    with pytest.raises(InputError, match=r"single number(.|\n)*fix:   buy memory"):
        again(range(2), at_once=1)
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        again(range(2), at_once=1)
