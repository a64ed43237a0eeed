"""NeMo's two stages for one pair: block until memorization is gone, then unblock what can be.

Reference: Finding NeMo (Hintersdorf et al., 2024), algorithms 2 and 3 and the released code,
https://arxiv.org/abs/2406.02366.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dori_lightning.mitigations.nemo_search import Wanted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dori_lightning.mitigations.nemo_search import Key

__all__ = ["Level", "PairSearch", "Refinement", "Selection"]


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
