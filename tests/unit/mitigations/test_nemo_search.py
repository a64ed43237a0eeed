"""Batched searches against the plain greedy loop, on measurements made of nothing but a hash."""

import hashlib
import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from dori_lightning.mitigations.nemo_search import Level, PairSearch, Probe, run_searches

NEURONS = 14
LAYERS = (range(4), range(4, 9), range(9, 14))


def similarity_of(seed: int, pair: str, blocked: frozenset[int], steps: int) -> float:
    """Falls with blocked neurons, unequally, roughly, and with many ties."""
    draw = random.Random(f"{seed}{pair}")
    weights = [draw.random() ** 4 for _ in range(NEURONS)]
    noise = hashlib.blake2b(repr((seed, pair, sorted(blocked))).encode(), digest_size=4).digest()
    value = 1 - sum(weights[n] for n in blocked) / sum(weights)
    value += 0.3 * (int.from_bytes(noise, "big") / 2**32 - 0.5)
    return math.floor(value * steps) / steps


def levels_of(seed: int, pair: str) -> list[Level]:
    draw = random.Random(f"levels{seed}{pair}")
    order = {layer: draw.sample(list(layer), len(layer)) for layer in LAYERS}
    found = []
    for k in range(1, draw.randint(2, 5)):
        layers = tuple(tuple(order[layer][: k + draw.randint(-1, 1)]) for layer in LAYERS)
        found.append(Level(5.0 - k, k, layers, NEURONS))
    return found


def one_at_a_time(
    levels: Sequence[Level], threshold: float, similarity: Callable[[frozenset[int]], float]
) -> tuple[set[int], int, float]:
    """NeMo's loops as the paper has them: blocked neurons, tests and last similarity."""
    tests, value, level = 0, math.nan, levels[0]
    for level in levels:
        value = similarity(frozenset(n for layer in level.layers for n in layer))
        tests += 1
        if value <= threshold:
            break
    target = threshold if value <= threshold else value
    kept = [list(layer) for layer in level.layers]
    for layer in reversed(range(len(kept))):
        if not kept[layer]:
            continue
        tried = similarity(frozenset(n for k, own in enumerate(kept) if k != layer for n in own))
        tests += 1
        if tried < target:
            value, kept[layer] = tried, []
    for layer in reversed(range(len(kept))):
        for neuron in list(kept[layer]):
            tried = similarity(frozenset(n for own in kept for n in own if n != neuron))
            tests += 1
            if tried < target:
                value = tried
                kept[layer].remove(neuron)
    return {n for own in kept for n in own}, tests, value


def places(mask: torch.Tensor) -> frozenset[int]:
    return frozenset(mask.nonzero().flatten().tolist())


@pytest.mark.parametrize("steps", [4, 12, 1000])
@pytest.mark.parametrize("candidates", [1, 2, 5, 9])
def test_searches_in_company_find_what_one_test_at_a_time_finds(
    candidates: int, steps: int
) -> None:
    refined = 0
    for seed in range(25):
        draw = random.Random(seed)
        names = [f"pair{k}" for k in range(draw.randint(1, 4))]
        threshold = draw.choice([0.25, 0.5, 0.75, 0.4])
        searches = {name: PairSearch(levels_of(seed, name), threshold) for name in names}
        passes: list[int] = []

        def measure(
            probes: Sequence[Probe], seed: int = seed, passes: list[int] = passes
        ) -> list[float]:
            passes.append(len(probes))
            return [similarity_of(seed, p.pair, places(p.blocked), steps) for p in probes]

        asked = run_searches(
            searches,
            measure,
            rows={name: 1 + k for k, name in enumerate(names)},
            capacity=max(8, len(names)),
            candidates=candidates,
        )
        assert sum(asked.values()) == sum(passes)
        for name, search in searches.items():
            wanted, tests, value = one_at_a_time(
                levels_of(seed, name),
                threshold,
                lambda blocked, seed=seed, name=name: similarity_of(seed, name, blocked, steps),
            )
            assert places(search.blocked) == wanted
            assert (search.tests, search.similarity) == (tests, value)
            assert asked[name] == tests if candidates == 1 else asked[name] >= tests
            refined += len(wanted) < int(search.selection.level.blocked.sum())
    assert refined > 10


def test_more_questions_to_a_pass_need_fewer_passes() -> None:
    passes = {}
    for candidates in (1, 8):
        search = PairSearch([Level(5.0, 0, tuple(map(tuple, LAYERS)), NEURONS)], 0.9)
        count = []

        def measure(probes: Sequence[Probe], count: list[int] = count) -> list[float]:
            count.append(1)
            # two neurons matter, all others are unblocked one after the other
            return [0.5 if {2, 11} <= places(p.blocked) else 1.0 for p in probes]

        run_searches({"a": search}, measure, rows={"a": 1}, capacity=8, candidates=candidates)
        assert places(search.blocked) == {2, 11}
        passes[candidates] = len(count)
    assert passes[8] * 2 < passes[1]


def test_where_no_level_is_enough_refinement_keeps_what_was_reached() -> None:
    levels = [
        Level(2.0, 0, ((0,), (4,), ()), NEURONS),
        Level(1.0, 1, ((0, 1), (4,), (9,)), NEURONS),
    ]
    value = {1: 0.9, 2: 0.95, 3: 0.85, 4: 0.8}
    search = PairSearch(levels, 0.5)
    run_searches(
        {"a": search},
        lambda probes: [value[int(p.blocked.sum())] for p in probes],
        rows={"a": 1},
        capacity=4,
        candidates=4,
    )
    assert not search.selection.suppressed
    assert (search.selection.tests, search.target, search.similarity) == (2, 0.8, 0.8)
    # not below 0.8 without any of them, so nothing is unblocked
    assert places(search.blocked) == {0, 1, 4, 9}


def test_the_published_rules_differ_where_similarity_equals_the_threshold() -> None:
    """At the threshold selection is content, and refinement is not."""
    search = PairSearch([Level(2.0, 0, ((0, 1), (), ()), NEURONS)], 0.5)
    run_searches(
        {"a": search}, lambda probes: [0.5] * len(probes), rows={"a": 1}, capacity=4, candidates=4
    )
    assert search.selection.suppressed
    assert places(search.blocked) == {0, 1}


def test_without_refinement_the_selection_stays() -> None:
    search = PairSearch(levels_of(3, "a"), 0.6, refine=False)
    run_searches(
        {"a": search},
        lambda probes: [similarity_of(3, "a", places(p.blocked), 100) for p in probes],
        rows={"a": 1},
        capacity=2,
        candidates=2,
    )
    assert search.done
    assert places(search.blocked) == places(search.selection.level.blocked)
    assert search.tests == search.selection.tests


def test_a_similarity_that_is_no_number_stops_the_search() -> None:
    search = PairSearch(levels_of(0, "a"), 0.5)
    with pytest.raises(RuntimeError, match="the similarity of a under blocked neurons is nan"):
        run_searches(
            {"a": search}, lambda probes: [math.nan] * len(probes), rows={"a": 1}, capacity=1
        )


def test_a_question_that_fits_into_no_pass_is_an_error() -> None:
    with pytest.raises(ValueError, match="no question fits into 2 rows"):
        run_searches(
            {"a": PairSearch(levels_of(0, "a"), 0.5)}, lambda _: [], rows={"a": 3}, capacity=2
        )


def test_groups_of_neurons_are_tried_together() -> None:
    search = PairSearch([Level(2.0, 0, ((0, 1, 2), (3,), ()), NEURONS)], 0.5, group=2)
    search.settle({(): 0.1})
    assert search.refinement is not None
    assert [list(c) for c in search.refinement.candidates] == [[3], [0, 1, 2], [3], [0, 1], [2]]
