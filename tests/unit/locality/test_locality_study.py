import torch

from dori_lightning.locality.study import on_lines
from dori_lightning.types import Budget, Condition
from support.locality import attempts, rows

CONDITION = Condition("dori", "random", Budget(steps=1))


def test_lines_go_to_another_trigger_another_image_and_noise():
    first, second = (attempts(name, rows(3, k), rows(3, 10 + k)) for k, name in enumerate("ab"))
    found = {
        (one.pair.id, one.restart, toward, place): one.embedding
        for toward, place, one in on_lines([*first, *second], [0.25, 1.0], CONDITION, count=2)
    }
    assert found.keys() == {
        (name, k, toward, place)
        for name in "ab"
        for k in range(2)
        for toward in ("same_image", "other_image", "random")
        for place in (0.25, 1.0)
    }
    near = found["a", 0, "same_image", 0.25]
    assert torch.allclose(near, 0.75 * first[0].end + 0.25 * first[1].end)
    assert torch.equal(found["a", 0, "same_image", 1.0], first[1].end)
    assert torch.equal(found["a", 0, "other_image", 1.0], second[0].end)
    noise = found["a", 0, "random", 1.0]
    assert not any(torch.equal(noise, own.end) for own in (*first, *second))
    for seed in (0, 1):
        again = on_lines([*first, *second], [1.0], CONDITION, count=1, seed=seed)
        own = next(one.embedding for toward, _, one in again if toward == "random")
        assert torch.equal(own, noise) == (seed == 0)


def test_two_triggers_have_one_line_and_one_has_none():
    two, one = attempts("a", rows(2, 0), rows(2, 1)), attempts("b", rows(1, 2), rows(1, 3))
    lines = on_lines([*two, *one], [0.5], CONDITION, count=5)
    assert sorted((own.pair.id, toward) for toward, _, own in lines) == [
        ("a", "other_image"), ("a", "random"), ("a", "same_image"),
        ("b", "other_image"), ("b", "random"),
    ]  # fmt: skip
    alone = on_lines(two, [0.5], CONDITION, count=1)
    assert {toward for toward, _, _ in alone} == {"same_image", "random"}
