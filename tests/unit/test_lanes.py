import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from dori_lightning import lanes

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_there_are_as_many_lanes_as_threads_and_one_on_a_gpu(two_threads: None) -> None:
    assert lanes.count(CPU) == 2
    assert lanes.count(torch.device("cuda")) == 1
    with lanes.in_one():
        assert lanes.count(CPU) == 1
    torch.set_num_threads(lanes.MOST + 3)
    assert lanes.count(CPU) == lanes.MOST


def test_two_are_done_at_the_same_time_in_order_on_a_thread_each(two_threads: None) -> None:
    both = threading.Barrier(2, timeout=60)

    def work(number: int) -> tuple[int, int, str]:
        if number < 2:
            both.wait()  # breaks where the other one has not begun
        return number, torch.get_num_threads(), threading.current_thread().name

    found = lanes.side_by_side([partial(work, k) for k in range(5)], 2)
    assert [number for number, _, _ in found] == [0, 1, 2, 3, 4]
    assert {threads for _, threads, _ in found} == {1}
    assert len({name for _, _, name in found}) == 2
    assert torch.get_num_threads() == 2


def test_one_lane_is_the_callers_own_thread_with_all_its_threads(two_threads: None) -> None:
    found = lanes.side_by_side([threading.get_ident, torch.get_num_threads], 1)
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
        lanes.side_by_side([slow, fails], 2)
    assert done == [False]
    assert torch.get_num_threads() == 2
