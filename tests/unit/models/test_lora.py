"""LoRA files of every layout and family, fused into the checkpoint that they were trained on."""

import json
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.loading import FAMILIES as ADAPTERS
from dori_lightning.types import InputError
from support.families import FAMILIES, drawn_by_diffusers, load_family
from support.loras import LAYOUTS, write_lora
from support.tiny import tiny_model, tiny_recipe

pytest.importorskip("peft", reason="peft, of the extra 'lora', is not installed")

LOADED = [
    family
    for family in FAMILIES
    if hasattr(getattr(diffusers, ADAPTERS[family].family.pipeline), "lora_state_dict")
]
READ = [
    (family, layout)
    for family in LOADED
    for layout in LAYOUTS
    # which diffusers has no names for
    if (family, layout) != ("sd3", "sd-scripts")
]


@pytest.fixture(scope="module")
def bases() -> dict[str, LatentDiffusion]:
    return {family: load_family(family) for family in LOADED}


def weights(model: LatentDiffusion) -> dict[str, torch.Tensor]:
    return {
        f"{component}.{name}": tensor
        for component, own in model.components.modules.items()
        for name, tensor in own.state_dict().items()
    }


def assert_changed(model: LatentDiffusion, base: LatentDiffusion, changes: dict[str, Any]) -> None:
    before, after = weights(base), weights(model)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        change = changes.get(name.removesuffix(".weight"), 0) if name.endswith(".weight") else 0
        torch.testing.assert_close(tensor, before[name] + change, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(("family", "layout"), READ)
def test_a_lora_is_added_to_the_weights(bases, tmp_path, family, layout):
    path, base = tmp_path / "one.safetensors", bases[family]
    changes = write_lora(path, base, layout)
    model = load_family(family, lora=[{"path": str(path), "scale": 0.5}])
    assert_changed(model, base, {name: 0.5 * change for name, change in changes.items()})
    (found,) = model.loras
    assert (found.source, found.scale) == ("one.safetensors", 0.5)
    assert sum(found.layers.values()) == len(changes)
    assert model.fingerprint != base.fingerprint
    assert type(model.components.denoiser) is type(base.components.denoiser)
    assert {type(m) for m in model.components.denoiser.modules()} == {
        type(m) for m in base.components.denoiser.modules()
    }


@pytest.mark.parametrize(("family", "layout"), READ)
def test_images_are_those_of_diffusers_with_the_same_lora(bases, tmp_path, family, layout):
    path = tmp_path / "one.safetensors"
    write_lora(path, bases[family], layout, size=0.3)
    model = load_family(family, lora={"path": str(path), "scale": 0.8})
    sampling = FAMILIES[family].sampling[-1]
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    prompt = "a red boat at night"

    def fused(pipeline: Any) -> None:
        pipeline.load_lora_weights(str(path))
        pipeline.fuse_lora(components=pipeline._lora_loadable_modules, lora_scale=0.8)

    expected = drawn_by_diffusers(model, prompt, noise, sampling, prepare=fused)
    drawn = model.generate(model.encode_prompts([prompt]), noise, sampling)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-4)
    unlike = bases[family].generate(bases[family].encode_prompts([prompt]), noise, sampling)
    assert (unlike - drawn).abs().max() > 1e-2


def test_several_are_added_one_after_the_other(bases, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    first, second = (
        write_lora(file, bases["sd"], layout, seed=seed)
        for seed, (file, layout) in enumerate(zip(files, ("peft", "sd-scripts"), strict=True))
    )
    model = load_family("sd", lora=[str(files[0]), {"path": str(files[1]), "scale": -0.25}])
    assert first.keys() == second.keys()
    summed = {name: first[name] - 0.25 * second[name] for name in first}
    assert_changed(model, bases["sd"], summed)
    assert [(one.source, one.scale) for one in model.loras] == [
        ("a.safetensors", 1.0), ("b.safetensors", -0.25),
    ]  # fmt: skip


def test_contents_and_scale_are_part_of_the_fingerprint_and_names_are_not(bases, tmp_path):
    a, b, moved = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "moved"))
    write_lora(a, bases["sd"])
    write_lora(b, bases["sd"], seed=1)
    moved.write_bytes(a.read_bytes())
    settings = (None, str(a), str(b), {"path": str(a), "scale": 0.5}, [str(moved)])
    base, *others, again = (load_family("sd", lora=one).fingerprint for one in settings)
    assert len({base, *others}) == 4
    assert base == bases["sd"].fingerprint
    assert again == others[0]


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_lora_of_one_component_leaves_the_others(bases, tmp_path, component):
    path = tmp_path / "one.safetensors"
    changes = write_lora(path, bases["sd"], components=(component,))
    model = load_family("sd", lora=str(path))
    assert_changed(model, bases["sd"], changes)
    assert model.loras[0].layers == {component: len(changes)}


def test_each_layer_has_its_own_alpha(bases, tmp_path):
    path = tmp_path / "one.safetensors"
    changes = write_lora(path, bases["sd"], "sd-scripts", alpha=2.0, rank=2)
    tensors, changed = load_file(path), set()
    for layer in (
        "lora_te_text_model_encoder_layers_0_self_attn_out_proj",
        "lora_unet_mid_block_resnets_0_conv1",
    ):
        tensors[f"{layer}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    for name in changes:
        if name.endswith(("self_attn.out_proj", "mid_block.resnets.0.conv1")):
            changes[name] *= 0.5
            changed.add(name)
    assert len(changed) == 2
    assert_changed(load_family("sd", lora=str(path)), bases["sd"], changes)


def test_alpha_is_read_from_the_notes_of_a_training_with_peft(bases, tmp_path):
    path = tmp_path / "one.safetensors"
    special = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    noted = {
        "unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {special: 4},
        "text_encoder.r": 2, "text_encoder.lora_alpha": 4, "text_encoder.use_rslora": True,
    }  # fmt: skip
    changes = write_lora(path, bases["sd"], notes={"lora_adapter_metadata": json.dumps(noted)})
    factors = {"unet": 4.0, "text_encoder": 4 / 2**0.5}
    expected = {
        name: (2.0 if name == f"unet.{special}" else factors[name.partition(".")[0]]) * change
        for name, change in changes.items()
    }
    assert_changed(load_family("sd", lora=str(path)), bases["sd"], expected)


def test_a_folder_of_a_training_is_read(bases, tmp_path):
    write_lora(tmp_path / "pytorch_lora_weights.safetensors", bases["sd"])
    write_lora(tmp_path / "pytorch_lora_weights_2.safetensors", bases["sd"], seed=1)
    (found,) = load_family("sd", lora=str(tmp_path)).loras
    assert found.source == "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("of", "layout", "of_whom"),
    [
        (of, layout, other)
        for of, other in (
            ("sd", "sdxl"), ("sdxl", "sd"), ("sd3", "flux"), ("flux", "sd3"), ("flux", "sd"),
        )
        for layout in LAYOUTS
        if (of, layout) in READ
    ],
)  # fmt: skip
def test_a_lora_of_another_family_is_refused_with_its_name(bases, tmp_path, of, layout, of_whom):
    path = tmp_path / "one.safetensors"
    write_lora(path, bases[of], layout)
    with pytest.raises(InputError, match=rf"(?s)one\.safetensors.*checkpoint\.family={of}$"):
        load_family(of_whom, lora=str(path))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_of_another_width_is_refused(tmp_path, layout):
    wider = tiny_model(tmp_path / "wider", tiny_recipe(text_width=20))
    path = tmp_path / "one.safetensors"
    write_lora(path, wider, layout)
    with pytest.raises(
        InputError, match=r"(?s)has \(\d+, 12\) weights[^\n]* for \(\d+, 20\).*checkpoint\.source"
    ):
        load_family("sd", lora=str(path))


def damaged(change):
    """A function that writes a LoRA of SD whose tensors were changed."""

    def write(path, base):
        write_lora(path, base, "sd-scripts")
        save_file(change(load_file(path)), path)
        return path

    return write


def times(factor, which):
    return damaged(lambda t: {k: v * factor if which in k else v for k, v in t.items()})


def with_tensor(name):
    return damaged(lambda tensors: {**tensors, name: torch.ones(1)})


def unknown(path, base):
    save_file({"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}, path)
    return path


def pickled(path, base):
    other = path.with_suffix(".pt")
    torch.save({"lora_unet_x.lora_down.weight": torch.ones(1)}, other)
    return other


def pickled_under_another_name(path, base):
    pickled(path, base).rename(path)
    return path


def two_in_a_folder(path, base):
    for name in "ab":
        write_lora(path.with_name(f"{name}.safetensors"), base)
    return path.parent


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (unknown, r"belong to no layer of a LoRA, such as a\.weight[\s\S]*sd-scripts"),
        (pickled, r"is a pickle[\s\S]*models\.convert"),
        (pickled_under_another_name, r"is a pickle[\s\S]*models\.convert"),
        (lambda path, base: path, r"there is no LoRA"),
        (two_in_a_folder, r"holds 2 \.safetensors files"),
        (with_tensor("lora_unet_mid_block.dora_scale"), r"of DoRA"),
        (with_tensor("lora_unet_mid_block.lokr_w1"), r"of LoKr"),
        (with_tensor("lora_unet_mid_block.hada_w1_a"), r"of LoHa"),
        (with_tensor("something.else"), r"no layer of a LoRA, such as something\.else"),
        (damaged(lambda t: {k: 0 * v for k, v in t.items()}), r"changes no weight at scale 1"),
        (times(torch.nan, "lora_up"), r"NaN"),
        (times(torch.inf, "alpha"), r"alpha of layer"),
        (
            damaged(lambda t: {k.replace("attn2", "attn7"): v for k, v in t.items()}),
            r"have no place in it, such as unet\.\S*attn7",
        ),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_added_is_refused(bases, tmp_path, write, said):
    path = write(tmp_path / "one.safetensors", bases["sd"])
    with pytest.raises(InputError, match=said):
        load_family("sd", lora=str(path))


@pytest.mark.parametrize(
    "setting",
    [
        {"path": "FILE", "scale": "much"}, {"path": "FILE", "scale": True},
        {"path": "FILE", "scale": float("nan")}, {"path": "FILE", "weight": 1.0},
        {"scale": 1.0}, [["FILE"]], 3,
    ],
)  # fmt: skip
def test_what_is_no_path_and_scale_is_refused(bases, tmp_path, setting):
    with pytest.raises(InputError, match=r"checkpoint\.lora"):
        load_family("sd", lora=setting)


def test_layouts_that_diffusers_has_no_names_for_are_refused(bases, tmp_path):
    path = tmp_path / "one.safetensors"
    save_file({
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.ones(2, 16),
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": torch.ones(48, 2),
    }, path)  # fmt: skip
    with pytest.raises(InputError, match=r"have no place in it[\s\S]*diffusers' layout"):
        load_family("sd3", lora=str(path))


def test_without_peft_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", False)
    with pytest.raises(InputError, match=r"dori_lightning\[lora\]"):
        load_family("sd", lora=str(tmp_path / "one.safetensors"))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in LOADED])
def test_a_family_that_diffusers_loads_no_lora_into_is_refused(bases, tmp_path, family):
    path = tmp_path / "one.safetensors"
    write_lora(path, bases["sd"])
    with pytest.raises(InputError, match=r"diffusers loads no LoRA into"):
        load_family(family, lora=str(path))
