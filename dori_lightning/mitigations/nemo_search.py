"""Ask several questions of greedy searches in one forward pass, without changing their result.

A search knows which test comes next and what it does with the answer. While a forward pass has
room left, it also asks what it would want to know afterwards, most probable first; answers to
questions that did not come up are thrown away. So a search finds what it would find with one test
at a time, whatever shares a pass.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dori_lightning.mitigations.activations import ActivationStatistics

# -------- nemo_search

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


# -------- nemo_stages
# NeMo's two stages for one pair: block until memorization is gone, then unblock what can be.
#
# Reference: Finding NeMo (Hintersdorf et al., 2024), algorithms 2 and 3 and the released code,
# https://arxiv.org/abs/2406.02366.


@dataclass(frozen=True)
class Level:
    """One step of the initial selection.

    Attributes:
        z: Neurons above this many standard deviations are blocked.
        k: So are the k most active ones of every layer.
        layers: Blocked neurons of each layer as places among all D, in the order in which
            refinement tries to do without them.
        neurons: D.
    """

    z: float
    k: int
    layers: tuple[tuple[int, ...], ...]
    neurons: int

    @property
    def blocked(self) -> torch.Tensor:
        """The set as a mask (D,)."""
        mask = torch.zeros(self.neurons, dtype=torch.bool)
        mask[[place for layer in self.layers for place in layer]] = True
        return mask


@dataclass
class Selection:
    """Block more and more neurons until memorization is suppressed or levels run out.

    Attributes:
        levels: From few neurons to many, at least one.
        threshold: Suppressed where the similarity is not above it.
        tests: Answers used so far.
        similarity: At the level reached; NaN before the first answer.
    """

    levels: Sequence[Level]
    threshold: float
    tests: int = 0
    similarity: float = math.nan

    @property
    def suppressed(self) -> bool:
        """Whether the level reached is enough."""
        return self.tests > 0 and self.similarity <= self.threshold

    @property
    def done(self) -> bool:
        """Whether a level was enough or none is left."""
        return self.suppressed or self.tests == len(self.levels)

    @property
    def level(self) -> Level:
        """The level reached."""
        return self.levels[max(self.tests - 1, 0)]

    def wanted(self, limit: int) -> list[Wanted]:
        """The next levels; each is reached only if those before are not enough."""
        rest = self.levels[self.tests : self.tests + limit]
        return [Wanted(0.5**k, (False,) * k, level.blocked) for k, level in enumerate(rest)]

    def settle(self, answers: Mapping[Key, float]) -> None:
        """Go on to the first level that is enough, as far as answers reach."""
        key: Key = ()
        while not self.done and key in answers:
            self.similarity = answers[key]
            self.tests += 1
            key = (*key, False)


@dataclass
class Refinement:
    """Unblock what is not needed: whole layers, then neurons, each once, in a fixed order.

    Attributes:
        blocked: Blocked neurons (D,); shrinks.
        candidates: Places that are tried together, one after the other; what is unblocked already
            is skipped.
        threshold: A candidate stays unblocked where the similarity is below it.
        similarity: Under ``blocked``.
        tests: Answers used so far.
    """

    blocked: torch.Tensor
    candidates: Sequence[Sequence[int]]
    threshold: float
    similarity: float
    tests: int = 0
    place: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        self.place = self._next(self.place, self.blocked)

    @property
    def done(self) -> bool:
        """Whether every candidate was tried."""
        return self.place == len(self.candidates)

    def _next(self, place: int, blocked: torch.Tensor) -> int:
        """The first candidate from ``place`` on of which something is blocked."""
        while place < len(self.candidates) and not blocked[list(self.candidates[place])].any():
            place += 1
        return place

    def _without(self, place: int, blocked: torch.Tensor) -> torch.Tensor:
        fewer = blocked.clone()
        fewer[list(self.candidates[place])] = False
        return fewer

    def wanted(self, limit: int) -> list[Wanted]:
        """The likeliest nodes of the tree of outcomes, as this search went so far."""
        rate = (self.accepted + 1) / (self.tests + 2)
        # keys are unique and break ties, so that heap and result are deterministic
        heap: list[tuple[float, Key, int, torch.Tensor]] = [(-1.0, (), self.place, self.blocked)]
        found: list[Wanted] = []
        while heap and len(found) < limit:
            negative, key, place, blocked = heapq.heappop(heap)
            if place == len(self.candidates):
                continue
            fewer = self._without(place, blocked)
            found.append(Wanted(-negative, key, fewer))
            for outcome, after, share in ((True, fewer, rate), (False, blocked, 1 - rate)):
                following = self._next(place + 1, after)
                heapq.heappush(heap, (negative * share, (*key, outcome), following, after))
        return found

    def settle(self, answers: Mapping[Key, float]) -> None:
        """Walk down the tree as far as answers reach."""
        key: Key = ()
        while not self.done and key in answers:
            similarity = answers[key]
            unneeded = similarity < self.threshold
            if unneeded:
                self.blocked = self._without(self.place, self.blocked)
                self.similarity = similarity
                self.accepted += 1
            self.tests += 1
            self.place = self._next(self.place + 1, self.blocked)
            key = (*key, unneeded)


@dataclass
class PairSearch:
    """One pair's whole search: selection, then refinement.

    Attributes:
        levels: Of the initial selection.
        threshold: Of similarity, for selection and refinement. Where no level is enough,
            refinement keeps to the similarity that the last one reached.
        refine: Whether to refine at all.
        group: Neurons of a layer that refinement tries to unblock together.
        selection: The first stage.
        refinement: The second, once it began.
    """

    levels: Sequence[Level]
    threshold: float
    refine: bool = True
    group: int = 1
    selection: Selection = field(init=False)
    refinement: Refinement | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.selection = Selection(self.levels, self.threshold)

    @property
    def done(self) -> bool:
        """Whether both stages are over."""
        if self.refinement is None:
            return self.selection.done and not self.refine
        return self.refinement.done

    @property
    def blocked(self) -> torch.Tensor:
        """Blocked neurons (D,) as they stand."""
        if self.refinement is None:
            return self.selection.level.blocked
        return self.refinement.blocked

    @property
    def tests(self) -> int:
        """Tests that one at a time would have taken."""
        return self.selection.tests + (self.refinement.tests if self.refinement else 0)

    @property
    def similarity(self) -> float:
        """Similarity under ``blocked``."""
        return (self.refinement or self.selection).similarity

    @property
    def target(self) -> float:
        """What refinement keeps the similarity below."""
        return self.threshold if self.selection.suppressed else self.selection.similarity

    def wanted(self, limit: int) -> list[Wanted]:
        """Questions of the stage it is in."""
        return (self.refinement or self.selection).wanted(limit)

    def settle(self, answers: Mapping[Key, float]) -> None:
        """Hand answers to the stage it is in, and begin the next one when that is over."""
        (self.refinement or self.selection).settle(answers)
        if self.refinement is None and self.selection.done and self.refine:
            level = self.selection.level
            layers = [layer for layer in reversed(level.layers) if layer]
            few = [
                layer[start : start + self.group]
                for layer in layers
                for start in range(0, len(layer), self.group)
            ]
            self.refinement = Refinement(
                level.blocked, [*layers, *few], self.target, self.selection.similarity
            )


# -------- nemo_selection
# Which neurons NeMo suspects: those far out of the ordinary, and the most active ones.
#
# Reference: Finding NeMo (Hintersdorf et al., 2024), algorithm 2,
# https://arxiv.org/abs/2406.02366.


@dataclass(frozen=True)
class Schedule:
    """How selection grows from level to level.

    Attributes:
        start_z: Neurons beyond this many standard deviations are selected first.
        z_step: How much lower the next level is.
        min_z: Levels are above it.
        start_k: How many of the most active neurons of every layer are selected first.
        k_step: How many more the next level has.
        two_sided: Whether activations below the mean count too.
    """

    start_z: float
    z_step: float
    min_z: float
    start_k: int
    k_step: int
    two_sided: bool

    def steps(self, widest: int) -> list[tuple[float, int]]:
        """The levels' (z, k).

        As released: a level is tried while z is above its floor and k below the widest layer's
        number of neurons; the first one always is.

        Args:
            widest: Neurons of the widest layer.
        """
        found = [(self.start_z, self.start_k)]
        while True:
            step = len(found)
            # not by repeated subtraction, which would drift off the floor
            z, k = self.start_z - step * self.z_step, self.start_k + step * self.k_step
            if z <= self.min_z + 1e-9 or k >= widest:
                return found
            found.append((z, k))


def levels_of(
    activations: Mapping[str, torch.Tensor],
    statistics: ActivationStatistics,
    schedule: Schedule,
) -> list[Level]:
    """A prompt's levels of selection.

    Within a layer, refinement's order is that of the released code with its duplicates left out:
    neurons beyond z by their number, then those among the k most active, most active first.

    Args:
        activations: Layer name to the prompt's activations (C,), in execution order.
        statistics: Of ordinary prompts.
        schedule: How selection grows.
    """
    scores = {
        name: statistics.z_scores(name, value, two_sided=schedule.two_sided)
        for name, value in activations.items()
    }
    # stable, so that equal activations keep their order on every machine
    ranks = {
        name: torch.sort(value, descending=True, stable=True).indices.tolist()
        for name, value in activations.items()
    }
    neurons = sum(len(value) for value in activations.values())
    found = []
    for z, k in schedule.steps(max(len(value) for value in activations.values())):
        layers, first = [], 0
        for name, score in scores.items():
            chosen = (score > z).nonzero().flatten().tolist()
            # a dict keeps the order and drops what is there already
            ordered = dict.fromkeys([*chosen, *ranks[name][:k]])
            layers.append(tuple(first + place for place in ordered))
            first += len(score)
        found.append(Level(z, k, tuple(layers), neurons))
    return found
