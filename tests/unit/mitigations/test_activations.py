import copy
from dataclasses import replace

import pytest
import torch

from dori_lightning.mitigations.activations import (
    PROMPTS_AT_ONCE,
    ActivationStatistics,
    activation_statistics,
    activations,
    kept_statistics,
    layer_influence,
    value_activations,
)
from dori_lightning.models.protocol import Sampling
from dori_lightning.runtime.cache import Cache
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError
from support.context import FakeCorpus
from support.families import load_family
from support.tiny import tiny_model
from support.unchanged import unchanged

PROMPTS = FakeCorpus().prompts("calibration", 2 * PROMPTS_AT_ONCE + 7)
SAMPLING = Sampling("ddim", 2, 2.0)


@pytest.fixture(scope="module")
def statistics(model):
    return activation_statistics(model, PROMPTS)


def made_up(mean: list[float], std: list[float]) -> ActivationStatistics:
    return ActivationStatistics({"l": torch.tensor(mean)}, {"l": torch.tensor(std)}, 9, "f")


def test_statistics_are_those_of_all_prompts_at_once(model, statistics):
    embeddings = model.encode_prompts(PROMPTS)
    layers = model.layers("cross_attention.value")
    assert list(statistics.means) == list(layers)
    assert len(layers) == 16
    for name, layer in layers.items():
        values = (embeddings @ layer.weight.detach().T).abs().mean(1).double()
        mean, std = statistics.means[name].double(), statistics.stds[name].double()
        torch.testing.assert_close(mean, values.mean(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(std, values.std(0), rtol=1e-4, atol=0)
    assert statistics.prompts == len(PROMPTS)


def test_the_denoiser_does_not_run_and_nothing_changes(model):
    evaluations = model.unet_evaluations
    with unchanged(model):
        activation_statistics(model, PROMPTS[:5])
    assert model.unet_evaluations == evaluations


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_text_stream_is_heard_in_passes_of_its_own(family):
    """By its definition: mean over tokens and four noises of what value layers give."""
    model = load_family(family)
    layers = model.layers("text.value")
    noise = torch.randn(
        (4, *model.latent_shape), generator=keyed_generator("activations of the text stream")
    )
    embeddings, evaluations = model.encode_prompts(PROMPTS[:3]), model.unet_evaluations
    with unchanged(model):
        found = value_activations(model, layers, embeddings)
    assert model.unet_evaluations - evaluations == 4 * len(embeddings)
    heard: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        hook = layer.register_forward_hook(lambda _, __, out, name=name: heard.update({name: out}))
        with torch.no_grad(), hook:
            # 49 fiftieths down the schedule, where NeMo's second of 50 steps lies
            model.predict_noise(noise, torch.full((4,), 979), embeddings[1].expand(4, -1, -1))
    alone = value_activations(model, layers, embeddings[1:2])
    for name, value in heard.items():
        torch.testing.assert_close(found[name][1], value.abs().mean((0, 1)), rtol=1e-5, atol=1e-7)
        assert torch.equal(found[name][1], alone[name][0])
        assert (found[name][0] != found[name][1]).any()
    statistics = activation_statistics(model, PROMPTS[:3])
    torch.testing.assert_close(statistics.means[name], found[name].mean(0), rtol=1e-5, atol=1e-7)


def test_half_precision_weights_are_computed_with_in_full(model):
    layer = next(iter(model.layers("cross_attention.value").values()))
    embeddings = model.encode_prompts(PROMPTS[:3])
    half = copy.deepcopy(layer).half()
    assert torch.equal(activations(half, embeddings), activations(half.float(), embeddings))


def test_scores_count_standard_deviations_on_both_sides():
    statistics = made_up([1.0, 1.0, 1.0], [0.5, 0.5, 2.0])
    value = torch.tensor([2.0, 0.0, 0.0])
    assert statistics.z_scores("l", value).tolist() == [2.0, 2.0, 0.5]


def test_a_neuron_without_spread_scores_zero_at_its_mean_and_infinity_elsewhere():
    statistics = made_up([0.0, 0.0, 3.0], [0.0, 0.0, 0.0])
    assert statistics.z_scores("l", torch.tensor([0.0, 1e-6, 2.0])).tolist() == [
        0.0, float("inf"), float("inf"),
    ]  # fmt: skip


def test_a_constant_neuron_has_exactly_no_spread(tmp_path):
    model = tiny_model(tmp_path)
    name, layer = next(iter(model.layers("cross_attention.value").items()))
    layer.weight.data[3] = 0
    statistics = activation_statistics(model, PROMPTS)
    assert (float(statistics.means[name][3]), float(statistics.stds[name][3])) == (0, 0)
    own = activations(layer, model.encode_prompts(["a red cat"]))[0]
    assert float(statistics.z_scores(name, own)[3]) == 0


def test_files_give_back_what_was_written(model, statistics, tmp_path):
    found = ActivationStatistics.load(statistics.save(tmp_path / "s.safetensors"), model)
    assert found.identity == statistics.identity
    assert (found.prompts, found.fingerprint) == (statistics.prompts, model.fingerprint)
    for name in statistics.means:
        assert torch.equal(found.means[name], statistics.means[name])
        assert torch.equal(found.stds[name], statistics.stds[name])


def test_files_of_another_checkpoint_or_damaged_ones_are_refused(model, statistics, tmp_path):
    path = tmp_path / "s.safetensors"
    replace(statistics, fingerprint="another").save(path)
    with pytest.raises(InputError, match=f"fingerprint another.*{model.fingerprint}"):
        ActivationStatistics.load(path, model)
    data = bytearray(statistics.save(path).read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="or is damaged: its content does not fit"):
        ActivationStatistics.load(path, model)
    path.write_bytes(b"none")
    with pytest.raises(InputError, match="holds no activation statistics"):
        ActivationStatistics.load(path, model)
    with pytest.raises(InputError, match="No such file"):
        ActivationStatistics.load(tmp_path / "nowhere", model)


def test_one_prompt_has_no_spread(model):
    with pytest.raises(InputError, match="at least 2 prompts, got 1"):
        activation_statistics(model, PROMPTS[:1])


def test_layer_influence_is_that_of_the_empty_prompt_in_one_layer(tmp_path):
    model = tiny_model(tmp_path)
    layers = model.layers("cross_attention.value")
    deaf, *_, only = layers
    for name, layer in model.layers("cross_attention.key").items():
        layer.weight.data.zero_()  # keys carry nothing, so that values carry everything
        if name.removesuffix("to_k") == only.removesuffix("to_v"):
            continue
        layers[name.removesuffix("to_k") + "to_v"].weight.data.zero_()
    layers[only].weight.data.mul_(50)
    found = layer_influence(model, PROMPTS[:3], sampling=SAMPLING)
    assert list(found) == list(layers)
    assert found[deaf].change == found[deaf].share == 0
    assert found[only].change > 1e-4
    assert found[only].share == pytest.approx(1, abs=1e-4)
    assert not any(layer._forward_hooks for layer in layers.values())


def test_layer_influence_of_a_text_stream_is_that_of_the_empty_prompts_passes():
    """Where the text of a block reaches nothing but values, the last block's can do the least."""
    model = load_family("sd3")
    found = layer_influence(
        model, PROMPTS[:2], sampling=Sampling(model.samplers[0], 2, 2.0), timestep=700
    )
    assert list(found) == list(model.layers("text.value"))
    assert all(own.change > 0 and own.share > 0 for own in found.values())
    empty = layer_influence(
        model, ["", ""], sampling=Sampling(model.samplers[0], 2, 2.0), timestep=700
    )
    assert not any(own.change for own in empty.values())


def test_layer_influence_wants_a_timestep_of_the_schedule(model):
    with pytest.raises(InputError, match=r"task.timestep must be in 0..999, got 1000"):
        layer_influence(model, PROMPTS[:1], sampling=SAMPLING, timestep=1000)


def test_statistics_are_computed_once_for_a_sweep(model, tmp_path, caplog):
    cache = Cache(tmp_path)
    first = kept_statistics(model, PROMPTS[:5], cache)
    encoded = model.coder_rows.prompts
    assert kept_statistics(model, PROMPTS[:5], cache).identity == first.identity
    assert model.coder_rows.prompts == encoded
    kept_statistics(model, PROMPTS[:4], cache)
    (file,) = (path for path in tmp_path.iterdir() if path.read_bytes().find(b'"5"') > 0)
    file.write_bytes(file.read_bytes()[:-8])
    assert kept_statistics(model, PROMPTS[:5], cache).identity == first.identity
    assert model.coder_rows.prompts == encoded + 4 + 5
    assert "damaged" in caplog.text
