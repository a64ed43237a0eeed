"""Words, and what text encoders take them as."""

import pytest
import torch

from dori_lightning.types import InputError
from support.families import load_family
from support.tiny import WORDS
from support.unchanged import unchanged


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def model(request):
    return load_family(request.param)


def test_words_are_tokens_that_come_back_when_they_are_typed(model):
    vocabulary = model.vocabulary()
    assert set(WORDS) < set(vocabulary.words)
    assert vocabulary.limit == 8 - 2
    assert len(vocabulary.inputs) == len(vocabulary.words) == len(set(vocabulary.words))
    pieces = set(range(len(model.tokenizer))) - set(vocabulary.ids)
    assert set(model.tokenizer.all_special_ids) < pieces
    for place in range(len(vocabulary.words)):
        assert vocabulary.survives([place])
    places = vocabulary.places("a red boat")
    assert vocabulary.prompt(places) == "a red boat"
    assert not bool(vocabulary.allowed(places)[places].any())
    assert int(vocabulary.allowed(places).sum()) == len(vocabulary.words) - 3


@pytest.mark.parametrize("prompt", ["", "cat", "a red boat", "a cat at night on sea"])
def test_inputs_of_words_are_encoded_as_their_prompt(model, prompt):
    vocabulary = model.vocabulary()
    tokens = vocabulary.inputs[vocabulary.places(prompt)][None]
    with unchanged(model), torch.no_grad():
        assert torch.equal(model.encode_tokens(tokens), model.encode_prompts([prompt]))


def test_encoding_words_is_differentiable_up_to_the_pooled_output(model):
    vocabulary = model.vocabulary()
    tokens = vocabulary.inputs[[0, 1, 2]].expand(2, -1, -1).clone().requires_grad_(True)
    encoded = model.encode_tokens(tokens)
    assert encoded.shape == (2, *model.embedding_shape)
    for part in model.parts:
        if part.free:
            (gradient,) = torch.autograd.grad(
                part.of(encoded)[0].square().sum(), tokens, retain_graph=True
            )
            assert bool((gradient[0].abs().amax(1) > 0).all())
            assert not bool(gradient[1].any())  # rows are encoded apart
    for encoder, _ in model.components.encoders.values():
        assert not encoder.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("family", ["sd3", "flux", "pixart"])
def test_text_encoders_of_other_vocabularies_are_refused(family):
    with pytest.raises(InputError, match="T5"):
        load_family(family).vocabulary()
