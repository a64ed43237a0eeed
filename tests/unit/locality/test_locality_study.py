import torch

from dori_lightning.locality.study import lines_between
from support.locality import rows, triggers


def test_lines_go_to_another_trigger_another_image_and_noise():
    sets = [triggers(name, rows(3, k), rows(3, 10 + k)) for k, name in enumerate("ab")]
    lines = lines_between(sets, count=2)
    assert [(line.pair.id, line.toward, line.number) for line in lines] == [
        (name, toward, k)
        for name in "ab"
        for k in range(2)
        for toward in ("same_image", "other_image", "random")
    ]
    same, other, noise = lines[:3]
    assert torch.equal(same.first, sets[0].ends[0])
    assert torch.equal(same.last, sets[0].ends[1])
    assert torch.equal(other.last, sets[1].ends[0])
    assert torch.allclose(same.at(0.25), 0.75 * same.first + 0.25 * same.last)
    assert not any(torch.equal(noise.last, end) for own in sets for end in own.ends)
    again = lines_between(sets, count=2)[2]
    assert torch.equal(noise.last, again.last)
    assert not torch.equal(noise.last, lines_between(sets, count=2, seed=1)[2].last)


def test_two_triggers_have_one_line_and_one_has_none():
    two, one = triggers("a", rows(2, 0), rows(2, 1)), triggers("b", rows(1, 2), rows(1, 3))
    lines = lines_between([two, one], count=5)
    assert [(line.pair.id, line.toward) for line in lines] == [
        ("a", "same_image"), ("a", "other_image"), ("a", "random"),
        ("b", "other_image"), ("b", "random"),
    ]  # fmt: skip
    alone = lines_between([two, triggers("b", rows(0, 0), rows(0, 0))], count=1)
    assert [line.toward for line in alone] == ["same_image", "random"]
