from dataclasses import replace
from typing import Any

import pytest
import torch

from dori_lightning.mitigations.concept_ablation import ConceptAblation, ConceptAblationTraining
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.mitigations.replacements import AnchorSettings

METHOD = ConceptAblation(
    "ablation",
    anchors=AnchorSettings(prompts=3, images=1, max_similarity=0.99, ordinary=4),
    steps=2,
    batch=3,
    prior_weight=0.5,
    finetune=FinetuneSettings(lr=1e-3),
)


@pytest.fixture
def training(model, suspected, context, anchors):
    """A training that no Trainer runs: its step is 0."""
    module = ConceptAblationTraining(model, METHOD, suspected, context, anchors=anchors)
    module.log = lambda *_: None
    yield module
    for parameter in model.parameters():
        parameter.grad = None


def test_captions_and_what_replicates_like_them_are_targets(training, model, suspected):
    one, two = suspected
    wanted = [(one.id, one.prompt), (one.id, "red cat"), (two.id, two.prompt)]
    assert [name for name, _ in training.targets] == [name for name, _ in wanted]
    for (_, found), (_, prompt) in zip(training.targets, wanted, strict=True):
        assert torch.equal(found, model.encode_prompts([prompt])[0])


def test_a_step_pulls_the_caption_to_the_anchor_and_keeps_the_anchor(training, model, monkeypatch):
    seen: list[Any] = []
    predict = model.predict_noise

    def noting(latents, timesteps, prompts, **_):
        seen.append((latents, timesteps, prompts))
        return predict(latents, timesteps, prompts)

    monkeypatch.setattr(model, "predict_noise", noting)
    loss = training.training_step()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.denoiser().named_parameters()}
    model.denoiser().zero_grad()
    ((latents, timesteps, prompts),) = seen
    half = len(latents) // 2
    assert half == METHOD.batch
    assert torch.equal(latents[:half], latents[half:])
    assert torch.equal(timesteps[:half], timesteps[half:])
    # written out: the anchor prediction without gradient, and the noise of the anchor's latent
    noised, t, captions, own = latents[:half], timesteps[:half], prompts[:half], prompts[half:]
    clean = torch.stack(
        [
            next(
                latent
                for name in training.anchors.latents
                for latent, text in zip(
                    training.anchors.latents[name], training.anchors.embeddings[name], strict=True
                )
                if torch.equal(text, row)
            )
            for row in own
        ]
    )
    alpha = model.variances(t)[0][:, None, None, None]
    noise = (noised - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    with torch.no_grad():
        anchor = predict(noised, t, own)
    ablation = ((predict(noised, t, captions) - anchor) ** 2).mean()
    prior = ((predict(noised, t, own) - noise) ** 2).mean()
    wanted = ablation + 0.5 * prior
    wanted.backward()
    assert torch.allclose(loss, wanted, rtol=1e-4)
    for name, parameter in model.denoiser().named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-2, atol=1e-6)
    assert {tuple(row.flatten().tolist()) for row in captions} == {
        tuple(target.flatten().tolist()) for _, target in training.targets
    }


def test_a_caption_is_drawn_with_anchors_of_its_own_pair(training, model, monkeypatch):
    seen: list[torch.Tensor] = []

    def noting(latents, _t, prompts):
        seen.append(prompts)
        return latents

    monkeypatch.setattr(model, "predict_noise", noting)
    training.method = replace(METHOD, batch=12)
    training.training_step()
    captions, own = seen[0].chunk(2)
    for caption, row in zip(captions, own, strict=True):
        pair = next(name for name, target in training.targets if torch.equal(target, caption))
        assert any(torch.equal(row, text) for text in training.anchors.embeddings[pair])


def test_a_run_trains_all_weights_and_says_how_many_anchors(model, suspected, context):
    edit = METHOD.apply(model, suspected, context)
    assert set(edit.weights) == {n for n, _ in model.denoiser().named_parameters()}
    assert edit.origin.notes["anchors"].keys() == {pair.id for pair in suspected}
    assert not list(context.folder.rglob("unfinished/*"))
