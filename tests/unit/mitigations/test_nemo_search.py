"""Searches side by side against the plain greedy loop, on similarities made of a hash."""

import hashlib
import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from dori_lightning.mitigations.nemo_search import (
    Level,
    Search,
    SearchResult,
    run_searches,
    search_neurons,
)

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
def test_searches_in_company_find_what_one_pair_at_a_time_finds(steps):
    refined = 0
    for seed in range(25):
        draw = random.Random(seed)
        names = [f"pair{k}" for k in range(draw.randint(1, 4))]
        threshold = draw.choice([0.25, 0.5, 0.75, 0.4])
        batches: list[int] = []

        def measure(blocked, seed=seed, batches=batches):
            batches.append(len(blocked))
            return {n: similarity_of(seed, n, places(m), steps) for n, m in blocked.items()}

        ended: list[bool] = []
        found = run_searches(
            {name: search_neurons(levels_of(seed, name), threshold) for name in names},
            measure,
            finished=lambda ended=ended: ended.append(True),
        )
        assert len(ended) == len(names)
        for name in names:
            wanted, questions, value = one_at_a_time(
                levels_of(seed, name),
                threshold,
                lambda blocked, seed=seed, name=name: similarity_of(seed, name, blocked, steps),
            )
            result = found[name]
            assert places(result.blocked) == wanted
            assert (result.questions, result.similarity) == (questions, value)
            refined += len(wanted) < int(result.level.blocked.sum())
        # a question of every pair that is not done yet shares a batch
        assert len(batches) == max(result.questions for result in found.values())
        assert sum(batches) == sum(result.questions for result in found.values())
    assert refined > 10


def answered(
    search: Search, similarity: Callable[[frozenset[int]], float]
) -> tuple[SearchResult, list[frozenset[int]]]:
    """What one search finds, and the sets that it asked about."""
    asked: list[frozenset[int]] = []

    def measure(blocked):
        asked.append(places(blocked["a"]))
        return {"a": similarity(asked[-1])}

    return run_searches({"a": search}, measure)["a"], asked


def test_where_no_level_is_enough_refinement_keeps_what_was_reached():
    levels = [
        Level(2.0, 0, ((0,), (4,), ()), NEURONS),
        Level(1.0, 1, ((0, 1), (4,), (9,)), NEURONS),
    ]
    value = {1: 0.9, 2: 0.95, 3: 0.85, 4: 0.8}
    found, asked = answered(search_neurons(levels, 0.5), lambda blocked: value[len(blocked)])
    assert not found.suppressed
    assert asked[:2] == [{0, 4}, {0, 1, 4, 9}]
    assert (found.level, found.target, found.similarity) == (levels[1], 0.8, 0.8)
    # not below 0.8 without any of them, so nothing is unblocked
    assert places(found.blocked) == {0, 1, 4, 9}


def test_the_published_rules_differ_where_similarity_equals_the_threshold():
    """At the threshold selection is content, and refinement is not."""
    levels = [Level(2.0, 0, ((0, 1), (), ()), NEURONS)]
    found, _ = answered(search_neurons(levels, 0.5), lambda _: 0.5)
    assert found.suppressed
    assert places(found.blocked) == {0, 1}


def test_without_refinement_the_selection_stays():
    search = search_neurons(levels_of(3, "a"), 0.6, refine=False)
    found, asked = answered(search, lambda blocked: similarity_of(3, "a", blocked, 100))
    assert places(found.blocked) == places(found.level.blocked) == asked[-1]
    assert found.questions == len(asked) <= len(levels_of(3, "a"))


def test_a_similarity_that_is_no_number_stops_the_search():
    with pytest.raises(RuntimeError, match="the similarity of a under blocked neurons is nan"):
        answered(search_neurons(levels_of(0, "a"), 0.5), lambda _: math.nan)


def test_groups_of_neurons_are_tried_together():
    levels = [Level(2.0, 0, ((0, 1, 2), (3,), ()), NEURONS)]
    search = search_neurons(levels, 0.5, group=2)
    _, asked = answered(search, lambda blocked: 0.1 if len(blocked) == 4 else 0.9)
    everything = {0, 1, 2, 3}
    assert [everything - blocked for blocked in asked[1:]] == [{3}, {0, 1, 2}, {3}, {0, 1}, {2}]
