import torch

from dori_lightning.mitigations.wanda import select, select_over_time


def test_selection_by_hand():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [1.0, 1.0, -5.0, 9.0]])
    target, base = torch.tensor([1.0, 2.0, 3.0, 0.5]), torch.tensor([0.5, 1.0, 4.0, 0.1])
    # scores of the target: 4, 6, 6, 0.5 and 1, 2, 15, 4.5; the third is more on the base
    assert select(weight, target, base, 0.5).tolist() == [
        [False, True, False, False],
        [False, False, False, True],
    ]
    assert select(weight, target, base, 0.75).tolist() == [
        [True, True, False, False],
        [False, True, False, True],
    ]


def test_candidates_are_the_floor_of_the_share_of_a_row():
    weight, base = torch.rand(3, 100) + 1, torch.zeros(100)
    for fraction, count in ((0.01, 1), (0.29, 29), (0.299, 29)):
        chosen = select(weight, torch.ones(100), base, fraction)
        assert chosen.sum(1).tolist() == [count] * 3


def test_steps_are_joined_by_how_often_a_weight_is_chosen():
    weight = torch.ones(1, 4)
    norms = torch.tensor([[4.0, 1, 1, 1], [4, 1, 1, 1], [1, 4, 1, 1], [1, 1, 1, 4]])
    base = torch.zeros(4, 4)

    def joined(ratio: float) -> list[bool]:
        return select_over_time(weight, norms, base, fraction=0.25, select_ratio=ratio)[0].tolist()

    assert joined(0.0) == [True, True, False, True]
    assert joined(0.25) == [True, False, False, False]
    assert joined(0.5) == [False] * 4
