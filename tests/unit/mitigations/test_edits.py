import json
import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.solver import AttackProblem, AttackResult, solve
from dori_lightning.mitigations.edits import (
    Edit,
    EmptyEdit,
    MaskEdit,
    Origin,
    PairMaskEdit,
    WeightEdit,
    changed_weights,
    owner_of,
    read_edit,
    write_edit,
)
from dori_lightning.mitigations.prompt_adjustment import PromptAdjustmentEdit
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Budget, InputError
from support.unchanged import state_of, unchanged

PAIRS = ("boat", "house", "cat")


def value_names(model: StableDiffusion) -> list[str]:
    return [f"{name}.weight" for name in model.layers("cross_attention.value")]


def random_mask(seed: str, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    return torch.rand(tuple(shape), generator=keyed_generator("mask", seed)) < 0.4


def rows(model: StableDiffusion, seed: str) -> dict[str, torch.Tensor]:
    weights = dict(model.denoiser().named_parameters())
    return {n: random_mask(f"{seed} {n}", weights[n].shape[:1]) for n in value_names(model)}


def singles(model: StableDiffusion, seed: str) -> dict[str, torch.Tensor]:
    weights = dict(model.denoiser().named_parameters())
    return {n: random_mask(f"{seed} {n}", weights[n].shape) for n in value_names(model)}


Masks = Callable[[StableDiffusion, str], Mapping[str, torch.Tensor]]


def per_pair(model: StableDiffusion, masks: Masks) -> PairMaskEdit:
    return PairMaskEdit(Origin(model.fingerprint), {pair: masks(model, pair) for pair in PAIRS})


def trained(model: StableDiffusion) -> WeightEdit:
    weights = dict(model.denoiser().named_parameters())
    new = {name: weights[name].detach() * 1.5 + 0.1 for name in value_names(model)[:3]}
    return WeightEdit(Origin(model.fingerprint), new)


KINDS: dict[str, Callable[[StableDiffusion], Edit]] = {
    "rows": lambda model: MaskEdit(Origin(model.fingerprint), rows(model, "x")),
    "weights": lambda model: MaskEdit(Origin(model.fingerprint), singles(model, "x")),
    "rows of each pair": lambda model: per_pair(model, rows),
    "weights of each pair": lambda model: per_pair(model, singles),
    "trained": trained,
}


@pytest.fixture(params=KINDS)
def edit(request, model):
    return KINDS[request.param](model)


def inputs(model: StableDiffusion, count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "noised": torch.randn((count, *model.latent_shape), generator=generator),
        "timesteps": torch.randint(0, 1000, (count,), generator=generator),
        "embeddings": torch.randn((count, *model.embedding_shape), generator=generator),
    }


def test_an_applied_edit_changes_the_prediction_and_leaves_no_bit_behind(model, edit):
    batch = inputs(model, 3)
    with torch.no_grad(), unchanged(model):
        plain = model.predict_noise(**batch, pair_ids=PAIRS)
        with edit.applied(model):
            edited = model.predict_noise(**batch, pair_ids=PAIRS)
        after = model.predict_noise(**batch, pair_ids=PAIRS)
    assert not torch.isclose(edited, plain).flatten(1).all(1).any(), "every row is changed"
    assert torch.equal(after, plain)


def test_an_error_under_an_edit_leaves_no_bit_behind(model, edit):
    with (
        unchanged(model),
        pytest.raises(KeyError, match="power cut"),
        edit.applied(model),
    ):
        raise KeyError("power cut")


def test_the_empty_edit_changes_nothing(model):
    before = state_of(model)
    with EmptyEdit().applied(model):
        assert state_of(model) == before
    assert EmptyEdit().counts() == {}


def test_masks_zero_what_they_count_and_nothing_else(model):
    whole, single = KINDS["rows"](model), KINDS["weights"](model)
    before = {n: p.detach().clone() for n, p in model.denoiser().named_parameters()}
    for edit in (whole, single):
        with edit.applied(model):
            changed = {
                n: p.detach() != before[n]
                for n, p in model.denoiser().named_parameters()
                if not torch.equal(p, before[n])
            }
            assert not any(p[changed[n]].any() for n, p in _named(model, changed))
        count = {n: int((c.all(1) if edit is whole else c).sum()) for n, c in changed.items()}
        assert count == edit.counts()
        assert sum(count.values()) > 0


def _named(model: StableDiffusion, names: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    weights = dict(model.denoiser().named_parameters())
    return [(name, weights[name].detach()) for name in names]


def test_counts_of_a_per_pair_edit_are_means_and_of_trained_weights_all_of_them(model):
    name = value_names(model)[0]
    masks = {
        "boat": {name: torch.tensor([True] * 3 + [False] * 5)},
        "house": {name: torch.tensor([True] * 1 + [False] * 7)},
    }
    assert PairMaskEdit(Origin("x"), masks).counts() == {name: 2}
    assert set(trained(model).counts().values()) == {8 * 12}


@pytest.mark.parametrize("masks", [rows, singles])
def test_each_row_of_a_mixed_batch_is_as_under_its_own_pairs_mask(model, masks):
    edit, owners = per_pair(model, masks), ("cat", "boat", "boat", "house", "cat")
    batch = inputs(model, len(owners))

    def run(applied):
        point = batch["embeddings"].clone().requires_grad_(True)
        with applied.applied(model):
            noise = model.predict_noise(**{**batch, "embeddings": point}, pair_ids=owners)
            (gradient,) = torch.autograd.grad((noise**2).sum(), point)
        return noise.detach(), gradient

    # whole rows are masked after the same product, so no bit differs
    same = torch.equal if masks is rows else close
    mixed, gradient = run(edit)
    assert gradient.flatten(1).abs().amax(1).min() > 0
    for pair in PAIRS:
        own, own_gradient = run(edit.for_pair(pair))
        for k, owner in enumerate(owners):
            if owner == pair:
                assert same(mixed[k], own[k])
                assert same(gradient[k], own_gradient[k])
            else:
                assert not close(mixed[k], own[k])


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-4, atol=1e-5)


def test_guided_images_under_a_per_pair_edit_are_those_of_each_pairs_own(model):
    edit, sampling = per_pair(model, singles), Sampling("ddim", 2, 3.0, 1)
    batch = inputs(model, 3)
    with edit.applied(model):
        mixed = model.generate(batch["embeddings"], batch["noised"], sampling, pair_ids=PAIRS)
    for k, pair in enumerate(PAIRS):
        with edit.for_pair(pair).applied(model):
            own = model.generate(batch["embeddings"], batch["noised"], sampling)
        assert close(mixed[k], own[k])
        assert not close(mixed[k], own[k - 1])


def test_a_layer_without_a_mask_of_a_pair_is_as_it_is_for_it(model):
    name = value_names(model)[0]
    edit = PairMaskEdit(
        Origin(model.fingerprint), {"boat": {name: rows(model, "x")[name]}, "x": {}}
    )
    batch = inputs(model, 2)
    with torch.no_grad():
        plain = model.predict_noise(**batch)
        with edit.applied(model):
            mixed = model.predict_noise(**batch, pair_ids=["boat", "x"])
    assert not close(mixed[0], plain[0])
    assert torch.equal(mixed[1], plain[1])


def test_a_pruned_row_gives_zero_and_no_bias(model):
    name = next(n for n in model.layers("feed_forward.out"))
    layer = dict(model.denoiser().named_modules())[name]
    assert isinstance(layer, torch.nn.Linear)
    assert layer.bias is not None
    pruned = torch.arange(layer.out_features) < 3
    edit = PairMaskEdit(Origin(model.fingerprint), {"boat": {f"{name}.weight": pruned}})
    x = torch.randn(1, 5, layer.in_features)
    model.row_pairs = ("boat",)
    with torch.no_grad(), edit.applied(model):
        y = layer(x)
    with torch.no_grad(), edit.for_pair("boat").applied(model):
        assert torch.equal(layer(x), y)
    assert not y[0, :, :3].any()
    assert y[0, :, 3:].all()
    with torch.no_grad():
        assert layer(x)[0, :, :3].all()


def test_a_control_sees_the_mask_of_its_owner(model):
    edit, batch = per_pair(model, rows), inputs(model, 2)
    owner = owner_of("some control", PAIRS)
    with torch.no_grad():
        with edit.applied(model):
            seen = model.predict_noise(**batch, pair_ids=["some control", PAIRS[0]])
        with edit.for_pair(owner).applied(model):
            expected = model.predict_noise(**batch)
    assert torch.equal(seen[0], expected[0])
    assert edit.for_pair("some control").identity == edit.for_pair(owner).identity


def test_owners_follow_from_names_alone_and_are_spread_over_the_pairs():
    names = [f"control{k}" for k in range(60)]
    owners = {name: owner_of(name, PAIRS) for name in names}
    assert owners == {name: owner_of(name, PAIRS[::-1]) for name in names[::-1]}
    assert set(owners.values()) == set(PAIRS)
    assert [owner_of(pair, PAIRS) for pair in PAIRS] == list(PAIRS)
    # fixed: results of earlier runs were made with these
    assert [owners[f"control{k}"] for k in range(4)] == GOLDEN_OWNERS


GOLDEN_OWNERS = ["house", "house", "house", "boat"]


@pytest.mark.parametrize("masks", [rows, singles])
def test_a_per_pair_edit_insists_on_knowing_whose_rows_these_are(model, masks):
    with per_pair(model, masks).applied(model):
        with pytest.raises(RuntimeError, match="whose rows"):
            model.predict_noise(**inputs(model, 2))
        with pytest.raises(ValueError, match="2 rows, but 1 pair ids"):
            model.predict_noise(**inputs(model, 2), pair_ids=["boat"])


def test_another_checkpoint_is_refused_and_both_are_named(model, edit, monkeypatch):
    made_for = model.fingerprint
    monkeypatch.setattr(model, "fingerprint", "another")
    with (
        unchanged(model),
        pytest.raises(InputError, match=f"{made_for}.*another"),
        edit.applied(model),
    ):
        pytest.fail("it was applied")


@pytest.mark.parametrize("kind", ["mask", "pair", "trained"])
@pytest.mark.parametrize("wrong", ["name", "shape"])
def test_weights_that_the_model_does_not_have_are_refused_before_anything_changes(
    model, kind, wrong
):
    good, name = value_names(model)[:2]
    bad = "no.such.weight" if wrong == "name" else name
    masks = {good: torch.ones(8, dtype=torch.bool), bad: torch.ones(1, 3, dtype=torch.bool)}
    origin = Origin(model.fingerprint)
    edit = {
        "mask": lambda: MaskEdit(origin, masks),
        "pair": lambda: PairMaskEdit(origin, {"boat": masks}),
        "trained": lambda: WeightEdit(origin, {bad: torch.zeros(1)}),
    }[kind]()
    named = "does not have" if wrong == "name" else "has .8, 12. there"
    with unchanged(model), pytest.raises(InputError, match=named), edit.applied(model):
        pytest.fail("it was applied")


def test_a_second_per_pair_edit_is_refused_and_the_first_stays(model):
    first, batch = per_pair(model, rows), inputs(model, 3)
    with torch.no_grad(), first.applied(model):
        alone = model.predict_noise(**batch, pair_ids=PAIRS)
        with pytest.raises(RuntimeError, match="second edit"), first.applied(model):
            pytest.fail("it was applied")
        assert torch.equal(model.predict_noise(**batch, pair_ids=PAIRS), alone)


def test_masks_that_are_not_boolean_or_of_no_pair_are_refused():
    with pytest.raises(TypeError, match="masks are boolean"):
        MaskEdit(Origin("x"), {"w": torch.ones(2)})
    with pytest.raises(TypeError, match="masks are boolean"):
        PairMaskEdit(Origin("x"), {"boat": {"w": torch.ones(2, dtype=torch.uint8)}})
    with pytest.raises(ValueError, match="needs a pair"):
        PairMaskEdit(Origin("x"), {})


def test_per_pair_masks_of_other_layers_than_linear_ones_are_refused(model):
    masks = {"conv_in.weight": torch.ones(8, dtype=torch.bool)}
    edit = PairMaskEdit(Origin(model.fingerprint), {"boat": masks})
    with pytest.raises(TypeError, match="linear"), edit.applied(model):
        pytest.fail("it was applied")


def test_identity_follows_content_and_not_where_it_comes_from(model, edit):
    assert (
        edit.identity
        == type(edit)(
            Origin(model.fingerprint, mitigation="other", cost={"seconds": 3.0}),
            *([edit.weights] if isinstance(edit, WeightEdit) else [edit.masks]),
        ).identity
    )
    others = {kind: make(model).identity for kind, make in KINDS.items()}
    assert list(others.values()).count(edit.identity) == 1
    assert len(set(others.values())) == len(KINDS)


def test_identity_of_a_per_pair_edit_knows_pairs_without_a_mask():
    mask = {"w": torch.ones(2, dtype=torch.bool)}
    one = PairMaskEdit(Origin("x"), {"boat": mask})
    two = PairMaskEdit(Origin("x"), {"boat": mask, "cat": {}})
    assert one.identity != two.identity, "controls may be owned by cat"


def problem(model: StableDiffusion, ids: tuple[str, ...]) -> AttackProblem:
    def draw(kind, shape):
        return torch.stack(
            [torch.randn(shape, generator=keyed_generator(kind, name)) for name in ids]
        )

    return AttackProblem(
        ids,
        (0,) * len(ids),
        draw("latent", model.latent_shape),
        draw("start", model.embedding_shape),
    )


def attack(model: StableDiffusion, edit: Edit, *ids: str) -> AttackResult:
    with edit.applied(model):
        settings = AttackSettings(noise_batch=1)
        return solve(model, problem(model, ids), budget=Budget(steps=2), settings=settings)


@pytest.mark.parametrize("masks", [rows, singles])
def test_pairs_attacked_together_under_their_own_masks_get_the_bits_of_each_alone(model, masks):
    edit, ids = per_pair(model, masks), ("house", "some control")
    together = attack(model, edit, *ids)
    assert not torch.equal(together.embeddings, attack(model, EmptyEdit(), *ids).embeddings)
    for k, name in enumerate(ids):
        alone = attack(model, edit, name)
        assert torch.equal(alone.embeddings[0], together.embeddings[k])
        assert torch.equal(alone.losses[0], together.losses[k])
    backwards = attack(model, edit, "boat", *ids[::-1])
    assert torch.equal(backwards.embeddings[1:], together.embeddings.flip(0))


def test_an_attack_under_a_per_pair_edit_is_the_attack_under_the_pairs_own(model):
    edit = per_pair(model, rows)
    together = attack(model, edit, "house", "boat")
    for k, name in enumerate(("house", "boat")):
        own = attack(model, edit.for_pair(name), name)
        assert torch.equal(own.embeddings[0], together.embeddings[k])
        assert torch.equal(own.losses[0], together.losses[k])


ORIGIN = Origin(
    "0123456789abcdef",
    mitigation="nemo",
    settings={"kind": "Nemo", "threshold": 0.4, "layers": ["down", "mid"], "inner": {"k": None}},
    cost={"unet_evaluations": 12, "seconds": 3.5},
    notes={"boat": {"neurons": 3}},
)
ROWS = {"a.weight": torch.tensor([True, False, True]), "b.weight": torch.tensor([False] * 5)}
SINGLES = {"a.weight": torch.rand(4, 6, 1, 3, generator=torch.Generator().manual_seed(0)) < 0.3}

EDITS: dict[str, Callable[[], Edit]] = {
    "rows": lambda: MaskEdit(ORIGIN, ROWS),
    "weights": lambda: MaskEdit(ORIGIN, SINGLES),
    "of each pair": lambda: PairMaskEdit(
        ORIGIN, {"boat": {**SINGLES, "c.weight": ROWS["a.weight"]}, "a.b-c_1": ROWS, "idle": {}}
    ),
    "trained": lambda: WeightEdit(
        ORIGIN,
        {
            "a.weight": torch.randn(3, 4),
            "half": torch.randn(5).half(),
            "brain": torch.randn(2, 2).bfloat16(),
            "single": torch.tensor(2.5),
            "turned": torch.randn(4, 3).t(),
        },
    ),
}


@pytest.fixture(params=EDITS)
def stored(request):
    return EDITS[request.param]()


def test_what_is_written_comes_back_with_its_identity_and_origin(tmp_path, stored):
    path = write_edit(tmp_path / "below" / "edit.safetensors", stored)
    again = read_edit(path)
    assert type(again) is type(stored)
    assert again.identity == stored.identity
    assert again.origin == ORIGIN
    assert again.counts() == stored.counts()
    written, read = stored.tensors(), again.tensors()
    assert written.keys() == read.keys()
    for name, value in written.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    assert again.pairs == stored.pairs, "pairs without a mask too, in their order"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_masks_take_the_place_of_what_is_pruned_only(tmp_path):
    mask = torch.zeros(1000, 1000, dtype=torch.bool)
    mask[3, 4] = True
    path = write_edit(tmp_path / "edit.safetensors", MaskEdit(ORIGIN, {"w": mask}))
    assert path.stat().st_size < 2000


def test_an_edit_that_changes_nothing_has_nothing_to_write(tmp_path, stored):
    assert stored.kind
    assert not EmptyEdit().kind
    with pytest.raises(TypeError, match="nothing to write"):
        write_edit(tmp_path / "edit.safetensors", EmptyEdit())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_file_is_refused_by_its_path(tmp_path, stored, share):
    path = write_edit(tmp_path / "edit.safetensors", stored)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(path)


def test_a_changed_byte_among_the_tensors_is_noticed(tmp_path, stored):
    path = write_edit(tmp_path / "edit.safetensors", stored)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for place in {header, (header + len(data)) // 2, len(data) - 1}:
        damaged = bytearray(data)
        damaged[place] ^= 0x41
        path.write_bytes(bytes(damaged))
        refused(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the edit .*nothing\.safetensors: No such"):
        read_edit(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match="cannot read the edit"):
        read_edit(tmp_path)


def test_foreign_tensors_are_refused(tmp_path):
    path = tmp_path / "edit.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    assert "does not say of which edit" in refused(path)
    save_file({"weight": torch.ones(3)}, path, metadata={"format": "pt"})
    assert "does not say of which edit" in refused(path)


def test_a_pickle_is_refused_and_not_loaded(tmp_path):
    path, mark = tmp_path / "edit.safetensors", tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (mark,))

    path.write_bytes(pickle.dumps(Evil()))
    refused(path)
    torch.save({"weight": Evil()}, path)
    refused(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert mark.exists(), "it would have been"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layout", "2"),
        ("kind", "program"),
        ("identity", "0" * 24),
        ("origin", "{"),
        ("origin", "[]"),
        ("origin", json.dumps({"fingerprint": "another"})),
        ("origin", json.dumps({"fingerprint": "0123456789abcdef", "unknown": 1})),
        ("shapes", "{}"),
        ("shapes", "[]"),
        ("shapes", json.dumps({"a.weight": [1], "b.weight": [5]})),
        ("shapes", json.dumps({"a.weight": [3, 2**40], "b.weight": [5]})),
        ("shapes", json.dumps({"a.weight": ["x"], "b.weight": [5]})),
        ("pairs", "7"),
    ],
)
def test_a_note_that_does_not_fit_is_refused(tmp_path, key, value):
    path = write_edit(tmp_path / "edit.safetensors", EDITS["rows"]())
    if key == "pairs":
        write_edit(path, EDITS["of each pair"]())
    with safe_open(path, framework="pt") as file:
        note = file.metadata()
    assert key in note
    save_file(load_file(path), path, metadata={**note, key: value})
    refused(path)


def test_a_missing_part_of_the_note_is_refused(tmp_path):
    path = write_edit(tmp_path / "edit.safetensors", EDITS["of each pair"]())
    with safe_open(path, framework="pt") as file:
        note = file.metadata()
    for key in note:
        save_file(load_file(path), path, metadata={k: v for k, v in note.items() if k != key})
        refused(path)


def refused(path: Path) -> str:
    with pytest.raises(InputError, match="no edit of this program, or damaged") as caught:
        read_edit(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_weights_are_counted_where_they_differ(model, caplog):
    origin, weights = Origin(model.fingerprint), dict(model.denoiser().named_parameters())
    name = next(f"{n}.weight" for n in model.layers("cross_attention.value"))
    value = weights[name]
    rows = torch.zeros(len(value), dtype=torch.bool)
    rows[:2] = True
    width = value.shape[1]
    single = torch.zeros_like(value, dtype=torch.bool)
    single[0, 0] = True
    trained = value.detach().clone()
    trained[3, 1] += 1
    with caplog.at_level(logging.INFO):
        assert changed_weights(MaskEdit(origin, {name: rows}), model) == 2 * width
        assert changed_weights(MaskEdit(origin, {name: single}), model) == 1
        pairs = {"a": {name: rows}, "b": {name: rows}, "c": {}}
        assert changed_weights(PairMaskEdit(origin, pairs), model) == 2 * width
        assert changed_weights(WeightEdit(origin, {name: trained}), model) == 1
    assert f"the edit changes {2 * width} of " in caplog.text


def test_masks_of_zeros_and_weights_as_they_were_change_nothing(model, caplog):
    origin, weights = Origin(model.fingerprint), dict(model.denoiser().named_parameters())
    name = next(f"{n}.weight" for n in model.layers("cross_attention.value"))
    nothing = torch.zeros(len(weights[name]), dtype=torch.bool)
    everything = ~nothing
    assert changed_weights(EmptyEdit(), model) == 0
    assert changed_weights(MaskEdit(origin, {name: nothing}), model) == 0
    assert changed_weights(PairMaskEdit(origin, {"a": {}}), model) == 0
    assert changed_weights(WeightEdit(origin, {name: weights[name].detach().clone()}), model) == 0
    with torch.no_grad():
        before = weights[name].clone()
        weights[name].zero_()
    try:
        assert changed_weights(MaskEdit(origin, {name: everything}), model) == 0
    finally:
        with torch.no_grad():
            weights[name].copy_(before)
    assert caplog.text.count("the edit changes 0 of") == 4


def test_a_defence_at_inference_changes_no_weight_and_is_none_the_less(model):
    assert changed_weights(PromptAdjustmentEdit(Origin(model.fingerprint), 1.0), model) is None
