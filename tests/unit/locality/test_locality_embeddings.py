import math
from dataclasses import replace

import pytest
import torch

from dori_lightning.locality.embeddings import (
    Attempt,
    EmbeddingFindings,
    cosines,
    distances,
    embedding_findings,
    relative_distances,
)
from support.locality import attempts, own_prompts, prompt_groups, rows


def test_distances_and_cosines_are_those_of_flat_vectors():
    many = rows(5, 0, shape=(3, 7))
    flat = many.flatten(1).double()
    assert torch.allclose(distances(many), torch.cdist(flat, flat))
    assert cosines(many)[1, 3] == pytest.approx(
        float(torch.cosine_similarity(flat[1], flat[3], dim=0))
    )
    assert distances(torch.cat([many, many + 1e-4]))[0, 5] == pytest.approx(
        1e-4 * math.sqrt(21), rel=1e-2
    ), "near rows keep their digits"


def test_parts_of_columns_add_up(monkeypatch):
    many = rows(4, 1, shape=(5, 11))
    whole = distances(many)
    monkeypatch.setattr("dori_lightning.locality.embeddings.COLUMNS", 7)
    assert torch.allclose(distances(many), whole)


def test_relative_distance_knows_no_scale():
    many = rows(4, 2)
    length = many.flatten(1).double().norm(dim=1)
    own = relative_distances(distances(many), length)
    assert torch.allclose(own, relative_distances(distances(10 * many), 10 * length))
    orthogonal = torch.eye(3)[:, None]
    assert relative_distances(distances(orthogonal), torch.ones(3))[0, 1] == pytest.approx(
        math.sqrt(2)
    )


PROMPTS = prompt_groups()


def compare(*sets: list[Attempt]) -> EmbeddingFindings:
    every = [attempt for own in sets for attempt in own]
    return embedding_findings(every, own_prompts("a", "b"), PROMPTS)


def test_short_moves_from_far_starts_are_seen_as_such():
    """The honest control: ends are as scattered as starts, and stay beside their own."""
    way = rows(1, 7)[0] / 10
    sets = [attempts(name, rows(6, k), rows(6, k) + way) for k, name in enumerate("ab")]
    found = compare(*sets)
    spread = {s.group: s for s in found.spreads}
    assert spread["triggers"].distance.value == pytest.approx(spread["starts"].distance.value)
    (move,) = found.moves
    assert move.displacement.value == pytest.approx(float(way.norm()), rel=1e-4)
    assert move.own_start is not None
    assert move.own_start.rate == 1.0
    assert move.cosine.value == pytest.approx(1.0), "every move goes the same way"
    assert move.cosine_between.value == pytest.approx(1.0)
    assert found.random_distance == pytest.approx(math.sqrt(2 * 4 * 6))


def test_ends_that_meet_in_one_place_are_seen_as_such():
    sets = [
        attempts(name, rows(6, k), rows(1, 90 + k).expand(6, -1, -1) + 0.01 * rows(6, 40 + k))
        for k, name in enumerate("ab")
    ]
    found = compare(*sets)
    ends = next(s for s in found.spreads if s.group == "triggers")
    assert ends.distance.value < 0.2 * ends.distance_between.value
    assert ends.cosine.value > 0.99 > ends.cosine_between.high
    assert found.moves[0].own_start is not None
    assert found.moves[0].own_start.rate < 0.5


def test_the_nearest_prompt_is_counted_with_its_chance():
    prompt = own_prompts("a")["a"]
    at_prompt = attempts("a", rows(4, 0), prompt.expand(4, -1, -1) + 0.01 * rows(4, 2))
    at_memorized = attempts("b", rows(2, 3), PROMPTS["memorized_prompts"].embeddings[:2])
    found = compare(at_prompt, at_memorized)
    near, started = found.nearest
    assert (near.what, started.what) == ("triggers", "starts")
    assert (near.own.hits, near.memorized.hits, near.control.hits) == (4, 2, 0)
    assert near.chance == pytest.approx(1 / 7)


def test_controls_are_a_group_of_their_own():
    attacked = attempts("c0", rows(3, 2), rows(3, 3), kind="control")
    found = compare(attempts("a", rows(3, 0), rows(3, 1)), attacked)
    assert [s.group for s in found.spreads] == [
        "starts", "triggers", "control_ends", "memorized_prompts", "control_prompts"
    ]  # fmt: skip
    assert [m.held for m in found.moves] == ["memorized", "control"]
    assert {p.what for p in found.places} == {
        "start", "end", "own_prompt", "memorized_prompt", "control_prompt"
    }  # fmt: skip
    assert all(math.isfinite(value) for p in found.places for value in (*p.pca, *p.tsne))


def test_no_working_trigger_leaves_the_prompts():
    failed = [replace(one, works=False) for one in attempts("a", rows(2, 0), rows(2, 1))]
    found = compare(failed)
    assert [s.group for s in found.spreads] == ["memorized_prompts", "control_prompts"]
    assert found.moves == ()
