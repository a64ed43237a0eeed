import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime import batching
from support.threads import threads


@pytest.fixture
def two_threads() -> Iterator[None]:
    with threads(2):
        yield


def of_size(weights: int, device: str = "cpu") -> TextToImage:
    """What is asked of a model; weights without memory."""
    parameters = [
        torch.empty(weights // 2, device="meta"),
        torch.empty(weights // 2, device="meta"),
    ]
    return cast(
        "TextToImage",
        SimpleNamespace(device=torch.device(device), parameters=lambda: iter(parameters)),
    )


def test_a_small_model_has_as_many_lanes_as_threads_others_have_one(two_threads: None) -> None:
    tiny = of_size(10)
    assert batching.parallel_batches(tiny) == 2
    assert batching.parallel_batches(of_size(batching.SMALL_WEIGHTS)) == 2
    assert batching.parallel_batches(of_size(batching.SMALL_WEIGHTS + 2)) == 1
    assert batching.parallel_batches(of_size(10, "cuda")) == 1
    with batching.disable_parallel():
        assert batching.parallel_batches(tiny) == 1
    torch.set_num_threads(batching.MAX_PARALLEL + 3)
    assert batching.parallel_batches(tiny) == batching.MAX_PARALLEL


def test_two_are_done_at_the_same_time_in_order_on_a_thread_each(two_threads: None) -> None:
    both = threading.Barrier(2, timeout=60)

    def work(number: int) -> tuple[int, int, str]:
        if number < 2:
            both.wait()  # breaks where the other one has not begun
        return number, torch.get_num_threads(), threading.current_thread().name

    found = batching.run_parallel([partial(work, k) for k in range(5)], 2)
    assert [number for number, _, _ in found] == [0, 1, 2, 3, 4]
    assert {own for _, own, _ in found} == {1}
    assert len({name for _, _, name in found}) == 2
    assert torch.get_num_threads() == 2


def test_one_lane_is_the_callers_own_thread_with_all_its_threads(two_threads: None) -> None:
    found = batching.run_parallel([threading.get_ident, torch.get_num_threads], 1)
    assert found == [threading.get_ident(), 2]


def test_what_fails_is_raised_when_nothing_runs_any_more(two_threads: None) -> None:
    begun, done = threading.Event(), []

    def slow() -> None:
        begun.set()
        done.append(threading.Event().wait(0.2))

    def fails() -> None:
        assert begun.wait(60)
        raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        batching.run_parallel([slow, fails], 2)
    assert done == [False]
    assert torch.get_num_threads() == 2
