"""The prompts themselves, as an audit draws from them."""

import pytest
import torch

from dori_lightning.certify.prompts import Prompts
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.protocol import Sampling
from support.attempts import SAMPLING, attacked, make_subject, plan_of, try_on
from support.families import load_family


@pytest.fixture(scope="module")
def subject(tmp_path_factory, model):
    return make_subject(tmp_path_factory.mktemp("prompts"), model)


def test_images_are_those_of_an_audit_and_rows_are_counted(subject):
    kept, spent = try_on(Prompts(), subject)
    assert kept.levels == ["its prompt"]
    assert kept.each == spent == Prompts().rows(plan_of()) == 4 * 2 * 2
    pair, model = subject.context.pairs[0], subject.model
    seeds = range(SAMPLING.seed, SAMPLING.seed + 4)
    noise = torch.stack([generation_noise(seed, model.latent_shape) for seed in seeds])
    where = model.encode_prompts([pair.prompt]).expand(4, -1, -1)
    torch.testing.assert_close(
        kept.images["its prompt"][pair.id],
        model.generate(where, noise, SAMPLING),
        rtol=1e-4,
        atol=1e-4,
    )


def test_who_came_back_and_levels_that_do_not_count_are_not_drawn(subject):
    model, pairs = subject.model, subject.context.pairs
    before = model.unet_evaluations
    assert attacked(Prompts(), subject, pairs, closed=["its prompt"]).levels == []
    assert model.unet_evaluations == before


def test_the_model_carries_its_edit(subject, monkeypatch):
    pair, seen = subject.context.pairs[:1], []

    def filtered(embeddings, noise, sampling):
        seen.append(len(embeddings))
        return torch.zeros_like(embeddings)

    plain = attacked(Prompts(), subject, pair)
    monkeypatch.setattr(subject.model, "embedding_filter", filtered)
    defended = attacked(Prompts(), subject, pair)
    assert seen
    one = pair[0].id
    assert not torch.equal(plain.images["its prompt"][one], defended.images["its prompt"][one])


def test_flow_matching_without_guidance(tmp_path):
    sampling = Sampling("flow_euler", 2, 1.0, images_per_pair=1)
    subject = make_subject(tmp_path, load_family("sd3"), sampling=sampling)
    kept = attacked(Prompts(), subject, subject.context.pairs[:1])
    assert kept.total == Prompts().rows(plan_of(family="sd3", sampling=sampling)) == 2
