import math

import pytest
import torch

from dori_lightning.locality import layers as module
from dori_lightning.locality.layers import agreement, agreement_of, iou, overlap, selected
from dori_lightning.mitigations.edits import (
    EVERYBODY,
    EmptyEdit,
    MaskEdit,
    Origin,
    PairMaskEdit,
    WeightEdit,
)
from dori_lightning.types import InputError

NEMO, WANDA = Origin("f" * 8, mitigation="nemo"), Origin("f" * 8, mitigation="wanda")


def mask(text: str) -> torch.Tensor:
    """A mask of whole rows, 1 where pruned."""
    return torch.tensor([letter == "1" for letter in text])


def test_iou_by_hand():
    assert iou(mask("1100"), mask("0110")) == pytest.approx(1 / 3)
    assert iou(mask("1100"), mask("1100")) == 1
    assert iou(mask("1100"), mask("0011")) == 0
    assert iou(mask("1100"), mask("0000")) == 0
    assert iou(mask("0000"), mask("0000")) == 1


def test_masks_of_different_shape_are_not_compared():
    with pytest.raises(InputError, match=r"\(4,\) and \(4, 2\)"):
        iou(mask("1100"), torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(InputError, match=r"a\.weight"):
        agreement_of("a.weight", [mask("11"), mask("111")])
    with pytest.raises(TypeError, match="boolean"):
        iou(mask("1100"), torch.zeros(4))


def test_agreement_by_hand():
    found = agreement_of("a", [mask("1100"), mask("0110"), mask("0000"), mask("0000")])
    assert found.sizes == (2, 2, 0, 0)
    assert found.shape == (4,)
    third = 1 / 3
    wanted = [[1, third, 0, 0], [third, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert torch.allclose(found.iou, torch.tensor(wanted, dtype=torch.float64))
    assert found.compared == 6
    assert found.both_empty == 1
    assert found.mean == pytest.approx((third + 1) / 6)
    assert found.mean_nonempty == pytest.approx(third / 5)


def test_nothing_chosen_agrees_fully_and_is_counted():
    found = agreement_of("a", [mask("000")] * 3)
    assert (found.mean, found.both_empty, found.compared) == (1.0, 3, 3)
    assert math.isnan(found.mean_nonempty)


def test_one_mask_has_nothing_to_agree_with():
    found = agreement_of("a", [mask("010")])
    assert math.isnan(found.mean)
    assert (found.compared, found.both_empty, found.sizes) == (0, 0, (1,))
    with pytest.raises(InputError, match="no mask of a"):
        agreement_of("a", [])
    with pytest.raises(InputError, match="no masks"):
        agreement([])


def test_many_masks_agree_as_two_at_a_time(monkeypatch):
    # several parts, the last one shorter
    monkeypatch.setattr(module, "COLUMNS", 64)
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(20, 15, generator=generator) < 0.1 for _ in range(9)]
    found = agreement_of("a", masks)
    values = []
    for i in range(9):
        assert found.sizes[i] == int(masks[i].sum())
        for j in range(9):
            assert float(found.iou[i, j]) == pytest.approx(iou(masks[i], masks[j]))
            values += [iou(masks[i], masks[j])] if i < j else []
    assert found.mean == pytest.approx(sum(values) / 36)


def test_layers_are_compared_each_by_itself_and_a_missing_one_is_empty():
    found = agreement(
        [
            {"a": mask("11"), "b": mask("100")},
            {"a": mask("10")},
            {"b": mask("001"), "a": mask("10")},
        ]
    )
    assert list(found) == ["a", "b"]
    assert found["a"].mean == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert found["b"].sizes == (1, 0, 1)
    assert found["b"].mean == 0


def test_selected_of_edits():
    own = {"p": {"a": mask("10")}, "q": {}}
    assert selected(PairMaskEdit(NEMO, own)) == own
    shared = selected(MaskEdit(NEMO, {"a": mask("10")}))
    assert list(shared) == [EVERYBODY]
    for edit in (EmptyEdit(), WeightEdit(NEMO, {"a": torch.zeros(2)})):
        with pytest.raises(InputError, match="chooses no weights"):
            selected(edit)


def test_overlap_of_edits_that_differ_by_pair():
    first = PairMaskEdit(
        NEMO, {"p": {"a": mask("1100")}, "q": {"a": mask("0000")}, "r": {"a": mask("1111")}}
    )
    second = PairMaskEdit(
        WANDA, {"q": {"a": mask("0000")}, "p": {"a": mask("0110"), "b": mask("1")}}
    )
    found = overlap(first, second)
    assert found.pairs == ("p", "q")
    (layer,) = found.layers
    assert (layer.parameter, layer.first, layer.second, layer.shared) == ("a", 1, 1, 0.5)
    assert layer.iou == pytest.approx((1 / 3 + 1) / 2)
    assert layer.both_empty == 1
    assert (found.only_first, found.only_second) == ((), ("b",))


def test_overlap_with_an_edit_for_everybody():
    own = PairMaskEdit(NEMO, {"p": {"a": mask("1100")}, "q": {"a": mask("0011")}})
    everybody = MaskEdit(WANDA, {"a": mask("1000")})
    for first, second in ((own, everybody), (everybody, own)):
        found = overlap(first, second)
        assert found.pairs == ("p", "q")
        assert found.layers[0].iou == pytest.approx(0.25)
        assert found.layers[0].shared == 0.5
    both = overlap(everybody, everybody)
    assert both.pairs == (EVERYBODY,)
    assert both.layers[0].iou == 1


def test_overlap_refuses_what_cannot_be_compared():
    rows = MaskEdit(NEMO, {"a": mask("1100")})
    with pytest.raises(InputError, match="whole rows"):
        overlap(rows, MaskEdit(WANDA, {"a": torch.ones(4, 2, dtype=torch.bool)}))
    with pytest.raises(InputError, match="nemo and wanda have no weight in common"):
        overlap(rows, MaskEdit(WANDA, {"b": mask("1100")}))
    with pytest.raises(InputError, match="no pair in common"):
        overlap(PairMaskEdit(NEMO, {"p": {}}), PairMaskEdit(WANDA, {"q": {}}))
