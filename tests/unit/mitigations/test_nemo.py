from dataclasses import replace
from typing import Any

import pytest
import torch

from dori_lightning.mitigations.activations import ActivationStatistics, activation_statistics
from dori_lightning.mitigations.edits import MaskEdit, Origin, PairMaskEdit, read_edit
from dori_lightning.mitigations.nemo import NeMo, NeMoTextStream
from dori_lightning.mitigations.nemo_criteria import (
    BlockedModel,
    NoiseDifference,
    Question,
    Replication,
    fitting,
    noise_difference,
)
from dori_lightning.mitigations.nemo_search import Levels
from dori_lightning.models.protocol import Sampling
from dori_lightning.pairs.corpus import NoCorpus
from dori_lightning.types import InputError
from support.context import make_context
from support.families import load_family
from support.threads import threads
from support.tiny import tiny_model

#: Few levels, samples and prompts; a random model memorizes nothing, so it has to block anyway.
NOISE = NoiseDifference(threshold_prompts=4, threshold=0.98, when_not_memorized="block")
SMALL = NeMo(
    criterion=NOISE,
    samples=2,
    statistics_prompts=20,
    levels=Levels(start_z=2.0, z_step=0.5, start_k=1),
)


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """A random model whose noise depends on the text."""
    model = tiny_model(tmp_path_factory.mktemp("loud"))
    for layer in model.layers("cross_attention.value").values():
        layer.weight.data.mul_(30)
    model.denoiser().conv_out.weight.data.mul_(3)
    return model


@pytest.fixture(scope="module")
def context(loud, tmp_path_factory, pairs):
    return make_context(tmp_path_factory.mktemp("context"), loud, pairs)


@pytest.fixture(scope="module")
def edit(loud, context, pairs):
    """What the small settings find, made once."""
    found = SMALL.apply(loud, [pair for pair in pairs if pair.kind != "control"], context)
    assert isinstance(found, PairMaskEdit)
    return found


def blocked_model(model: Any, layers: Any) -> BlockedModel:
    widths = {name: layer.out_features for name, layer in layers.items()}
    return BlockedModel(model, widths, model.predict_noise)


def sets(edit: Any) -> dict[str, list[tuple[str, int]]]:
    return {
        pair: [(name, k) for name, mask in own.items() for k in mask.nonzero()[:, 0].tolist()]
        for pair, own in edit.masks.items()
    }


@pytest.mark.parametrize(
    "criterion",
    [
        replace(NOISE, threshold=0.99),
        pytest.param(Replication(limit=0.01), marks=pytest.mark.slow),
    ],
)
def test_pairs_that_share_batches_get_the_neurons_of_one_pair_at_a_time(
    loud, context, suspected, criterion
):
    settings = replace(SMALL, criterion=criterion, refine_group=4)
    many, alone = (settings.apply(loud, some, context) for some in (suspected, suspected[1:]))
    pair = suspected[1].id
    assert sets(alone)[pair] == sets(many)[pair]
    mine, theirs = (edit.origin.notes["pairs"][pair] for edit in (alone, many))
    assert mine == theirs


def test_blocking_a_row_is_what_its_edit_does(loud):
    layers = loud.layers("cross_attention.value", ("down", "mid"))
    generator = torch.Generator().manual_seed(2)
    neurons = sum(layer.weight.shape[0] for layer in layers.values())
    blocked = torch.rand(2, neurons, generator=generator) > 0.5
    noise = torch.randn((2, *loud.latent_shape), generator=generator)
    embeddings = loud.encode_prompts(["a red cat", "boat at night"])
    inputs = (noise, torch.tensor([500, 500]), embeddings)
    rows = [tuple(x[k : k + 1] for x in inputs) for k in range(2)]
    model = blocked_model(loud, layers)
    found = torch.cat(model.run([Question(str(k), rows[k], blocked[k]) for k in range(2)]))
    free = torch.cat(model.run([Question(str(k), rows[k]) for k in range(2)]))
    widths = list(model.widths.values())
    masks = [
        {f"{name}.weight": part for name, part in zip(layers, row.split(widths), strict=True)}
        for row in blocked
    ]
    with torch.no_grad():
        torch.testing.assert_close(free, loud.predict_noise(*inputs), rtol=0, atol=1e-4)
        for k in range(2):
            edit = MaskEdit(Origin(loud.fingerprint), masks[k])
            with edit.applied(loud):
                wanted = loud.predict_noise(*(x[k : k + 1] for x in inputs))
            torch.testing.assert_close(found[k : k + 1], wanted, rtol=0, atol=1e-4)
    assert (found - free).abs().max() > 1e-2


def test_answers_are_the_same_bits_in_any_company(loud):
    layers = loud.layers("cross_attention.value")
    generator = torch.Generator().manual_seed(4)
    neurons = sum(layer.weight.shape[0] for layer in layers.values())
    embeddings = loud.encode_prompts(["a red cat", "boat at night", "blue sea"])
    questions = [
        Question(
            str(k),
            (
                torch.randn((2, *loud.latent_shape), generator=generator),
                torch.tensor([300, 700]),
                embeddings[k].expand(2, -1, -1),
            ),
            torch.rand(neurons, generator=generator) > 0.5,
        )
        for k in range(3)
    ]
    model = blocked_model(loud, layers)
    together = model.run(questions)
    backwards = model.run(questions[::-1])[::-1]
    alone = [model.run([question])[0] for question in questions]
    with threads(2):
        parallel = model.run(questions * 6)
    for k in range(3):
        assert torch.equal(together[k], alone[k])
        assert torch.equal(together[k], backwards[k])
        assert all(torch.equal(together[k], parallel[n]) for n in range(k, 18, 3))


def test_similarities_do_not_depend_on_what_else_is_asked(loud, context):
    """The range of values is that of one question's samples, as if it were asked alone."""
    layers = loud.layers("cross_attention.value")
    generator = torch.Generator().manual_seed(6)
    neurons = sum(layer.weight.shape[0] for layer in layers.values())
    prompts = loud.encode_prompts(["a red cat", "boat at night"])
    pairs = dict(zip("ab", prompts, strict=True))
    model = blocked_model(loud, layers)
    probes, _ = NOISE.probes(model.run, loud, pairs=pairs, context=context, samples=2)
    questions = [
        Question(pair, probes[pair].inputs, torch.rand(neurons, generator=generator) > share)
        for pair, share in (("a", 0.2), ("a", 0.9), ("b", 0.5), ("b", 1.0))
    ]

    def answers(questions):
        outputs = model.run(questions)
        return [probes[q.pair].similarity(x) for q, x in zip(questions, outputs, strict=True)]

    together = answers(questions)
    assert together == [answers([question])[0] for question in questions]
    assert together == answers(questions[::-1])[::-1]
    assert len(set(together)) == 4
    assert together[-1] == pytest.approx(1, abs=1e-6)  # nothing is blocked


def test_the_edit_has_masks_for_each_pair_over_the_seven_layers_and_survives_its_file(
    loud, context, suspected, edit
):
    found = context.find(SMALL, loud, suspected)
    assert found.made
    assert isinstance(found.edit, PairMaskEdit)
    assert found.edit.identity == edit.identity  # the same neurons when made again
    assert set(found.edit.masks) == {pair.id for pair in suspected}
    seven = [f"{n}.weight" for n in loud.layers("cross_attention.value", ("down", "mid"))]
    parameters = dict(loud.denoiser().named_parameters())
    for own in found.edit.masks.values():
        assert list(own) == seven
        assert all(mask.shape == parameters[name].shape[:1] for name, mask in own.items())
    assert found.path is not None
    again = read_edit(found.path)
    assert again.identity == found.edit.identity
    notes = again.origin.notes
    assert notes["threshold"] == NOISE.threshold
    for pair, own in found.edit.masks.items():
        assert notes["pairs"][pair]["refined"] == sum(int(mask.sum()) for mask in own.values())
    assert again.origin.cost["unet_evaluations"] > sum(
        own["unet_evaluations"] for own in notes["pairs"].values()
    )


def test_a_similarity_noted_is_that_under_the_edit(loud, context, suspected, edit):
    assert loud.sampling_timesteps(replace(context.sampling, steps=50))[1] == 961
    latents = torch.randn((2, *loud.latent_shape), generator=torch.Generator().manual_seed(1))
    for pair in suspected:
        rows = context.data.encoded(pair).embedding.expand(2, -1, -1)
        inputs = (latents, torch.full((2,), 961), rows)
        with torch.no_grad():
            free = noise_difference(loud.predict_noise(*inputs), latents)
            with edit.applied(loud):
                noise = loud.predict_noise(*inputs, pair_ids=[pair.id] * 2)
        value = fitting(16)(free, noise_difference(noise, latents)).max()
        noted = edit.origin.notes["pairs"][pair.id]["similarity_refined"]
        assert float(value) == pytest.approx(noted, abs=1e-5)


def test_neurons_of_a_text_stream_are_found_by_the_clean_image_it_leads_to(tmp_path, pairs):
    model = load_family("sd3")
    context = make_context(tmp_path, model, pairs, sampling=Sampling("flow_euler", 2, 1.0))
    few = [pair for pair in pairs if pair.kind != "control"][:2]
    settings = NeMoTextStream(
        criterion=NOISE, samples=2, statistics_prompts=8, levels=SMALL.levels, refine=False
    )
    evaluations = model.unet_evaluations
    edit = settings.apply(model, few, context)
    asked = sum(own["unet_evaluations"] for own in edit.origin.notes["pairs"].values())
    planned = settings.estimate_cost(context.sampling, len(few)).work.forward
    assert planned + asked <= model.unet_evaluations - evaluations  # passes are filled up
    assert planned == 2 * 2 + 4 * (8 + 2)
    latents = torch.randn((2, *model.latent_shape), generator=torch.Generator().manual_seed(1))
    for pair in few:
        assert list(edit.masks[pair.id]) == [f"{n}.weight" for n in model.layers("text.value")]
        noted = edit.origin.notes["pairs"][pair.id]
        assert noted["refined"] == sum(int(m.sum()) for m in edit.masks[pair.id].values()) > 0
        rows = context.data.encoded(pair).embedding.expand(2, -1, -1)
        inputs = (latents, torch.full((2,), 979), rows)
        with torch.no_grad():
            free = model.predict_clean_and_noise(*inputs)[0]
            with edit.applied(model):
                clean = model.predict_clean_and_noise(*inputs, pair_ids=[pair.id] * 2)[0]
        # a difference from zero is the opposite
        maps = (noise_difference(torch.zeros_like(x), x) for x in (free, clean))
        value = float(fitting(16)(*maps).max())
        assert value == pytest.approx(noted["similarity_refined"], abs=1e-4)


def test_union_blocks_what_any_pair_needs(loud, context, suspected, edit):
    union = replace(SMALL, scope="union").apply(loud, suspected, context)
    assert isinstance(union, MaskEdit)
    for name, mask in union.masks.items():
        assert torch.equal(mask, torch.stack([own[name] for own in edit.masks.values()]).any(0))


def test_refinement_only_takes_away(loud, context, suspected, edit):
    whole = sets(replace(SMALL, refine=False).apply(loud, suspected, context))
    fewer = sets(edit)
    assert all(set(fewer[pair]) <= set(whole[pair]) for pair in whole)
    assert fewer != whole


def test_a_prompt_without_memorization_is_left_alone(loud, context, suspected):
    criterion = replace(NOISE, when_not_memorized="leave", threshold=0.999)
    settings = replace(SMALL, criterion=criterion)
    edit = settings.apply(loud, suspected, context)
    assert not any(sets(edit).values())
    assert all(not own["memorized"] for own in edit.origin.notes["pairs"].values())
    assert not any("tests" in own for own in edit.origin.notes["pairs"].values())


def test_the_threshold_is_calibrated_on_ordinary_prompts(loud, context, suspected):
    def calibrated(stds):
        criterion = replace(NOISE, threshold=None, threshold_stds=stds)
        levels = replace(SMALL.levels, z_step=2.0)
        settings = replace(SMALL, criterion=criterion, levels=levels, refine=False)
        value = settings.apply(loud, suspected[:1], context).origin.notes["threshold"]
        assert isinstance(value, float)
        return value

    latents = torch.randn((2, *loud.latent_shape), generator=torch.Generator().manual_seed(1))
    largest = []
    for row in context.prompts(loud, "calibration", 4):
        with torch.no_grad():
            noise = loud.predict_noise(latents, torch.full((2,), 961), row.expand(2, -1, -1))
        maps = noise_difference(noise, latents)
        largest.append(fitting(16)(maps[:1], maps[1:]).max())
    values = torch.stack(largest)
    assert calibrated(0.0) == pytest.approx(float(values.mean()), abs=1e-5)
    assert calibrated(2.0) == pytest.approx(float(values.mean() + 2 * values.std()), abs=1e-5)


def test_stored_statistics_are_used_and_those_of_another_checkpoint_refused(
    loud, context, suspected, edit, tmp_path
):
    prompts = context.corpus.prompts("calibration", SMALL.statistics_prompts)
    statistics = activation_statistics(loud, prompts)
    path = statistics.save(tmp_path / "statistics.safetensors")
    silent = replace(context, corpus=NoCorpus())
    stored = replace(SMALL, statistics=str(path)).apply(loud, suspected, silent)
    assert sets(stored) == sets(edit)
    replace(statistics, fingerprint="another").save(path)
    with pytest.raises(InputError, match="fingerprint another"):
        replace(SMALL, statistics=str(path)).apply(loud, suspected, context)


def test_levels_hold_outliers_by_number_and_then_the_most_active():
    statistics = ActivationStatistics(
        {"a": torch.zeros(4), "b": torch.zeros(3)}, {"a": torch.ones(4), "b": torch.ones(3)}, 9, ""
    )
    active = {"a": torch.tensor([2.5, 0.1, 5.0, 3.1]), "b": torch.tensor([0.3, 0.3, 0.2])}
    levels = Levels(3.0, 1.0, 1.0, 0, 2).of(active, statistics)
    assert [(level.z, level.k) for level in levels] == [(3.0, 0), (2.0, 2)]
    assert levels[0].layers == ((2, 3), ())
    assert levels[1].layers == ((0, 2, 3), (4, 5))
    assert levels[1].blocked.tolist() == [True, False, True, True, True, True, False]


def test_the_published_levels_end_at_a_quarter_above_one():
    steps = Levels().steps(1280)
    assert len(steps) == 16
    assert (steps[0], steps[-1]) == ((5.0, 0), (1.25, 15))
    assert Levels().steps(6)[-1] == (3.75, 5)
