"""Ordinary prompts and images are encoded when they are drawn, and once for all jobs."""

from dataclasses import replace

import pytest
import torch

from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.pairs.corpus import NoCorpus
from dori_lightning.types import InputError
from support.context import FakeCorpus
from support.distributed_fits import METHODS


@pytest.fixture
def encoded(model, monkeypatch) -> list[int]:
    """How many images each call of the autoencoder's encoder gets."""
    sizes: list[int] = []
    encode = type(model).encode_images

    def counted(self, images):
        sizes.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(type(model), "encode_images", counted)
    return sizes


def test_what_is_asked_for_is_encoded_once_and_as_if_alone(model, context, encoded):
    rows = context.ordinary(model, "calibration", 6).rows([4, 1, 4])
    assert sum(encoded) == 2
    examples = context.corpus.examples("calibration", 6, model.resolution)
    for row, place in enumerate([4, 1, 4]):
        alone = model.encode_images(examples.images[place : place + 1])[0]
        assert torch.equal(rows.latents[row], alone)
        assert torch.equal(
            rows.embeddings[row], model.encode_prompts([examples.prompts[place]])[0]
        )


def test_another_job_reads_them_unless_the_file_is_damaged_or_anothers(
    model, context, context_of, tmp_path, encoded
):
    before = context.ordinary(model, "calibration", 6).rows([4, 1])
    encoded.clear()
    other = context_of(tmp_path)
    assert torch.equal(
        other.ordinary(model, "calibration", 6).rows([1]).latents[0], before.latents[1]
    )
    assert not encoded
    (file,) = (context.folder / "ordinary").rglob("000004.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    again = other.ordinary(model, "calibration", 6)
    assert torch.equal(again.rows([4, 1]).latents, before.latents)
    assert encoded == [1]
    changed = context_of(tmp_path, corpus=FakeCorpus("another"))
    changed.ordinary(model, "calibration", 6).rows([4])
    assert encoded == [1, 1]


def test_they_are_the_same_where_a_fit_computes_in_mixed_precision(
    model, context, context_of, tmp_path
):
    with torch.autocast("cpu", torch.bfloat16):
        mixed = context.ordinary(model, "calibration", 2).rows([0, 1])
    plain = context_of(tmp_path / "other").ordinary(model, "calibration", 2).rows([0, 1])
    assert torch.equal(mixed.latents, plain.latents)
    assert torch.equal(mixed.embeddings, plain.embeddings)


def test_a_fit_encodes_what_it_draws_and_the_next_one_nothing(model, suspected, context, encoded):
    short = FinetuneSettings(lr=1e-3)
    method = replace(
        METHODS["adversarial"], ordinary_examples=60, epochs=1, updates=1, finetune=short
    )
    first = method.apply(model, suspected, context)
    drawn = len(list((context.folder / "ordinary").rglob("*.safetensors")))
    assert 0 < drawn <= method.steps * method.ordinary_batch
    encoded.clear()
    again = replace(method, name="again").apply(model, suspected, context)
    assert not encoded, "its surrogates are the first one's"
    assert again.identity == first.identity


def test_a_corpus_without_images_is_refused_before_anything_is_generated(
    model, suspected, context_of, tmp_path
):
    used = model.unet_evaluations
    context = context_of(tmp_path, corpus=NoCorpus())
    with pytest.raises(InputError, match="corpus is none"):
        METHODS["adversarial"].apply(model, suspected, context)
    assert model.unet_evaluations == used
