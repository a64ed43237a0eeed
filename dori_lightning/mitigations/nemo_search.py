"""NeMo's search for one pair, and many such searches with a question each in a forward pass.

Reference: Finding NeMo (Hintersdorf et al., 2024), algorithms 2 and 3 and the released code,
https://arxiv.org/abs/2406.02366.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import torch

from dori_lightning.mitigations.activations import ActivationStatistics
from dori_lightning.mitigations.base import require


@dataclass(frozen=True)
class Levels:
    """How the initial selection of neurons grows from level to level.

    Attributes:
        start_z: First level: neurons beyond this many standard deviations are blocked.
        z_step: How much lower each next level is.
        min_z: Levels are above it.
        start_k: First level: how many of each layer's most active neurons are blocked.
        k_step: How many more each next level has; 0 with ``start_k`` 0 goes by z alone.
    """

    start_z: float = 5.0
    z_step: float = 0.25
    min_z: float = 1.0
    start_k: int = 0
    k_step: int = 1

    def __post_init__(self) -> None:
        require(
            0 <= self.min_z < self.start_z, "levels needs start_z above min_z, and that >= 0", self
        )
        require(
            self.z_step > 0 and self.start_k >= 0 and self.k_step >= 0,
            "levels needs z_step > 0, start_k >= 0 and k_step >= 0",
            self,
        )

    def steps(self, widest: int) -> list[tuple[float, int]]:
        """The levels' (z, k).

        As released: a level is tried while z is above its floor and k below the widest layer's
        number of neurons; the first one always is.

        Args:
            widest: Neurons of the widest layer.
        """
        steps = [(self.start_z, self.start_k)]
        while True:
            # not by repeated subtraction, which would drift off the floor
            z = self.start_z - len(steps) * self.z_step
            k = self.start_k + len(steps) * self.k_step
            if z <= self.min_z + 1e-9 or k >= widest:
                return steps
            steps.append((z, k))

    def of(
        self, activations: Mapping[str, torch.Tensor], statistics: ActivationStatistics
    ) -> list[Level]:
        """A prompt's levels.

        Within a layer, refinement's order is that of the released code with its duplicates left
        out: neurons beyond z by their number, then those among the k most active, most active
        first.

        Args:
            activations: Layer name to the prompt's activations (C,), in execution order.
            statistics: Of ordinary prompts.
        """
        scores = {name: statistics.z_scores(name, value) for name, value in activations.items()}
        # stable, so that equal activations keep their order on every machine
        ranks = {
            name: torch.sort(value, descending=True, stable=True).indices.tolist()
            for name, value in activations.items()
        }
        widths = [len(value) for value in activations.values()]
        levels = []
        for z, k in self.steps(max(widths)):
            layers, first = [], 0
            for name, score in scores.items():
                outliers = (score > z).nonzero().flatten().tolist()
                # a dict keeps the order and drops what is there already
                ordered = dict.fromkeys([*outliers, *ranks[name][:k]])
                layers.append(tuple(first + neuron for neuron in ordered))
                first += len(score)
            levels.append(Level(z, k, tuple(layers), sum(widths)))
        return levels


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
        mask[[neuron for layer in self.layers for neuron in layer]] = True
        return mask


@dataclass(frozen=True)
class SearchResult:
    """What the search for one pair found.

    Attributes:
        level: Level that the initial selection ended with.
        suppressed: Whether that level was enough.
        selected: Similarity under it.
        target: What refinement kept the similarity below.
        blocked: Blocked neurons (D,) in the end.
        similarity: Similarity under ``blocked``.
        questions: How many sets of neurons were asked about.
    """

    level: Level
    suppressed: bool
    selected: float
    target: float
    blocked: torch.Tensor
    similarity: float
    questions: int


Search = Generator[torch.Tensor, float, SearchResult]
"""Yields sets of blocked neurons (D,), bool; is sent the similarity under each."""


def search_neurons(
    levels: Sequence[Level], threshold: float, *, refine: bool = True, group: int = 1
) -> Search:
    """Block until memorization is gone, then unblock what is not needed.

    Args:
        levels: Of the initial selection, from few neurons to many, at least one. It ends with
            the first whose similarity is not above the threshold.
        threshold: Similarity up to which memorization counts as suppressed. Refinement keeps the
            similarity below it, or, where no level was enough, below what the last one reached.
        refine: Whether to try to do without whole layers, then single neurons, each once, from
            the last layer to the first.
        group: Neurons of a layer that are tried together in place of single ones.
    """
    questions = 0
    for level in levels:
        selected = yield level.blocked
        questions += 1
        if selected <= threshold:
            break
    suppressed = selected <= threshold
    target = threshold if suppressed else selected
    blocked, similarity = level.blocked, selected
    layers = [layer for layer in reversed(level.layers) if layer] if refine else []
    groups = [
        layer[start : start + group] for layer in layers for start in range(0, len(layer), group)
    ]
    for neurons in [*layers, *groups]:
        fewer = blocked.clone()
        fewer[list(neurons)] = False
        if torch.equal(fewer, blocked):  # unblocked with its layer
            continue
        tried = yield fewer
        questions += 1
        if tried < target:
            blocked, similarity = fewer, tried
    return SearchResult(level, suppressed, selected, target, blocked, similarity, questions)


def run_searches(
    searches: Mapping[str, Search],
    measure: Callable[[Mapping[str, torch.Tensor]], Mapping[str, float]],
    *,
    finished: Callable[[], object] = lambda: None,
) -> dict[str, SearchResult]:
    """Run searches side by side: the next question of each is answered at the same time.

    Args:
        searches: Pair id to its search.
        measure: Pair id to blocked set (D,) answered by pair id to similarity.
        finished: Called when a search is over.

    Returns:
        Pair id to what its search found, the same as if it had run alone.

    Raises:
        RuntimeError: A similarity is not finite.
    """
    results: dict[str, SearchResult] = {}
    questions = {pair: next(search) for pair, search in searches.items()}
    while questions:
        answers, following = measure(questions), {}
        for pair in questions:
            if not math.isfinite(answers[pair]):
                raise RuntimeError(
                    f"the similarity of {pair} under blocked neurons is {answers[pair]}"
                )
            try:
                following[pair] = searches[pair].send(answers[pair])
            except StopIteration as stop:
                results[pair] = stop.value
                finished()
        questions = following
    return results
