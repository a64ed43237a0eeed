from dataclasses import replace

import pytest
import torch

from dori_lightning.mitigations.edits import (
    EmptyEdit,
    LayeredEdit,
    MaskEdit,
    Origin,
    PairMaskEdit,
    WeightEdit,
)
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.mitigations.image_finetuning import ImageFinetuning, forget, train_over
from support.edits import value_masks
from support.unchanged import unchanged

FAST = FinetuneSettings(lr=3e-3, weight_decay=0.0)


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.denoiser().named_parameters()}


def drawn(model, pairs, context, method, monkeypatch) -> list[tuple[list[str], torch.Tensor]]:
    """Whose rows each step of a training has, and their noise."""
    seen, loss = [], model.denoising_loss

    def denoising_loss(latents, noise, timesteps, embeddings, *, pair_ids=None):
        seen.append((pair_ids, noise.clone()))
        return loss(latents, noise, timesteps, embeddings, pair_ids=pair_ids)

    with monkeypatch.context() as patch:
        patch.setattr(model, "denoising_loss", denoising_loss)
        method.apply(model, pairs, context)
    return seen


def test_trained_weights_lie_over_the_edit_that_was_carried(model, pairs, context) -> None:
    below = value_masks(model, 0)
    method = ImageFinetuning(rows=2, steps=1, finetune=FAST)
    with unchanged(model):
        made = train_over(below, method, model, pairs[:1], context)
    assert isinstance(made.edit, LayeredEdit)
    (masked,) = below.masks
    top = made.edit.top.weights
    with unchanged(model), made.edit.applied(model):
        assert all(value.equal(weights_of(model)[name]) for name, value in top.items())
        # zeros are trained like all other weights
        assert weights_of(model)[masked][0].count_nonzero()
    assert made.edit.identity not in (below.identity, made.edit.top.identity)
    again = train_over(below, method, model, pairs[:1], context)
    assert (again.made, again.edit.identity) == (False, made.edit.identity)
    other = train_over(EmptyEdit(), method, model, pairs[:1], context)
    assert other.key != made.key


def test_further_training_is_one_layer_more_and_its_file_can_go(model, pairs, context) -> None:
    method, carried, made = ImageFinetuning(rows=2, steps=1, finetune=FAST), EmptyEdit(), []
    for _ in range(2):
        made.append(train_over(carried, method, model, pairs[:1], context))
        carried = made[-1].edit
    first, second = (one.edit for one in made)
    assert isinstance(second.base, EmptyEdit)
    with first.applied(model):
        before = weights_of(model)
    with second.applied(model):
        after = weights_of(model)
    kept = WeightEdit(second.origin, {**first.top.weights, **second.top.weights})
    assert kept.identity == second.top.identity
    assert any(not after[name].equal(before[name]) for name in before)
    context.discard(made[0])
    assert [one.path.is_file() for one in made] == [False, True]


def test_images_take_turns(model, pairs, context, monkeypatch) -> None:
    method = ImageFinetuning(rows=2, steps=3, finetune=FAST)
    names = [pair.id for pair in pairs[:3]]
    seen = drawn(model, pairs[:3], context, method, monkeypatch)
    assert [ids for ids, _ in seen] == [names[:2], [names[2], names[0]], names[1:3]]


def test_a_longer_training_goes_on_from_a_shorter_ones_end(
    model, pairs, context, context_of, tmp_path, monkeypatch
) -> None:
    def weights(method, carried=context):
        return train_over(EmptyEdit(), method, model, pairs[:1], carried).edit.top.weights

    short = ImageFinetuning(rows=2, steps=2, until=3, finetune=FAST)
    whole = replace(short, steps=3)
    alone = weights(whole, context_of(tmp_path / "alone"))
    weights(short)
    with monkeypatch.context() as patch:
        steps, loss = [], model.denoising_loss
        patch.setattr(model, "denoising_loss", lambda *a, **k: (steps.append(1), loss(*a, **k))[1])
        both = weights(whole)
    assert len(steps) == 1
    assert both.keys() == alone.keys()
    assert all(both[name].equal(value) for name, value in alone.items())
    assert not [*context.scratch("").glob("*")]


def test_where_only_a_longer_training_is_known_a_shorter_one_begins_anew(
    model, pairs, context
) -> None:
    methods = [ImageFinetuning(rows=2, steps=steps, until=9, finetune=FAST) for steps in (1, 2)]
    made = [train_over(EmptyEdit(), one, model, pairs[:1], context) for one in methods]
    context.discard(made[0])
    again = train_over(EmptyEdit(), methods[0], model, pairs[:1], context)
    assert again.made
    assert again.edit.identity == made[0].edit.identity
    forget([again, made[1]], EmptyEdit(), methods[0], model, pairs[:1], context)
    assert not [*context.folder.glob("*.safetensors"), *context.scratch("").glob("*")]


def test_each_row_is_trained_under_its_own_pairs_masks(model, pairs, context) -> None:
    masks = {pair.id: value_masks(model, k).masks for k, pair in enumerate(pairs[:2])}
    per_pair = PairMaskEdit(Origin(model.fingerprint), masks)
    method = ImageFinetuning(rows=4, steps=1, finetune=FAST)
    edit = train_over(per_pair, method, model, pairs[:2], context).edit
    assert edit.pairs == per_pair.pairs
    own = edit.for_pair(pairs[0].id)
    assert isinstance(own.base, MaskEdit)
    assert own.top is edit.top
    (name,) = per_pair.changed(model)
    assert edit.changed(model)[name] > per_pair.changed(model)[name]


@pytest.mark.parametrize("count", [1, 3])
def test_layers_of_filters_change_no_countable_weights(model, count) -> None:
    class Filter(EmptyEdit):
        def changed(self, model):
            return None

    parameters = list(weights_of(model).items())[:count]
    top = WeightEdit(Origin(model.fingerprint), {n: value + 1 for n, value in parameters})
    assert LayeredEdit.over(Filter(), top).changed(model) is None
    changed = LayeredEdit.over(EmptyEdit(), top).changed(model)
    assert changed == {name: value.numel() for name, value in parameters}
