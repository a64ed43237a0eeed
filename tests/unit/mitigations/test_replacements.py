from dataclasses import dataclass, field, replace

import pytest
import torch

from dori_lightning.metrics.calibration import Measures
from dori_lightning.metrics.descriptors import Descriptor
from dori_lightning.mitigations.replacements import AnchorSettings, find_anchors
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.pairs.corpus import neighbour_prompts
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import InputError
from support.distributed_fits import METHODS

SETTINGS = AnchorSettings(prompts=3, images=2, max_similarity=0.5, ordinary=4)
FIRST = [[0.1, 0.2], [0.2, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.1]]
"""Of 3 prompts' 2 images with 2 references: an anchor, a target, and half an anchor."""
ALL_OVER = [[0.1, 0.9]] * 6
ORDINARY = [[0.1, 0.2], [0.9, 0.1], [0.1, 0.9], [0.3, 0.3]]


@dataclass
class Scripted(Descriptor):
    """Compares as a script says, and notes with what."""

    script: list[list[list[float]]]
    name: str = "scripted"
    threshold: float | None = None
    compared: list[torch.Tensor] = field(default_factory=list)

    def describe(self, images: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(images))[:, None].float()

    def compare(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        self.compared.append(b[:, 0])
        return torch.tensor(self.script.pop(0))


@pytest.fixture
def find(model, suspected, context_of, tmp_path):
    def call(*script, settings=SETTINGS):
        measures = Measures({"scripted": Scripted(list(script))}, "scripted")
        context = context_of(tmp_path, measures=measures)
        return find_anchors(model, suspected, context, settings)

    return call


def drawn(model: StableDiffusion, prompts: torch.Tensor, name: str, place: int) -> torch.Tensor:
    """What the sampler of the context makes of a prompt with the noise of its place."""
    noise = torch.randn(model.latent_shape, generator=keyed_generator("anchor", 0, name, place))
    return model.denoise(prompts[None], noise[None], Sampling("ddim", 2, 2.0, 2))[0]


def test_images_that_resemble_any_pair_are_no_anchors(find, model, suspected):
    one, two = suspected
    anchors = find(FIRST, ALL_OVER, ORDINARY)
    texts = model.encode_prompts(neighbour_prompts(one, 3, split="calibration"))
    assert torch.equal(anchors.embeddings[one.id], texts[[0, 0, 2]])
    assert torch.equal(anchors.targets[one.id], texts[1:2])
    for row, place in enumerate((0, 1, 5)):
        wanted = drawn(model, texts[place // 2], one.id, place)
        assert torch.allclose(anchors.latents[one.id][row], wanted, atol=1e-5)
    assert len(anchors.targets[two.id]) == 3
    assert anchors.notes == {
        "anchors": {one.id: 3, two.id: 2},
        "further_targets": {one.id: 1, two.id: 3},
        "ordinary_anchors": [two.id],
    }


def test_a_pair_without_anchors_gets_vetted_images_of_ordinary_prompts(
    find, model, context, suspected, caplog
):
    anchors = find(FIRST, ALL_OVER, ORDINARY)
    texts = model.encode_prompts(context.corpus.prompts("calibration", 4))
    assert torch.equal(anchors.embeddings[suspected[1].id], texts[[0, 3]])
    assert f"no anchor for {suspected[1].id}" in caplog.text


def test_no_anchor_at_all_is_an_error(find):
    with pytest.raises(InputError, match="no anchor for pair1"):
        find(FIRST, ALL_OVER, [[0.9, 0.1]] * 4)


def test_only_pairs_to_forget_are_compared_with(model, suspected, context_of, tmp_path):
    descriptor = Scripted([[[0.1]] * 6])
    context = context_of(tmp_path, measures=Measures({"scripted": descriptor}, "scripted"))
    find_anchors(model, suspected[1:], context, SETTINGS)
    assert [row.tolist() for row in descriptor.compared] == [[1.0]]


def test_what_a_cut_run_made_is_read_and_damaged_files_are_made_again(
    find, model, suspected, tmp_path
):
    first = find(FIRST, ALL_OVER, ORDINARY)
    used = model.unet_evaluations
    again = find()
    assert model.unet_evaluations == used
    (path,) = (tmp_path / "edits" / "anchors").rglob(f"{suspected[0].id}.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    third = find(FIRST)
    assert model.unet_evaluations == used + 6 * 2 * 2, "6 images, 2 steps, 2 rows for guidance"
    for other in (again, third):
        assert other.notes == first.notes
        for name in first.latents:
            assert torch.equal(other.latents[name], first.latents[name])
            assert torch.equal(other.embeddings[name], first.embeddings[name])


def test_draws_keep_images_and_prompts_together(find):
    anchors = find(FIRST, ALL_OVER, ORDINARY)
    ids = ["pair1", "pair0"] * 20
    latents, embeddings = anchors.draw(ids, torch.Generator().manual_seed(0))
    seen: dict[str, set[int]] = {"pair0": set(), "pair1": set()}
    for name, latent, embedding in zip(ids, latents, embeddings, strict=True):
        own = [torch.equal(latent, row) for row in anchors.latents[name]]
        assert own.count(True) == 1
        assert torch.equal(embedding, anchors.embeddings[name][own.index(True)])
        seen[name].add(own.index(True))
    assert seen == {"pair0": {0, 1, 2}, "pair1": {0, 1}}


@pytest.mark.parametrize(
    ("first", "second"), [("concept_ablation", "siss"), ("adversarial", "again")]
)
def test_mitigations_share_what_they_put_in_place_of_images(
    model, suspected, context_of, tmp_path, first, second
):
    """The second one generates nothing, costs what it would alone, and gives the same edit."""
    methods = {**METHODS, "again": replace(METHODS["adversarial"], name="again", epochs=1)}
    context = context_of(tmp_path / "sweep")
    context.find(methods[first], model, suspected)
    used, decoded = model.unet_evaluations, model.coder_rows.decoded
    shared = context.find(methods[second], model, suspected).edit
    spent = model.unet_evaluations - used
    assert model.coder_rows.decoded == decoded
    alone = context_of(tmp_path / "alone").find(methods[second], model, suspected).edit
    assert shared.identity == alone.identity
    cost = shared.origin.cost
    assert cost["reused_evaluations"] > 0
    assert cost["unet_evaluations"] == alone.origin.cost["unet_evaluations"]
    assert cost["unet_evaluations"] == spent + cost["reused_evaluations"]
