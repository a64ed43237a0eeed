from pathlib import Path

import pytest
import torch

from dori_lightning.locality import layers as module
from dori_lightning.locality.embeddings import Group
from dori_lightning.locality.layers import (
    activation_findings,
    feed_forward_distances,
    value_distances,
)
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.stable_diffusion import StableDiffusion
from support.locality import pair, rows
from support.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    return tiny_model(tmp_path_factory.mktemp("model"))


def trace(model: StableDiffusion, embeddings: torch.Tensor) -> dict[str, module.Compared]:
    return feed_forward_distances(
        model,
        embeddings,
        ("down", "mid"),
        noise=generation_noise(0, model.latent_shape),
        timestep=torch.tensor(500),
    )


def test_value_layers_are_compared_without_a_pass(model: StableDiffusion) -> None:
    before, embeddings = model.unet_evaluations, rows(3, 0, shape=model.embedding_shape)
    found = value_distances(model, embeddings, ("down", "mid"))
    assert list(found) == list(model.layers("cross_attention.value", ("down", "mid")))
    assert model.unet_evaluations == before
    name, layer = next(iter(model.layers("cross_attention.value").items()))
    with torch.no_grad():
        values = layer(embeddings).flatten(1)
    assert found[name].distance[0, 2] == pytest.approx(float((values[0] - values[2]).norm()))
    assert found[name].length[1] == pytest.approx(float(values[1].norm()))


def test_feed_forward_layers_see_the_embedding_and_nothing_else_that_changes(
    model: StableDiffusion,
) -> None:
    embeddings = rows(3, 1, shape=model.embedding_shape)
    found = trace(model, torch.cat([embeddings, embeddings[:1]]))
    assert list(found) == list(model.layers("feed_forward.out", ("down", "mid")))
    for own in found.values():
        assert own.distance[0, 3] == pytest.approx(0, abs=1e-4), "one noise, one timestep"
        assert own.distance[0, 1] > 1e-3
    assert not any(m._forward_pre_hooks for m in model.denoiser().modules())


def test_layers_beyond_memory_get_passes_of_their_own(
    model: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings = rows(3, 2, shape=model.embedding_shape)
    whole = trace(model, embeddings)
    monkeypatch.setattr(module, "MEMORY", 1)
    monkeypatch.setattr(module, "ROWS", 2)
    parts = trace(model, embeddings)
    assert list(parts) == list(whole)
    for name, own in whole.items():
        assert torch.allclose(parts[name].distance, own.distance, atol=1e-4)


def test_groups_are_averaged_by_themselves(tmp_path: Path) -> None:
    values = rows(5, 3)
    flat = values.flatten(1).double()
    compared = module.Compared(torch.cdist(flat, flat), flat.norm(dim=1))
    groups = [
        Group("triggers", ("a", "a", "b"), tuple(map(pair, "aab")), values[:3]),
        Group("control_prompts", ("prompts",) * 2, tuple(map(pair, "cd")), values[3:]),
    ]
    found = activation_findings({"nemo": {"layer": compared}}, groups, timestep=5, noise_seed=0)
    first, second = found.layers
    assert first.distance.value == pytest.approx(float(compared.distance[0, 1]))
    assert first.distance_between.value == pytest.approx(float(compared.distance[:2, 2].mean()))
    assert second.distance.value == pytest.approx(float(compared.distance[3, 4]))
    assert (first.count, second.count) == (3, 2)
