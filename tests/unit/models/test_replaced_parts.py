import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dori_lightning.models.export import weights_of, write_single
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import InputError
from support.tiny import tiny_recipe, write_tiny

FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, the same with all components of another seed (``other``), and that as one file."""
    place = tmp_path_factory.mktemp("components")
    write_tiny(place / "base")
    components = load(write_tiny(place / "other", seed=1)).components
    write_single(place / "other.safetensors", components, weights_of(components))
    return place


@pytest.fixture(scope="module")
def states(place):
    """State dicts of both checkpoints, by checkpoint and part."""
    models = {name: load(place / name) for name in ("base", "other")}
    return {(name, part): state(m, part) for name, m in models.items() for part in FILES}


def load(source: Path, **options: Any) -> StableDiffusion:
    return load_checkpoint(name="x", source=str(source), device="cpu", **options)


def state(model, part):
    module = {
        "unet": model.denoiser(),
        "vae": model.autoencoder,
        "text_encoder": model.text_encoder,
    }
    return module[part].state_dict()


def save_as(path, tensors, **notes):
    save_file(tensors, path, metadata={"format": "pt", **notes})
    return str(path)


def original(place, part, before=""):
    """The part's tensors by their names in the original layout, below ``before``."""
    whole = load_file(place / "other.safetensors")
    prefix = PREFIXES[part]
    return {before + n.removeprefix(prefix): t for n, t in whole.items() if n.startswith(prefix)}


def own(place, part, before=""):
    return {before + n: t for n, t in load_file(place / "other" / FILES[part]).items()}


def of_custom_diffusion(place):
    return {
        name.replace(".attn2.to_k.", ".attn2.processor.to_k_custom_diffusion."): tensor
        for name, tensor in own(place, "unet").items()
    }


def of_older_diffusers(place):
    older = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }
    tensors = own(place, "vae")
    for new, old in older.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    ("part", "given"),
    [
        ("unet", lambda place: own(place, "unet")),
        ("unet", lambda place: own(place, "unet", "unet.")),
        ("unet", lambda place: own(place, "unet", "module.")),
        ("unet", lambda place: original(place, "unet")),
        ("unet", lambda place: original(place, "unet", "model.diffusion_model.")),
        ("unet", lambda place: load_file(place / "other.safetensors")),
        ("unet", of_custom_diffusion),
        ("vae", lambda place: own(place, "vae")),
        ("vae", lambda place: {**original(place, "vae"), "loss.logvar": torch.ones(1)}),
        ("vae", of_older_diffusers),
        ("text_encoder", lambda place: own(place, "text_encoder")),
        ("text_encoder", lambda place: original(place, "text_encoder")),
        ("text_encoder", lambda place: {
            n.replace("text_model.", ""): t for n, t in original(place, "text_encoder").items()
        }),
    ],
)  # fmt: skip
def test_a_part_is_that_of_the_file_under_every_known_naming(place, states, tmp_path, part, given):
    file = save_as(tmp_path / "part.safetensors", given(place))
    model = load(place / "base", **{part: file})
    (found,) = model.replaced
    assert (found.part, found.replaced, found.source) == (part, found.total, "part.safetensors")
    for name in FILES:
        expected = states["other" if name == part else "base", name]
        assert all(torch.equal(expected[k], v) for k, v in state(model, name).items()), name


def test_a_parts_folder_is_the_part(place, states):
    model = load(place / "base", unet=str(place / "other"), vae=str(place / "other" / "vae"))
    assert [(found.part, found.source) for found in model.replaced] == [
        ("unet", "other"),
        ("vae", "other/vae"),
    ]
    for name in FILES:
        expected = states["base" if name == "text_encoder" else "other", name]
        assert all(torch.equal(expected[k], v) for k, v in state(model, name).items()), name


def test_names_that_are_missing_stay_the_bases(place, tmp_path):
    mended = {n: t for n, t in own(place, "unet").items() if "attn2" in n}
    base = own(place, "unet") | load_file(place / "base" / FILES["unet"])
    kept = next(iter(mended))
    mended[kept] = base[kept]
    model = load(place / "base", unet=save_as(tmp_path / "esd.safetensors", mended))
    held = state(model, "unet")
    assert all(torch.equal(held[n], mended.get(n, base[n])) for n in held)
    (found,) = model.replaced
    biases = {n for n in mended if torch.equal(mended[n], base[n])}
    assert (found.replaced, found.total) == (len(mended), len(base))
    assert found.changed == len(mended) - len(biases)
    assert model.fingerprint != load(place / "base").fingerprint


def unknown(tensors):
    return {**tensors, **{f"other.{k}": torch.ones(1) for k in range(7)}}


def misshapen(tensors):
    return tensors | {"conv_in.weight": torch.ones(3, 3)}


def not_finite(tensors):
    return tensors | {"conv_in.weight": tensors["conv_in.weight"] / 0}


def integers(tensors):
    return tensors | {"conv_in.weight": tensors["conv_in.weight"].to(torch.int8)}


def differences(tensors):
    torch.manual_seed(0)
    return {n: 1e-3 * torch.randn_like(t) for n, t in tensors.items() if "attn2" in n}


def of_nothing(_):
    return {"a": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unknown, r"7 are unexpected \(other.0, other.1, other.2, other.3, other.4, \.\.\.\)"),
        (misshapen, r"1 have another shape.* \(conv_in.weight 3 x 3 instead of 8 x 4 x 3 x 3\)"),
        (not_finite, "no finite numbers"),
        (integers, "1 have another shape or type"),
        (differences, "looks like differences"),
        (of_nothing, r"does not fit .* 1 are unexpected \(a\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(place, tmp_path, change, words):
    file = save_as(tmp_path / "x.safetensors", change(own(place, "unet")))
    with pytest.raises(InputError, match=words):
        load(place / "base", unet=file)


def test_another_parts_file_is_told_its_setting(place):
    file = str(place / "other" / FILES["vae"])
    with pytest.raises(InputError, match=r"checkpoint\.vae="):
        load(place / "base", unet=file)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nothing", "does not exist"),
        ("x.bin", "models.convert"),
        ("base/scheduler", "holds no weights"),
    ],
)
def test_a_place_without_weights_is_told(place, given, words):
    (place / "x.bin").write_bytes(b"\x80\x02}.")
    with pytest.raises(InputError, match=words):
        load(place / "base", unet=str(place / given))


def test_a_folders_configuration_must_be_the_bases(place, tmp_path):
    folder = write_tiny(tmp_path / "heads") / "unet"
    config = json.loads((folder / "config.json").read_text())
    config["attention_head_dim"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="attention_head_dim 4, the checkpoint has 2"):
        load(place / "base", unet=str(folder))


def test_the_prediction_type_can_be_chosen(place):
    model = load(place / "base", prediction_type="v_prediction")
    assert model.prediction_type == "v_prediction"
    assert load(place / "base").prediction_type == "epsilon"


def test_a_file_that_notes_another_prediction_type_is_not_believed_nor_ignored(
    place, tmp_path, caplog
):
    file = save_as(
        tmp_path / "v.safetensors", own(place, "unet"), **{"modelspec.prediction_type": "v"}
    )
    with pytest.raises(InputError, match=r"checkpoint\.prediction_type=v_prediction"):
        load(place / "base", unet=file)
    assert load(place / "base", unet=file, prediction_type="epsilon").prediction_type == "epsilon"
    assert "notes that the UNet predicts v_prediction" in caplog.text
    model = load(place / "base", unet=file, prediction_type="v_prediction")
    assert model.prediction_type == "v_prediction"


def test_the_scheduler_beside_a_unet_counts_as_its_note(place, tmp_path):
    other = write_tiny(tmp_path / "v", tiny_recipe(prediction_type="v_prediction"))
    for given in (other, other / "unet"):
        with pytest.raises(InputError, match=r"checkpoint\.prediction_type=v_prediction"):
            load(place / "base", unet=str(given))
    assert load(place / "base", vae=str(other)).prediction_type == "epsilon"


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_a_text_encoder_of_the_original_layout_is_put_in_place(tmp_path, hidden_act):
    """With exact GELU it is OpenCLIP's, whose queries, keys and values are one tensor."""
    for seed, name in enumerate(("base", "other")):
        config = write_tiny(tmp_path / name, seed=seed) / "text_encoder" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": hidden_act}))
    components = load(tmp_path / "other").components
    write_single(tmp_path / "other.safetensors", components, weights_of(components))
    model = load(tmp_path / "base", text_encoder=str(tmp_path / "other.safetensors"))
    held, given = state(model, "text_encoder"), components.text_encoder.state_dict()
    assert all(torch.equal(held[n], given[n]) for n in given)
