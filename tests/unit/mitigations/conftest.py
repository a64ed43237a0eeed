import pytest
import torch

from dori_lightning.mitigations.replacements import Anchors
from dori_lightning.runtime.seeding import keyed_generator
from support.context import make_context, read_pairs
from support.tiny import tiny_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """One tiny checkpoint for all tests: mitigations leave it as it was, and tests must too."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Two suspected pairs and three controls."""
    return read_pairs(tmp_path_factory.mktemp("material"))


@pytest.fixture
def suspected(pairs):
    """What mitigations are to forget."""
    return tuple(pair for pair in pairs if pair.kind != "control")


@pytest.fixture
def context(model, tmp_path, pairs):
    """A context over all pairs with a folder of its own."""
    return make_context(tmp_path, model, pairs)


@pytest.fixture
def context_of(model, pairs):
    """Make further contexts: ``context_of(folder, seed=1)``."""

    def make(folder, **options):
        return make_context(folder, model, pairs, **options)

    return make


@pytest.fixture
def anchors(model, suspected):
    """Two random anchors for each pair; the first pair has one further target."""
    latents, embeddings = {}, {}
    for k, pair in enumerate(suspected):
        generator = keyed_generator("anchors of a test", k)
        latents[pair.id] = torch.randn(2, *model.latent_shape, generator=generator)
        embeddings[pair.id] = torch.randn(2, *model.embedding_shape, generator=generator)
    one, two = (pair.id for pair in suspected)
    targets = {one: model.encode_prompts(["red cat"]), two: torch.zeros(0, *model.embedding_shape)}
    return Anchors(latents, embeddings, targets, {})
