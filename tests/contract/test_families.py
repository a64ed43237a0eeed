"""What every family keeps: a row in ``support.families`` is all that a new one needs."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.solver import AttackProblem, random_embedding, solve
from dori_lightning.mitigations.edits import MaskEdit, Origin, PairMaskEdit
from dori_lightning.models.components import stem
from dori_lightning.models.export import weights_of, write_folder, write_single
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.original_layout import PREFIXES
from dori_lightning.types import Budget, InputError
from support.families import FAMILIES, drawn_by_diffusers, folder_of, load_family
from support.unchanged import unchanged

PROMPTS = ("a red boat", "a cat at night on sea")


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request) -> LatentDiffusion:
    return load_family(request.param)


def draws(model, count: int, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and noise."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn((2, count, *model.latent_shape), generator=generator)
    return first, second


@pytest.mark.parametrize("resolution", [32, 48])
@pytest.mark.parametrize(
    ("family", "sampling"), [(n, s) for n, family in FAMILIES.items() for s in family.sampling]
)
def test_images_are_those_of_the_library(family, sampling, resolution):
    model = load_family(family, resolution=resolution)
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    ours = model.generate(model.encode_prompts(PROMPTS[:1]), noise, sampling)
    theirs = drawn_by_diffusers(model, PROMPTS[0], noise, sampling)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4


def test_clean_latent_and_noise_make_up_the_noised_latent(model):
    latents, noise = draws(model, 4)
    timesteps = torch.tensor([0, 400, 900, model.num_train_timesteps - 1])
    embeddings = model.encode_prompts(PROMPTS * 2)
    noised = model.noised(latents, noise, timesteps)
    for guidance in (1.0, 2.0):
        with torch.no_grad():
            clean, predicted = model.predict_clean_and_noise(
                noised, timesteps, embeddings, guidance=guidance
            )
        a, s = (factor[:, None, None, None] for factor in model.scales(timesteps))
        assert clean.isfinite().all()
        assert predicted.isfinite().all()
        assert torch.allclose(a * clean + s * predicted, noised, atol=1e-5)
    with torch.no_grad():
        alone = model.predict_noise(noised, timesteps, embeddings)
    assert torch.allclose(
        alone, model.predict_clean_and_noise(noised, timesteps, embeddings)[1], atol=1e-6
    )
    squares = model.variances(timesteps)
    for factor, square in zip(model.scales(timesteps), squares, strict=True):
        assert torch.allclose(factor**2, square, atol=1e-6)


def test_the_loss_of_what_was_added_is_zero(model, monkeypatch):
    latents, noise = draws(model, 3)
    timesteps = torch.tensor([10, 500, 990])
    a, s = (factor[:, None, None, None] for factor in model.scales(timesteps))
    truth = {
        "epsilon": noise,
        "v_prediction": a * noise - s * latents,
        "velocity": noise - latents,
    }[model.prediction_type]
    monkeypatch.setattr(model, "_denoise", lambda *_: truth)
    embeddings = model.encode_prompts([PROMPTS[0]] * 3)
    assert model.denoising_loss(latents, noise, timesteps, embeddings).abs().max() < 1e-12
    clean, predicted = model.predict_clean_and_noise(
        model.noised(latents, noise, timesteps), timesteps, embeddings
    )
    assert torch.allclose(predicted, noise, atol=1e-4)
    assert torch.allclose(clean, latents, atol=2e-3)


def attacked(model, ids, initial, **settings):
    latents, _ = draws(model, len(ids), seed=7)
    return solve(
        model,
        AttackProblem(tuple(ids), (0,) * len(ids), latents, initial),
        budget=settings.pop("budget", Budget(steps=5)),
        settings=AttackSettings(noise_batch=2, snapshots=(), **settings),
        seed=1,
    )


def test_a_search_moves_every_free_part_and_nothing_else(model):
    free = model.free()
    initial = model.encode_prompts(PROMPTS).cpu()
    found = attacked(model, ["a", "b"], initial).embeddings[:, -1]
    for part in model.parts:
        moved = (part.of(found) != part.of(initial)).flatten(1).any(1)
        assert moved.tolist() == [part.free] * 2, part.name
    assert torch.equal(found[:, ~free], initial[:, ~free])
    used = torch.zeros(model.embedding_shape, dtype=torch.bool)
    for part in model.parts:
        part.of(used).fill_(True)
    assert not found[:, ~used].any()


def test_a_search_can_be_kept_to_one_part(model):
    name = next(part.name for part in model.parts if part.free)
    initial = model.encode_prompts(PROMPTS[:1]).cpu()
    found = attacked(model, ["a"], initial, parts=(name,)).embeddings[0, -1]
    for part in model.parts:
        assert torch.equal(part.of(found), part.of(initial[0])) == (part.name != name)
    with pytest.raises(InputError, match=r"attack\.parts"):
        model.free(["no such part"])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_every_part_stays_in_its_own_ball(model, norm):
    spread, initial = model.spread(), model.encode_prompts(PROMPTS[:1]).cpu()
    found = attacked(model, ["a"], initial, budget=Budget(norm, 0.01, 3)).embeddings[0, -1]
    for k, part in enumerate(spread.parts):
        delta = (part.of(found) - part.of(initial[0])).flatten() / part.of(spread.std).flatten()
        radius = 0.01 * (1 if spread.absolute else spread.distances[norm][k])
        length = delta.norm() if norm == "l2" else delta.abs().max()
        assert float(length) == pytest.approx(radius, rel=1e-3)


def test_a_random_start_holds_nothing_of_the_prompt(model):
    normal = random_embedding(0, "a", 0, model.embedding_shape)
    start, prompt = model.random_start(normal), model.encode_prompts(PROMPTS[:1])[0].cpu()
    empty = model.empty_embedding()[0].cpu()
    spread, read = model.spread(), model.read(start)
    other = model.random_start(-normal)
    for part in model.parts:
        rows = read[part.rows]
        if part.free:
            assert not (part.of(start) == part.of(prompt))[rows].any(), part.name
            away = (part.of(start) - part.of(spread.mean))[rows] / part.of(spread.std)[rows]
            assert float(away.std()) == pytest.approx(1, abs=0.35)
        else:
            assert torch.equal(part.of(start), part.of(other if part.masks else empty))
    name = next(part.name for part in model.parts if part.free)
    kept = model.random_start(normal, parts=[name])
    for part in model.parts:
        wanted = start if name in (part.name, part.masks) else empty
        assert torch.equal(part.of(kept), part.of(wanted))


def test_padding_that_is_masked_is_zero_not_read_and_never_moved(model):
    normal = random_embedding(0, "a", 0, model.embedding_shape)
    prompt = model.encode_prompts(PROMPTS[:1])[0].cpu()
    assert torch.equal(model.searched_alone(prompt), prompt)
    initial = torch.stack([prompt, model.random_start(normal)])
    padding = ~model.read(initial)
    assert bool(padding.any(1).all()) == any(part.masks for part in model.parts)
    found = attacked(model, ["a", "b"], initial).embeddings[:, -1]
    assert not initial[padding].any()
    assert not found[padding].any()
    assert torch.equal(~model.read(found), padding)
    _, noise = draws(model, 2)
    spoiled = found + 100.0 * padding[..., None]
    with torch.no_grad():
        clean, other = (
            model.predict_noise(noise, torch.tensor([5, 700]), rows) for rows in (found, spoiled)
        )
    assert torch.equal(clean, other)


def test_every_role_has_layers_in_order(model):
    names = [name for name, _ in model.denoiser().named_modules()]
    for role in dict.fromkeys(role for role, _ in model.layer_names):
        layers = model.layers(role)
        assert layers
        assert set(model.default_stages(role)) <= set(model.stages)
        assert set(model.layers(role, model.default_stages(role))) <= set(layers)
        assert set(layers) <= set(names)
    assert list(model.layers("cross_attention.value")) == list(model.layers("text.value"))
    for role, stages in (("text.value", ["side"]), ("text.value", []), ("nothing", None)):
        with pytest.raises(InputError, match="has no layers of the role"):
            model.layers(role, stages)


def test_a_blocked_value_neuron_gives_zero(model):
    name, layer = next(iter(model.layers("text.value").items()))
    masks = {f"{name}.weight": torch.arange(layer.out_features) < 2}
    latents, noise = draws(model, 1)
    for edit in (
        MaskEdit(Origin(model.fingerprint), masks),
        PairMaskEdit(Origin(model.fingerprint), {"a": masks}),
    ):
        seen: list[torch.Tensor] = []
        with (
            torch.no_grad(),
            edit.applied(model),
            layer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output)),
        ):
            embedding = model.encode_prompts(PROMPTS[:1])
            model.denoising_loss(latents, noise, torch.tensor([9]), embedding, pair_ids=["a"])
        assert not seen[0][..., :2].any()
        assert seen[0][..., 2:].any()


def test_weights_are_of_the_text_or_outside_or_neither(model):
    names = [name for name, _ in model.denoiser().named_parameters()]
    text = {name for name in names if model.is_text_weight(name)}
    outer = {name for name in names if model.is_outer_weight(name)}
    assert text
    assert outer
    assert not text & outer
    assert text | outer < set(names)


def test_a_search_does_not_depend_on_its_company(model):
    initial = model.encode_prompts(PROMPTS).cpu()
    together = attacked(model, ["a", "b"], initial)
    latents, _ = draws(model, 2, seed=7)
    alone = solve(
        model,
        AttackProblem(("b",), (0,), latents[1:], initial[1:]),
        budget=Budget(steps=5),
        settings=AttackSettings(noise_batch=2, snapshots=()),
        seed=1,
    )
    assert torch.equal(together.embeddings[1], alone.embeddings[0])
    assert torch.equal(together.losses[1], alone.losses[0])


def test_noise_samples_in_turn_give_the_same_search(model):
    initial = model.encode_prompts(PROMPTS[:1]).cpu()
    whole, turns = (
        attacked(model, ["a"], initial, samples_per_forward=count) for count in (None, 1)
    )
    assert torch.allclose(whole.losses, turns.losses, rtol=1e-3)
    assert torch.allclose(whole.embeddings, turns.embeddings, atol=1e-2)


def test_weights_can_be_kept_in_half_the_memory(model):
    with pytest.raises(InputError, match=r"checkpoint\.precision"):
        load_family(model.family.name, storage="bf16", precision="fp32")
    half = load_family(model.family.name, storage="bf16", precision="auto")
    assert half.fingerprint == model.fingerprint
    for name, module in half.components.modules.items():
        wanted = torch.float32 if name == "vae" else torch.bfloat16
        assert {p.dtype for p in module.parameters()} == {wanted}, name
    initial = half.encode_prompts(PROMPTS[:1]).cpu()
    assert initial.dtype == torch.float32
    name, layer = next(iter(half.layers("text.value").items()))
    masks = {f"{name}.weight": torch.arange(layer.out_features) < 2}
    with unchanged(half), MaskEdit(Origin(half.fingerprint), masks).applied(half):
        found = attacked(half, ["a"], initial)
    whole = attacked(model, ["a"], model.encode_prompts(PROMPTS[:1]).cpu())
    assert torch.allclose(found.losses, whole.losses, rtol=0.1)


def test_lent_text_encoders_come_for_prompts_and_go_for_passes(model, monkeypatch):
    lent = load_family(model.family.name, text_encoders="release")
    places: list[torch.device] = []
    monkeypatch.setattr(lent, "_move_encoders", places.append)
    embeddings = lent.encode_prompts(PROMPTS[:1])
    assert torch.equal(embeddings, model.encode_prompts(PROMPTS[:1]))
    asked, home = len(places), torch.device("cpu")
    assert places == [lent.device] * asked
    assert asked >= 1
    latents, noise = draws(lent, 1)
    lent.denoising_loss(latents, noise, torch.tensor([5]), embeddings)
    assert places[asked:] == [home]


def test_it_is_written_and_read_back(model, tmp_path):
    weights = weights_of(model.components)
    write_folder(tmp_path, model.components, weights)
    again = load_family(model.family.name, source=str(tmp_path))
    assert again.fingerprint == weights.fingerprint == model.fingerprint
    assert torch.equal(again.encode_prompts(PROMPTS), model.encode_prompts(PROMPTS))


def test_large_weights_are_written_as_shards_that_the_library_reads_too(model, tmp_path):
    weights = weights_of(model.components)
    denoiser, name = weights.states[model.family.denoiser], model.family.denoiser
    total = sum(tensor.nbytes for tensor in denoiser.values())
    write_folder(tmp_path, model.components, weights, shard_bytes=total // 2)
    shards = sorted(path.name for path in (tmp_path / name).glob("*.safetensors"))
    assert len(shards) >= 2
    assert all(re.fullmatch(rf"{stem(name)}-\d{{5}}-of-\d{{5}}\.safetensors", s) for s in shards)
    index = json.loads((tmp_path / name / f"{stem(name)}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert sorted(set(index["weight_map"].values())) == shards
    again = load_family(model.family.name, source=str(tmp_path))
    assert again.fingerprint == weights.fingerprint
    theirs = type(model.denoiser()).from_pretrained(tmp_path / name, local_files_only=True)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, denoiser[key].float()), key


def test_its_single_file_is_read_here_and_by_the_library(model, tmp_path):
    components, path = model.components, tmp_path / "whole.safetensors"
    weights = weights_of(components)
    if model.family.name not in PREFIXES:
        with pytest.raises(InputError, match=r"task\.formats"):
            write_single(path, components, weights)
        return
    write_single(path, components, weights)
    folder = folder_of(model.family.name)
    again = load_family(model.family.name, source=str(path), config=str(folder))
    assert again.fingerprint == model.fingerprint
    pipeline = getattr(diffusers, model.family.pipeline).from_single_file(
        str(path), config=str(folder), local_files_only=True
    )
    for name, state in weights.states.items():
        theirs = getattr(pipeline, name).state_dict()
        for key, tensor in state.items():
            assert torch.equal(theirs[key].float(), tensor.float()), f"{name}: {key}"
    for other in FAMILIES:
        if other != model.family.name:
            with pytest.raises(InputError):
                load_family(other, source=str(path), config=str(folder_of(other)))


def test_it_is_refused_under_another_familys_name(model):
    for other in FAMILIES:
        if other != model.family.name:
            with pytest.raises(InputError):
                load_family(other, source=str(folder_of(model.family.name)))
    with pytest.raises(InputError, match=r"checkpoint\.family"):
        load_checkpoint(name="x", source=str(folder_of(model.family.name)), family="dalle")


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A copy of the family's checkpoint, to be spoiled."""
    return Path(shutil.copytree(folder_of(model.family.name), tmp_path / "spoiled"))


def test_a_kernel_that_a_configuration_names_is_not_used(model, folder):
    for name in model.components.encoders:
        path = folder / name / "config.json"
        held = json.loads(path.read_text())
        kernel = {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel"}
        path.write_text(json.dumps({**held, **kernel}))
    again = load_family(model.family.name, source=str(folder))
    for encoder, _ in again.components.encoders.values():
        assert encoder.config._attn_implementation == "sdpa"


def test_pickles_are_refused_in_every_component(model, folder):
    for name in model.components.modules:
        weights = next((folder / name).glob("*.safetensors"))
        pickle = weights.with_suffix(".bin")
        kept = weights.read_bytes()
        weights.rename(pickle)
        with pytest.raises(InputError, match="pickle"):
            load_family(model.family.name, source=str(folder))
        pickle.unlink()
        weights.write_bytes(kept)


def test_shards_are_read_whole_and_an_index_is_not_followed(model, folder):
    for name in model.components.modules:
        whole = next((folder / name).glob("*.safetensors"))
        tensors, called = load_file(whole), stem(name)
        whole.unlink()
        half = len(tensors) // 2
        for k, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
            shard = folder / name / f"{called}-{k + 1:05}-of-00002.safetensors"
            save_file({key: tensors[key] for key in names}, shard, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../../../outside")}
        (folder / name / f"{called}.safetensors.index.json").write_text(json.dumps(index))
    assert load_family(model.family.name, source=str(folder)).fingerprint == model.fingerprint
    next((folder / "vae").glob("*-00002-of-*.safetensors")).unlink()
    with pytest.raises(InputError, match="are missing"):
        load_family(model.family.name, source=str(folder))
