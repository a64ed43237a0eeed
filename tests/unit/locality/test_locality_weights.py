import math
from pathlib import Path

import pytest
import torch

from dori_lightning.locality.embeddings import Group
from dori_lightning.locality.layers import Selections, SelectionStore, block_of, weight_findings
from support.locality import pair, rows

VALUE = "down_blocks.0.attentions.{}.transformer_blocks.0.attn2.to_v.weight"
FORWARD = "down_blocks.0.attentions.{}.transformer_blocks.0.ff.net.2.weight"


def group(labels: str) -> Group:
    return Group(
        "triggers", tuple(labels), tuple(pair(name) for name in labels), rows(len(labels), 0)
    )


def masks(*chosen: tuple[int, ...], units: int = 10) -> list[torch.Tensor]:
    found = torch.zeros(len(chosen), units, dtype=torch.bool)
    for row, places in enumerate(chosen):
        found[row, list(places)] = True
    return list(found)


def selections(parameters: dict[str, list[torch.Tensor]], memorized: object = None) -> Selections:
    count = len(next(iter(parameters.values())))
    return Selections(
        tuple(parameters),
        lambda name: parameters[name],
        (memorized,) * count,  # type: ignore[arg-type]
    )


def test_agreement_is_within_images_and_chance_goes_by_size() -> None:
    chosen = masks((0, 1), (0, 1), (5, 6), (5, 7))
    found = weight_findings(
        {"nemo": selections({VALUE.format(0): chosen}, memorized=True)},
        [group("aabb")],
        settings={},
    )
    (row,) = found.layers
    assert row.iou.value == pytest.approx((1.0 + 1 / 3) / 2)
    assert row.iou_between.value == 0.0
    shared = 2 * 2 / 10
    assert row.chance == pytest.approx(shared / (4 - shared))
    assert (row.compared, row.both_empty, row.size, row.units) == (2, 0, 2.0, 10)
    assert found.memorized == {"nemo": {"triggers": (4, 4)}}
    assert found.agreement == (), "one method alone cannot agree"


def test_empty_selections_agree_trivially_and_are_counted() -> None:
    chosen = masks((), (), (1,))
    found = weight_findings(
        {"wanda": selections({FORWARD.format(0): chosen})}, [group("aaa")], settings={}
    )
    (row,) = found.layers
    assert row.iou.value == pytest.approx(1 / 3)
    assert row.iou_nonempty == 0.0
    assert (row.compared, row.both_empty, row.smallest, row.largest) == (3, 1, 0, 1)
    assert found.memorized == {}, "Wanda does not ask"
    empty = weight_findings(
        {"wanda": selections({FORWARD.format(0): masks((), ())})}, [group("aa")], settings={}
    ).layers[0]
    assert empty.iou.value == 1.0
    assert empty.chance == 1.0
    assert math.isnan(empty.iou_nonempty)


def test_groups_follow_each_other() -> None:
    first, second = group("aa"), group("bb")
    found = weight_findings(
        {"nemo": selections({VALUE.format(0): masks((0,), (0,), (1,), (2,))}, memorized=False)},
        [first, second],
        settings={},
    )
    assert [row.iou.value for row in found.layers] == [1.0, 0.0]


def test_methods_are_compared_by_block_with_other_images_as_control() -> None:
    """Method and image decide the block: what both find for one image is in one place."""
    in_block = {0: (0, 1), 1: ()}
    nemo = {
        VALUE.format(k): masks(in_block[k], in_block[k], in_block[1 - k], in_block[1 - k])
        for k in (0, 1)
    }
    wanda = {
        FORWARD.format(k): masks(in_block[k], in_block[k], in_block[1 - k], in_block[1 - k])
        for k in (0, 1)
    }
    found = weight_findings(
        {"nemo": selections(nemo, memorized=True), "wanda": selections(wanda)},
        [group("aabb")],
        settings={},
    )
    (own,) = found.agreement
    assert own.blocks == tuple(block_of(VALUE.format(k)) for k in (0, 1))
    assert own.overlap.value == 1.0
    assert own.overlap_other.value == 0.0
    assert own.overlap_other_images
    assert own.shared_parameters == 0
    assert own.nemo == own.wanda == (0.5, 0.5)


def test_embeddings_without_a_selection_have_no_block() -> None:
    nemo = {VALUE.format(0): masks((), (0,))}
    wanda = {FORWARD.format(0): masks((0,), (0,))}
    (own,) = weight_findings(
        {"nemo": selections(nemo, memorized=True), "wanda": selections(wanda)},
        [group("ab")],
        settings={},
    ).agreement
    assert own.undefined == 1
    assert own.overlap.count == 1
    nothing = {VALUE.format(0): masks((), ())}
    (none,) = weight_findings(
        {"nemo": selections(nemo | nothing, memorized=True), "wanda": selections(wanda)},
        [group("ab")],
        settings={},
    ).agreement
    assert (none.undefined, none.nemo, none.overlap.count) == (2, (), 0)


def test_selections_come_back_bit_for_bit(tmp_path: Path) -> None:
    store = SelectionStore(tmp_path, "settings")
    chosen = {"b.weight": torch.rand(5, 7) > 0.5, "a.weight": torch.rand(13) > 0.5}
    embedding = rows(1, 0)[0]
    name = store.identity_of(embedding, "picture")
    store.write("one", name, chosen, memorized=True)
    assert store.holds("one", name)
    assert store.parameters("one") == ("b.weight", "a.weight")
    assert store.memorized("one") is True
    for parameter, mask in chosen.items():
        assert torch.equal(store.masks(["one", "one"], parameter)[1], mask)


def test_selections_of_something_else_are_not_taken(tmp_path: Path) -> None:
    store, embedding = SelectionStore(tmp_path, "settings"), rows(1, 0)[0]
    store.write("one", store.identity_of(embedding, "x"), {"a": torch.ones(3) > 0}, memorized=None)
    other = SelectionStore(tmp_path, "others")
    assert not store.holds("one", store.identity_of(embedding + 1, "x"))
    assert not store.holds("one", store.identity_of(embedding, "y"))
    assert not other.holds("one", other.identity_of(embedding, "x"))
    assert not store.holds("two", store.identity_of(embedding, "x"))
    store.path("one").write_bytes(store.path("one").read_bytes()[:40])
    assert not store.holds("one", store.identity_of(embedding, "x")), "damaged"
