"""Ask several questions of greedy searches in one forward pass, without changing their result.

A search knows which test comes next and what it does with the answer. While a forward pass has
room left, it also asks what it would want to know afterwards, most probable first; answers to
questions that did not come up are thrown away. So a search finds what it would find with one test
at a time, whatever shares a pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

__all__ = ["Key", "Probe", "Search", "Wanted", "run_searches"]

Key = tuple[bool, ...]
"""What one has assumed about the tests between now and a question."""


@dataclass(frozen=True)
class Probe:
    """One question: how much memorization is left of a pair under a set of blocked neurons?

    Attributes:
        pair: Its id.
        blocked: Blocked neurons (D,), bool, all layers one after the other.
    """

    pair: str
    blocked: torch.Tensor


@dataclass(frozen=True)
class Wanted:
    """A question of a search.

    Attributes:
        probability: That its answer will be needed; 1 for the next one.
        key: How to hand the answer back.
        blocked: The set in question (D,).
    """

    probability: float
    key: Key
    blocked: torch.Tensor


class Search(Protocol):
    """A sequence of tests, each of which depends on the outcomes of those before."""

    @property
    def done(self) -> bool:
        """Whether it needs no more answers."""
        ...

    def wanted(self, limit: int) -> list[Wanted]:
        """The next question and likely later ones, at most ``limit``, most probable first."""
        ...

    def settle(self, answers: Mapping[Key, float]) -> None:
        """Take answers, use those that turn out to be needed, forget the others."""
        ...


def run_searches(
    searches: Mapping[str, Search],
    measure: Callable[[Sequence[Probe]], Sequence[float]],
    *,
    rows: Mapping[str, int],
    capacity: int,
    candidates: int = 1,
    finished: Callable[[str], None] = lambda _: None,
) -> dict[str, int]:
    """Run searches to their end, as many questions to a measurement as there is room for.

    Args:
        searches: Pair id to its search.
        measure: Answers questions: similarities, finite.
        rows: Pair id to the rows of a forward pass that one of its questions takes.
        capacity: Rows of a forward pass; at least the most of ``rows``.
        candidates: Questions of one pair per pass, at most; 1 asks the next one only.
        finished: Called with a pair's id when its search is over.

    Returns:
        Pair id to questions asked, needed or not.
    """
    asked = dict.fromkeys(searches, 0)
    left = {pair: search for pair, search in searches.items() if not search.done}
    while left:
        offers = [(pair, want) for pair, s in left.items() for want in s.wanted(candidates)]
        offers.sort(key=lambda offer: -offer[1].probability)  # stable: pairs keep their order
        chosen, free = [], capacity
        for pair, want in offers:
            if rows[pair] <= free:
                chosen.append((pair, want))
                free -= rows[pair]
        if not chosen:
            raise ValueError(f"no question fits into {capacity} rows")
        values = measure([Probe(pair, want.blocked) for pair, want in chosen])
        answers: dict[str, dict[Key, float]] = {}
        for (pair, want), value in zip(chosen, values, strict=True):
            if not math.isfinite(value):
                raise RuntimeError(f"the similarity of {pair} under blocked neurons is {value}")
            asked[pair] += 1
            answers.setdefault(pair, {})[want.key] = value
        for pair, own in answers.items():
            left[pair].settle(own)
            if left[pair].done:
                del left[pair]
                finished(pair)
    return asked
