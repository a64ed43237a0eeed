from dataclasses import replace
from functools import partial

import pytest
import torch

from dori_lightning.mitigations.base import edit_key
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.mitigations.replacements import AnchorSettings
from dori_lightning.mitigations.siss import (
    SISS,
    Draws,
    SISSTraining,
    combined,
    importance_weights,
    length,
    losses,
)
from dori_lightning.runtime.checkpoints import last_checkpoint
from dori_lightning.runtime.seeding import keyed_generator

METHOD = SISS(
    "siss",
    anchors=AnchorSettings(prompts=2, images=1, max_similarity=0.99, ordinary=4),
    steps=2,
    batch=3,
    micro_batch=2,
    scaling_norm=5.0,
    finetune=FinetuneSettings(lr=1e-3, warmup=1, checkpoint_every=1),
)


@pytest.fixture
def make(model, suspected, context, anchors):
    """Make trainings that no Trainer runs."""

    def call(**changes):
        return SISSTraining(model, replace(METHOD, **changes), suspected, context, anchors=anchors)

    yield call
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def draws(model):
    """Four elements, two of them to forget, at two timesteps."""
    generator = keyed_generator("draws of a test")
    shape = (4, *model.latent_shape)
    kept = torch.randn(shape, generator=generator)
    return Draws(
        kept=kept,
        # near, so that no weight vanishes
        forgotten=kept + 0.05 * torch.randn(shape, generator=generator),
        prompts=torch.randn(4, *model.embedding_shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        timesteps=torch.tensor([999, 999, 400, 400]),
        forgets=torch.tensor([True, False, True, False]),
    )


@pytest.mark.parametrize("mixture", [0.1, 0.5, 0.8])
def test_weights_are_the_published_ratios_and_never_overflow(mixture):
    excess = torch.tensor([-600.0, -3.0, -1e-3, 0.0, 0.5, 4.0, 600.0], dtype=torch.float64)
    keep, forget = importance_weights(excess, mixture)
    naive_keep = 1 / ((1 - mixture) + mixture * excess.exp())
    naive_forget = 1 / ((1 - mixture) * (-excess).exp() + mixture)
    assert torch.allclose(keep, naive_keep, rtol=1e-12, atol=0)
    assert torch.allclose(forget, naive_forget, rtol=1e-12, atol=0)
    assert torch.allclose((1 - mixture) * keep + mixture * forget, torch.ones_like(keep))
    far = torch.tensor([-1e5, 1e5])
    assert torch.isinf(far.exp()).any(), "where the naive form overflows"
    keep, forget = importance_weights(far, mixture)
    assert torch.allclose(keep, torch.tensor([1 / (1 - mixture), 0.0]))
    assert torch.allclose(forget, torch.tensor([0.0, 1 / mixture]))


def test_siss_losses_are_the_published_ones(model, draws):
    share = 0.3
    with torch.no_grad():
        keep, forget = losses(model, draws, mixture=share)
        wanted_keep = wanted_forget = 0.0
        for k in range(4):
            alpha = model.variances(draws.timesteps[k])[0].double()
            gamma, sigma = alpha.sqrt(), (1 - alpha).sqrt()
            x, a = draws.kept[k].double(), draws.forgotten[k].double()
            m = gamma * (a if bool(draws.forgets[k]) else x) + sigma * draws.noise[k].double()
            d_x = ((m - gamma * x) ** 2).sum() / (2 * sigma**2)
            d_a = ((m - gamma * a) ** 2).sum() / (2 * sigma**2)
            w_x = 1 / ((1 - share) + share * (d_x - d_a).exp())
            w_a = 1 / ((1 - share) * (d_a - d_x).exp() + share)
            part = slice(k, k + 1)
            output = model.predict_noise(
                m[None].float(), draws.timesteps[part], draws.prompts[part]
            )
            wanted_keep += w_x * ((output[0] - (m - gamma * x) / sigma) ** 2).sum()
            wanted_forget += w_a * ((output[0] - (m - gamma * a) / sigma) ** 2).sum()
            assert 0.01 < float(w_x * share) < 0.99
    assert torch.allclose(keep.double(), wanted_keep, rtol=1e-4)
    assert torch.allclose(forget.double(), wanted_forget, rtol=1e-4)
    assert not torch.allclose(keep, forget, rtol=1e-2)


def test_the_forget_gradient_is_subtracted_at_a_fixed_length():
    keep = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    forget = [torch.tensor([30.0, 0.0]), torch.tensor([[40.0]])]
    found = combined(keep, forget, 5.0)
    assert torch.allclose(found[0], torch.tensor([1.0 - 3.0, 2.0]))
    assert torch.allclose(found[1], torch.tensor([[3.0 - 4.0]]))
    found = combined(keep, [torch.zeros_like(g) for g in forget], 5.0)
    assert all(torch.equal(a, b) for a, b in zip(found, keep, strict=True))


def test_micro_batches_change_no_gradient_and_the_mean_over_the_batch_is_taken_once(make, model):
    one, two = (make(micro_batch=size) for size in (1, 3))
    drawn, loss = one._draws("siss", 0), partial(losses, mixture=0.5)
    first, second = (module._gradients(drawn, loss) for module in (one, two))
    with torch.no_grad():
        wanted = sum(loss(model, drawn)) / METHOD.batch
    assert torch.allclose(first[1], wanted, rtol=1e-4)
    assert torch.allclose(second[1], wanted, rtol=1e-4)
    for ones, threes in zip(first[0], second[0], strict=True):
        assert float(length(ones)) > 0
        apart = [a - b for a, b in zip(ones, threes, strict=True)]
        assert float(length(apart)) < 1e-3 * float(length(ones))


def test_the_length_is_a_tenth_of_the_naive_deletion_gradients(make, model):
    found = make(scaling_norm=None)
    norms = []
    for k in range(4):
        drawn = found._draws("siss scale", k)
        noised = model.noised(drawn.kept, drawn.noise, drawn.timesteps)
        predicted = model.predict_noise(noised, drawn.timesteps, drawn.prompts)
        keep = ((predicted - drawn.noise) ** 2).sum()
        gradient = torch.autograd.grad(keep / METHOD.batch, list(model.parameters()))
        norms.append(float(length(gradient)))
    assert found.scaling_norm == pytest.approx(0.1 * sum(norms) / 4, rel=1e-3)
    assert found.notes == {"scaling_norm": found.scaling_norm}
    assert make(scaling_norm=5.0).scaling_norm == 5.0


def test_draws_follow_the_settings(make, suspected, context):
    module = make(batch=64)
    drawn = module._draws("siss", 0)
    assert set(drawn.timesteps.tolist()) == {999}
    assert 16 < int(drawn.forgets.sum()) < 48
    encoded = context.data.batch(suspected)
    for k in range(64):
        own = [torch.equal(drawn.forgotten[k], latent) for latent in encoded.latents]
        pair = own.index(True)
        assert torch.equal(drawn.prompts[k], encoded.embeddings[pair])
        anchors = module.anchors.latents[suspected[pair].id]
        assert any(torch.equal(drawn.kept[k], latent) for latent in anchors)
    other = make(batch=64, mixture=0.05)._draws("siss", 0)
    assert int(other.forgets.sum()) < 16


def test_a_run_is_adamw_along_the_combined_gradient(
    model, suspected, context_of, tmp_path, anchors, monkeypatch
):
    monkeypatch.setattr("dori_lightning.mitigations.siss.find_anchors", lambda *_, **__: anchors)
    context = context_of(tmp_path)
    edit = METHOD.apply(model, suspected, context)
    twin = model.frozen_copy()
    module = SISSTraining(twin, METHOD, suspected, context, anchors=anchors)
    weights = dict(twin.denoiser().named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3, weight_decay=1e-2)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / 2
        drawn = module._draws("siss", step)
        (keep, forget), _ = module._gradients(drawn, partial(losses, mixture=0.5))
        gradient = combined(keep, forget, 5.0)
        for weight, value in zip(weights.values(), gradient, strict=True):
            weight.grad = value
        size = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        assert float(size) > 1, "clipping has something to do"
        optimizer.step()
    assert set(edit.weights) == set(weights)
    for name, value in edit.weights.items():
        assert torch.allclose(value, weights[name], atol=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_bits(
    model, suspected, context_of, tmp_path, anchors, monkeypatch
):
    monkeypatch.setattr("dori_lightning.mitigations.siss.find_anchors", lambda *_, **__: anchors)
    method = replace(METHOD, scaling_norm=None, batch=1)
    whole = method.apply(model, suspected, context_of(tmp_path / "whole"))
    cut = context_of(tmp_path / "cut")
    step = SISSTraining.training_step

    def fails(self, *args):
        if self.global_step == 1:
            raise RuntimeError("power cut")
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SISSTraining, "training_step", fails)
        with pytest.raises(RuntimeError, match="power cut"):
            method.apply(model, suspected, cut)
    scratch = cut.scratch(edit_key(method, model, suspected, cut))
    assert last_checkpoint(scratch, "siss") is not None
    resumed = method.apply(model, suspected, cut)
    assert resumed.identity == whole.identity
    assert resumed.origin.notes == whole.origin.notes
    assert whole.origin.notes["scaling_norm"] > 0
    assert not list((tmp_path / "cut" / "edits" / "unfinished").iterdir())
