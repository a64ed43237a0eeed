from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from dori_lightning.mitigations.edits import MaskEdit, PairMaskEdit
from dori_lightning.mitigations.wanda import Wanda, _squares, input_norms, select, select_over_time
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import InputError, Pair
from support.context import make_context
from support.unchanged import unchanged


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


def test_a_weight_is_pruned_where_any_step_chooses_it():
    norms = torch.tensor([[4.0, 1, 1, 1], [4, 1, 1, 1], [1, 4, 1, 1], [1, 1, 1, 4]])
    found = select_over_time(torch.ones(1, 4), norms, torch.zeros(4, 4), 0.25)
    assert found.tolist() == [[True, True, False, True]]


THINGS = ("boat", "house", "sea", "night", "photo")
SAMPLING = Sampling("ddim", 2, 2.0, 2)  # that of contexts


def test_norms_are_those_of_inputs_whose_tokens_have_length_one(model):
    """The first step done by hand: the layer's inputs, both guidance halves."""
    rows = model.encode_prompts(["a red boat", "a blue house at night"])
    norms = input_norms(model, rows, SAMPLING, steps=2)
    seen: dict[str, torch.Tensor] = {}
    spies = [
        layer.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0])
        )
        for name, layer in model.layers("feed_forward.out").items()
    ]
    noise = generation_noise(0, model.latent_shape).expand(2, -1, -1, -1)
    context = torch.cat([model.empty_embedding().expand_as(rows), rows])
    first = model.sampling_timesteps(SAMPLING)[0].expand(4)
    with torch.no_grad():
        model.predict_noise(torch.cat([noise, noise]), first, context)
    for spy in spies:
        spy.remove()
    assert list(norms) == list(model.layers("feed_forward.out")) == list(seen)
    for name, x in seen.items():
        assert norms[name].shape == (2, 2, x.shape[-1])
        unit = x / x.norm(dim=-1, keepdim=True)
        for k in range(2):
            wanted = torch.cat([unit[k], unit[k + 2]]).norm(dim=0)
            assert torch.allclose(norms[name][k, 0], wanted, rtol=1e-4, atol=1e-5)
        # every token counts once: squares add up to their number
        total = norms[name][:, 0].square().sum(1)
        assert torch.allclose(total, torch.full((2,), 2.0 * x.shape[1]), rtol=1e-4)


def test_only_the_first_steps_are_run(model):
    rows = model.encode_prompts(["a red boat"])
    before = model.unet_evaluations
    short = input_norms(model, rows, SAMPLING, steps=1)
    # a pass on the CPU has 8 embeddings, two guidance halves each
    assert model.unet_evaluations - before == 16
    long = input_norms(model, rows, SAMPLING, steps=2)
    assert model.unet_evaluations - before == 16 + 2 * 16
    assert all(torch.equal(short[name], long[name][:, :1]) for name in long)
    unguided = replace(SAMPLING, guidance=1.0)
    before = model.unet_evaluations
    input_norms(model, rows, unguided, steps=1)
    assert model.unet_evaluations - before == 8


def test_an_error_on_the_way_leaves_no_hooks(model):
    def fail(*_):
        raise OSError("broken")

    breaking = list(model.layers("feed_forward.out").values())[1].register_forward_hook(fail)
    try:
        with unchanged(model), pytest.raises(OSError, match="broken"):
            input_norms(model, model.encode_prompts(["a cat"]), SAMPLING, steps=1)
    finally:
        breaking.remove()


def test_norms_do_not_depend_on_company_beyond_one_pass(model):
    prompts = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in THINGS]
    rows = model.encode_prompts(prompts)
    many = input_norms(model, rows, SAMPLING, steps=2)
    assert len(rows) > 8
    last = input_norms(model, rows[-1:], SAMPLING, steps=2)
    assert all(torch.equal(many[name][-1:], last[name]) for name in last)


def test_zero_tokens_do_not_break_the_norms():
    """Rows of zeros stay zeros rather than becoming not a number."""
    x = torch.zeros(2, 3, 4)
    x[0, 1] = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert torch.allclose(_squares(x, 1), torch.tensor([[0.36, 0.64, 0.0, 0.0]]))
    assert torch.equal(_squares(F.pad(x, (0, 0, 0, 2)), 1), _squares(x, 1))


WANDA = Wanda(fraction=0.1, steps=1)
TWO_STEPS = replace(WANDA, steps=2)


@pytest.fixture
def three(pairs):
    """Three pairs to forget: two suspected ones and one that plays along."""
    return pairs[:3]


@pytest.fixture(scope="module")
def edit(model, pairs, tmp_path_factory):
    """What is found for these three: other tests show that company changes no mask."""
    context = make_context(tmp_path_factory.mktemp("edit"), model, pairs)
    return WANDA.apply(model, pairs[:3], context)


def masks_of(edit: object, pair: Pair) -> dict[str, torch.Tensor]:
    assert isinstance(edit, PairMaskEdit)
    return dict(edit.masks[pair.id])


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    # a file does not keep the order
    assert sorted(first) == sorted(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_masks_cover_every_feed_forward_layer_and_stay_within_the_fraction(model, edit):
    parameters = dict(model.denoiser().named_parameters())
    for own in edit.masks.values():
        assert list(own) == [f"{name}.weight" for name in model.layers("feed_forward.out")]
        assert any(mask.any() for mask in own.values())
        for name, mask in own.items():
            assert mask.shape == parameters[name].shape
            assert mask.dtype == torch.bool
            assert int(mask.sum(1).max()) <= int(0.1 * mask.shape[1])


def test_the_seed_decides_and_given_embeddings_do_what_their_prompts_do(
    model, context, three, edit
):
    assert replace(WANDA, seed=1).apply(model, three, context).identity != edit.identity
    embeddings = model.encode_prompts([pair.prompt for pair in three])
    for pair, own in zip(three, WANDA.find(model, embeddings, context), strict=True):
        assert_same(masks_of(edit, pair), own)


def test_a_pairs_mask_does_not_depend_on_its_company(model, context, three):
    together = TWO_STEPS.apply(model, three, context)
    backwards = TWO_STEPS.apply(model, three[::-1], context)
    for pair in three:
        assert_same(masks_of(together, pair), masks_of(backwards, pair))
    for pair in three[1:]:
        alone = TWO_STEPS.apply(model, [pair], context)
        assert_same(masks_of(together, pair), masks_of(alone, pair))
    assert not torch.equal(*(next(iter(masks_of(together, p).values())) for p in three[:2]))


def test_union_is_what_any_pair_has(model, context, three, edit):
    union = replace(WANDA, scope="union").apply(model, three, context)
    assert isinstance(union, MaskEdit)
    for name, mask in union.masks.items():
        parts = [masks_of(edit, pair)[name] for pair in three]
        assert torch.equal(mask, parts[0] | parts[1] | parts[2])


def test_a_target_that_is_the_base_has_an_empty_mask_and_a_note(model, context, pairs):
    blank = replace(pairs[0], id="blank", prompt="")
    edit = WANDA.apply(model, [pairs[0], blank], context)
    assert not any(mask.any() for mask in masks_of(edit, blank).values())
    assert edit.origin.notes["pairs_without_mask"] == ["blank"]


def test_notes_tell_the_share_that_is_pruned(model, three, edit):
    notes = edit.origin.notes
    assert edit.origin.fingerprint == model.fingerprint
    own = [torch.cat([m.flatten() for m in masks_of(edit, pair).values()]) for pair in three]
    assert notes["share_pruned"] == pytest.approx(float(torch.stack(own).float().mean()))
    second = notes["share_pruned_by_pair"][three[1].id]
    assert second == pytest.approx(float(own[1].float().mean()))
    for name, share in notes["share_pruned_by_layer"].items():
        layer = [masks_of(edit, pair)[name].float().mean() for pair in three]
        assert share == pytest.approx(float(sum(layer)) / len(layer))


def test_stages_restrict_the_layers(model, context, suspected):
    wanda = replace(WANDA, stages=["down", "mid"])
    assert wanda.stages == ("down", "mid")
    own = masks_of(wanda.apply(model, suspected, context), suspected[0])
    assert {name.split("_")[0] for name in own} == {"down", "mid"}


def test_the_runs_sampler_has_the_steps(model, context_of, tmp_path, suspected):
    short = context_of(tmp_path, sampling=Sampling("ddim", 1, 2.0))
    with pytest.raises(InputError, match="takes 1\n"):
        TWO_STEPS.apply(model, suspected, short)
    found = context_of(tmp_path).find(TWO_STEPS, model, suspected).edit
    # 2 pairs and the base in one filled pass of 8, two halves, two steps
    assert found.origin.cost["unet_evaluations"] == 8 * 2 * 2


def test_a_share_below_one_weight_is_refused(model, context, suspected):
    before = model.unet_evaluations
    with pytest.raises(InputError, match="less than one weight"):
        replace(WANDA, fraction=0.001).apply(model, suspected, context)
    assert model.unet_evaluations == before
