from dataclasses import replace

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
        uniform=torch.rand(shape, generator=generator),
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
        keep, forget = losses(model, draws, variant="siss", mixture=share)
        wanted_keep = wanted_forget = 0.0
        for k in range(4):
            alpha = model.alphas_cumprod[draws.timesteps[k]].double()
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


@pytest.mark.parametrize("variant", ["no_importance", "erase_diff", "neg_grad", "naive"])
def test_baselines_take_a_pass_for_each_image(model, draws, variant):
    def squares(latents, wanted):
        noised = model.noised(latents, draws.noise, draws.timesteps)
        return ((model.predict_noise(noised, draws.timesteps, draws.prompts) - wanted) ** 2).sum()

    with torch.no_grad():
        keep, forget = losses(model, draws, variant=variant)
        if variant == "neg_grad":
            assert keep is None
        else:
            assert torch.allclose(keep, squares(draws.kept, draws.noise))
        if variant == "naive":
            assert forget is None
        else:
            wanted = draws.uniform if variant == "erase_diff" else draws.noise
            assert torch.allclose(forget, squares(draws.forgotten, wanted))


def test_the_forget_gradient_is_subtracted_at_a_fixed_length():
    keep = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    forget = [torch.tensor([30.0, 0.0]), torch.tensor([[40.0]])]
    for variant in ("siss", "no_importance"):
        found = combined(keep, forget, variant=variant, scaling_norm=5.0)
        assert torch.allclose(found[0], torch.tensor([1.0 - 3.0, 2.0]))
        assert torch.allclose(found[1], torch.tensor([[3.0 - 4.0]]))
    nothing = [torch.zeros_like(g) for g in forget]
    found = combined(keep, nothing, variant="siss", scaling_norm=5.0)
    assert all(torch.equal(a, b) for a, b in zip(found, keep, strict=True))
    found = combined(keep, forget, variant="neg_grad")
    assert all(torch.equal(a, -b) for a, b in zip(found, forget, strict=True))


def test_erase_diff_never_climbs_the_erasing_loss():
    keep, forget = [torch.tensor([-2.0, 1.0])], [torch.tensor([4.0, 0.0])]
    (found,) = combined(keep, forget, variant="erase_diff", eta=0.25)
    assert torch.allclose(found, torch.tensor([-2.0 + (0.25 + 0.5) * 4, 1.0]))
    assert float((found * forget[0]).sum()) == pytest.approx(0.25 * 16)
    (found,) = combined([-keep[0]], forget, variant="erase_diff", eta=0.25)
    assert torch.equal(found, -keep[0]), "descends by enough already"


def test_micro_batches_change_no_gradient(make):
    one, two = (make(micro_batch=size) for size in (1, 3))
    first, second = (module._gradients(module._draws("siss", 0)) for module in (one, two))
    assert torch.allclose(first[2], second[2], rtol=1e-4)
    for k in (0, 1):
        assert float(length(first[k])) > 0
        apart = [a - b for a, b in zip(first[k], second[k], strict=True)]
        assert float(length(apart)) < 1e-3 * float(length(first[k]))


def test_the_mean_over_the_batch_is_taken_once(make, model):
    module = make(variant="no_importance")
    drawn = module._draws("siss", 0)
    _, _, total = module._gradients(drawn)
    with torch.no_grad():
        keep, forget = losses(model, drawn, variant="no_importance")
    assert torch.allclose(total, (keep + forget) / METHOD.batch, rtol=1e-4)


def test_the_length_is_a_tenth_of_the_naive_deletion_gradients(make, model):
    found = make(scaling_norm=None)
    norms = []
    for k in range(4):
        keep, _ = losses(model, found._draws("siss scale", k), variant="naive")
        gradient = torch.autograd.grad(keep / METHOD.batch, list(model.parameters()))
        norms.append(float(length(gradient)))
    assert found.scaling_norm == pytest.approx(0.1 * sum(norms) / 4, rel=1e-3)
    assert found.notes == {"scaling_norm": found.scaling_norm}
    assert make(scaling_norm=5.0).scaling_norm == 5.0
    assert make(scaling_norm=None, variant="neg_grad").notes == {}


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
    other = make(batch=64, timesteps="uniform", condition="neighbour", mixture=0.05)
    drawn = other._draws("siss", 0)
    assert len(set(drawn.timesteps.tolist())) > 32
    assert int(drawn.forgets.sum()) < 16
    texts = torch.cat(list(module.anchors.embeddings.values()))
    assert all(any(torch.equal(row, text) for text in texts) for row in drawn.prompts)


@pytest.mark.parametrize("variant", ["siss", "neg_grad"])
def test_a_run_is_adamw_along_the_combined_gradient(
    model, suspected, context_of, tmp_path, anchors, monkeypatch, variant
):
    monkeypatch.setattr("dori_lightning.mitigations.siss.find_anchors", lambda *_, **__: anchors)
    method, context = replace(METHOD, variant=variant), context_of(tmp_path)
    edit = method.apply(model, suspected, context)
    twin = model.frozen_copy()
    module = SISSTraining(twin, method, suspected, context, anchors=anchors)
    weights = dict(twin.denoiser().named_parameters())
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3, weight_decay=1e-2)
    for step in range(2):
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1) / 2
        keep, forget, _ = module._gradients(module._draws("siss", step))
        gradient = combined(keep, forget, variant=variant, scaling_norm=5.0)
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
