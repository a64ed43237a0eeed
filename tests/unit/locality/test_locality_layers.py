"""Activations of layers and selections of weights, compared."""

import math

import numpy as np
import pytest
import torch

from dori_lightning.locality import layers as module
from dori_lightning.locality.embeddings import Group
from dori_lightning.locality.layers import (
    SELECTION,
    Method,
    Selection,
    WeightFindings,
    activation_findings,
    feed_forward_distances,
    value_distances,
    weight_findings,
)
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.runtime.cache import Cache, Tensors
from support.locality import pair, rows
from support.tiny import tiny_model

VALUE = "down_blocks.0.attentions.{}.transformer_blocks.0.attn2.to_v.weight"
FORWARD = "down_blocks.0.attentions.{}.transformer_blocks.0.ff.net.2.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def trace(model: StableDiffusion, embeddings: torch.Tensor) -> Tensors:
    return feed_forward_distances(
        model,
        model.layers("feed_forward.out", ("down", "mid")),
        embeddings,
        noise=generation_noise(0, model.latent_shape),
        timestep=torch.tensor(500),
    )


def test_value_layers_are_compared_without_a_pass(model):
    before, embeddings = model.unet_evaluations, rows(3, 0, shape=model.embedding_shape)
    layers = model.layers("cross_attention.value", ("down", "mid"))
    found = value_distances(layers, embeddings)
    assert len(found["distance"]) == len(layers)
    assert model.unet_evaluations == before
    layer = next(iter(layers.values()))
    with torch.no_grad():
        values = layer(embeddings).flatten(1)
    assert found["distance"][0, 0, 2] == pytest.approx(float((values[0] - values[2]).norm()))
    assert found["length"][0, 1] == pytest.approx(float(values[1].norm()))


def test_feed_forward_layers_see_the_embedding_and_nothing_else_that_changes(model):
    embeddings = rows(3, 1, shape=model.embedding_shape)
    distance = trace(model, torch.cat([embeddings, embeddings[:1]]))["distance"]
    assert len(distance) == len(model.layers("feed_forward.out", ("down", "mid")))
    assert distance[:, 0, 3].max() == pytest.approx(0, abs=1e-4), "one noise, one timestep"
    assert distance[:, 0, 1].min() > 1e-3
    assert not any(m._forward_pre_hooks for m in model.denoiser().modules())


def test_layers_beyond_memory_get_passes_of_their_own(model, monkeypatch):
    embeddings = rows(3, 2, shape=model.embedding_shape)
    whole = trace(model, embeddings)
    monkeypatch.setattr(module, "MEMORY", 1)
    monkeypatch.setattr(module, "ROWS", 2)
    assert torch.allclose(trace(model, embeddings)["distance"], whole["distance"], atol=1e-4)


def test_groups_are_averaged_by_themselves():
    values = rows(5, 3)
    flat = values.flatten(1).double()
    distance = torch.cdist(flat, flat)
    compared = {"distance": distance[None], "length": flat.norm(dim=1)[None]}
    groups = [
        Group("triggers", tuple(map(pair, "aab")), values[:3]),
        Group("control_prompts", tuple(map(pair, "cd")), values[3:]),
    ]
    found = activation_findings({"nemo": (["x"], compared)}, groups, timestep=5, noise_seed=0)
    first, second = found.layers
    assert first.distance.value == pytest.approx(float(distance[0, 1]))
    assert first.distance_between.value == pytest.approx(float(distance[:2, 2].mean()))
    assert second.distance.value == pytest.approx(float(distance[3, 4]))
    assert (first.count, second.count) == (3, 2)


def group(labels: str) -> Group:
    return Group("triggers", tuple(map(pair, labels)), rows(len(labels), 0))


def selections(
    chosen: dict[str, list[tuple[int, ...]]], memorized: bool | None = None, *, units: int = 10
) -> list[Selection]:
    """Selections of units 0 to ``units`` - 1, by parameter and embedding."""
    made = []
    for places in zip(*chosen.values(), strict=True):
        masks = {name: torch.zeros(units, dtype=torch.bool) for name in chosen}
        for mask, own in zip(masks.values(), places, strict=True):
            mask[list(own)] = True
        made.append(Selection.of(masks, memorized=memorized))
    return made


def findings(labels: str, **methods: list[Selection]) -> WeightFindings:
    chosen: dict[Method, list[Selection]] = methods  # type: ignore[assignment]
    return weight_findings(chosen, [group(labels)], settings={})


def test_agreement_is_within_images_and_chance_goes_by_size():
    nemo = selections({VALUE.format(0): [(0, 1), (0, 1), (5, 6), (5, 7)]}, memorized=True)
    found = findings("aabb", nemo=nemo)
    (row,) = found.layers
    assert row.iou.value == pytest.approx((1.0 + 1 / 3) / 2)
    assert row.iou_between.value == 0.0
    shared = 2 * 2 / 10
    assert row.chance == pytest.approx(shared / (4 - shared))
    assert (row.compared, row.both_empty, row.size, row.units) == (2, 0, 2.0, 10)
    assert found.memorized == {"nemo": {"triggers": (4, 4)}}
    assert found.agreement == (), "one method alone cannot agree"


def test_empty_selections_agree_trivially_and_are_counted():
    found = findings("aaa", wanda=selections({FORWARD.format(0): [(), (), (1,)]}))
    (row,) = found.layers
    assert row.iou.value == pytest.approx(1 / 3)
    assert row.iou_nonempty == 0.0
    assert (row.compared, row.both_empty, row.smallest, row.largest) == (3, 1, 0, 1)
    assert found.memorized == {}, "Wanda does not ask"
    empty = findings("aa", wanda=selections({FORWARD.format(0): [(), ()]})).layers[0]
    assert empty.iou.value == 1.0
    assert empty.chance == 1.0
    assert math.isnan(empty.iou_nonempty)


def test_many_selections_agree_as_two_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "BYTES", 7)  # several parts, the last one shorter
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(20, 15, generator=generator) < 0.1 for _ in range(9)]
    found = findings("a" * 9, wanda=[Selection.of({"x": m}, memorized=None) for m in masks])
    (row,) = found.layers
    by_two = [
        float((masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum())
        for i in range(9)
        for j in range(i)
    ]
    assert row.iou.value == pytest.approx(np.mean(by_two))
    assert row.size == pytest.approx(np.mean([int(mask.sum()) for mask in masks]))
    assert row.units == 300


def test_groups_follow_each_other():
    nemo = selections({VALUE.format(0): [(0,), (0,), (1,), (2,)]}, memorized=False)
    found = weight_findings({"nemo": nemo}, [group("aa"), group("bb")], settings={})
    assert [row.iou.value for row in found.layers] == [1.0, 0.0]


def test_methods_are_compared_by_block_with_other_images_as_control():
    """Method and image decide the block: what both find for one image is in one place."""
    in_block = {0: (0, 1), 1: ()}
    nemo, wanda = (
        {name.format(k): [in_block[k]] * 2 + [in_block[1 - k]] * 2 for k in (0, 1)}
        for name in (VALUE, FORWARD)
    )
    found = findings("aabb", nemo=selections(nemo, memorized=True), wanda=selections(wanda))
    (own,) = found.agreement
    assert (own.overlap.value, own.overlap_other.value, own.other_images) == (1.0, 0.0, True)


def test_embeddings_without_a_selection_have_no_block():
    wanda = selections({FORWARD.format(0): [(0,), (0,)]})
    nemo = selections({VALUE.format(0): [(), (0,)]}, memorized=True)
    (own,) = findings("ab", nemo=nemo, wanda=wanda).agreement
    assert (own.undefined, own.overlap.count) == (1, 1)
    nothing = selections({VALUE.format(0): [(), ()]}, memorized=True)
    (none,) = findings("ab", nemo=nothing, wanda=wanda).agreement
    assert (none.undefined, none.overlap.count) == (2, 0)


@pytest.mark.parametrize("memorized", [True, False, None])
def test_selections_come_back_bit_for_bit(tmp_path, memorized):
    masks = {"b.weight": torch.rand(5, 7) > 0.5, "a.weight": torch.rand(13) > 0.5}
    selection, cache = Selection.of(masks, memorized=memorized), Cache(tmp_path)
    cache.write("one", selection, {"embedding": "x"}, SELECTION)
    found = cache.read("one", {"embedding": "x"}, SELECTION)
    assert found is not None
    assert found.units == {"b.weight": 35, "a.weight": 13}
    assert list(found.units) == ["b.weight", "a.weight"], "layers keep their order"
    assert all(torch.equal(found.bits[name], selection.bits[name]) for name in masks)
    assert found.memorized is memorized
