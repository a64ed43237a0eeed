import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from diffusers import SD3Transformer2DModel
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

from dori_lightning.models import loading
from dori_lightning.models.convert import convert
from dori_lightning.models.export import weights_of, write_folder
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.memory import PeakMemory
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import InputError
from support.families import folder_of, load_family, tiny_sd3
from support.tiny import tiny_recipe, write_tiny, write_tiny_single


@pytest.fixture
def folder(tmp_path):
    return write_tiny(tmp_path / "tiny")


def load(source: Path | str, **options: Any) -> StableDiffusion:
    return load_checkpoint(name="x", source=str(source), device="cpu", **options)


def test_the_fingerprint_is_of_the_weights(folder, tmp_path):
    first, again = load(folder), load(folder)
    other = load(write_tiny(tmp_path / "other", seed=1))
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "xpu", "cpu:x"])
def test_a_device_that_is_not_here_is_told(folder, device):
    with pytest.raises(InputError, match=r"(?s)no device.*where: checkpoint\.device.*=auto"):
        load_checkpoint(name="x", source=str(folder), device=device)


def test_a_pickle_only_folder_is_refused_with_the_command_that_converts_it(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    pickled = weights.with_suffix(".bin")
    torch.save(load_file(weights), pickled)
    weights.unlink()
    with pytest.raises(
        InputError, match=r"pickle.*python -m dori_lightning.models.convert"
    ) as caught:
        load(folder)
    assert str(pickled) in str(caught.value)
    assert convert(pickled, weights).tensors > 100
    assert load(folder).resolution == 32


def test_converting_refuses_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "evil.bin"
    torch.save({"x": Evil()}, path)
    with pytest.raises(InputError, match="not a plain file of tensors"):
        convert(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_classes_named_by_the_folder_are_ignored(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["os", "system"]
    index["_class_name"] = "EvilPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    assert type(load(folder).denoiser()).__name__ == "UNet2DConditionModel"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(folder, part):
    (folder / part).rename(folder / f"no_{part}")
    with pytest.raises(InputError, match=part):
        load(folder)


def test_a_truncated_weight_file_is_one_message(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="cut off") as refused:
        load(folder)
    assert str(path) in str(refused.value)


def test_a_text_encoder_of_another_width_is_refused(folder, tmp_path):
    other = write_tiny(tmp_path / "wide", tiny_recipe(text_width=16))
    (folder / "text_encoder").rename(folder / "old")
    (other / "text_encoder").rename(folder / "text_encoder")
    with pytest.raises(InputError, match=r"width 16.*takes 12"):
        load(folder)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("no/such/folder", "neither a diffusers folder"),
        ("model.ckpt", "pickle"),
        ("package:nothing", "not installed"),
    ],
)
def test_a_source_that_is_nothing_is_explained(source, named):
    with pytest.raises(InputError, match=named):
        load(source)


def test_half_precision_on_the_cpu_is_refused(folder):
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        load(folder, precision="fp16")


def test_channels_last_agrees(folder):
    torch.manual_seed(0)
    plain, last = load(folder), load(folder, channels_last=True)
    inputs = (torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.tensor([5, 900]))
    context = plain.encode_prompts(["a cat", "a boat"])
    with torch.no_grad():
        assert torch.allclose(
            plain.denoising_loss(*inputs, context),
            last.denoising_loss(*inputs, context),
            atol=1e-5,
        )


def test_weights_saved_in_half_precision_load_as_fp32(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    model = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.fixture
def single(tmp_path):
    """The checkpoint in ``folder`` as one file."""
    return write_tiny_single(tmp_path / "model.safetensors")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_single_file_is_the_same_checkpoint(tmp_path, prediction_type):
    recipe = tiny_recipe(prediction_type=prediction_type)
    folder = write_tiny(tmp_path / "tiny", recipe)
    path = write_tiny_single(tmp_path / "model.safetensors", recipe)
    keys = set(load_file(path))
    assert "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight" in keys
    assert "first_stage_model.decoder.mid.attn_1.q.weight" in keys
    model = load(path, config=str(folder))
    assert model.fingerprint == load(folder).fingerprint
    assert model.prediction_type == prediction_type


def test_a_single_file_with_the_text_encoders_older_names_is_the_same(folder, single):
    newer, older = (f"cond_stage_model.transformer.{name}" for name in ("text_model.", ""))
    state = {name.replace(newer, older): tensor for name, tensor in load_file(single).items()}
    assert f"{older}embeddings.token_embedding.weight" in state
    save_file(state, single, metadata={"format": "pt"})
    assert load(single, config=str(folder)).fingerprint == load(folder).fingerprint


@pytest.mark.parametrize("prediction_type", [None, "epsilon", "v_prediction"])
def test_a_single_file_that_notes_another_prediction_type_needs_a_word(
    folder, prediction_type, single
):
    save_file(load_file(single), single, metadata={"modelspec.prediction_type": "v"})
    if prediction_type is None:
        with pytest.raises(InputError, match=r"checkpoint\.prediction_type=v_prediction"):
            load(single, config=str(folder))
        return
    model = load(single, config=str(folder), prediction_type=prediction_type)
    assert model.prediction_type == prediction_type


def test_a_single_file_without_configuration_says_what_to_give(folder, single):
    with pytest.raises(InputError, match=r"checkpoint\.config="):
        load(single)


def test_a_single_file_with_a_part_missing_names_it(folder, single):
    state = {k: v for k, v in load_file(single).items() if not k.startswith("first_stage_model")}
    save_file(state, single, metadata={"format": "pt"})
    with pytest.raises(InputError, match="has no autoencoder"):
        load(single, config=str(folder))


def test_a_single_file_of_another_architecture_is_refused(folder, tmp_path, single):
    other = write_tiny(tmp_path / "wide", tiny_recipe(text_width=16))
    with pytest.raises(InputError, match="does not load with the configuration"):
        load(single, config=str(other))


# --- tensors: missing, unexpected, of another shape


def weights_of_part(folder: Path, part: str) -> Path:
    (path,) = (folder / part).glob("*.safetensors")
    return path


def rewrite(path: Path, change: Any) -> None:
    """Write a weight file again after ``change(tensors)``."""
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("kind", ["missing", "unexpected", "of another shape"])
def test_tensors_that_a_configuration_does_not_ask_for_are_refused_and_named(folder, part, kind):
    path = weights_of_part(folder, part)
    names = sorted(load_file(path))[:7]

    def change(state):
        for name in names:
            tensor = state[name] if kind == "unexpected" else state.pop(name)
            if kind == "unexpected":
                state[f"extra.{name}"] = tensor.clone()
            elif kind == "of another shape":
                state[name] = torch.zeros(*tensor.shape, 2)

    rewrite(path, change)
    with pytest.raises(InputError) as refused:
        load(folder)
    said = str(refused.value)
    words = {"missing": " are missing", "unexpected": "7 are unexpected"}
    assert words.get(kind, "7 have another shape") in said
    assert str(path) in said
    assert str(folder / part / "config.json") in said
    assert sum(name.removeprefix("text_model.") in said for name in names) == 5
    assert said.count(", ...") == 1


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_so_are_those_of_a_hub_id_of_which_only_what_is_needed_is_fetched(
    folder, monkeypatch, variant
):
    before = load(folder).fingerprint
    for part in ("unet", "vae", "text_encoder"):
        path = weights_of_part(folder, part)
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
        shutil.copy(path, path.with_suffix(".non_ema.safetensors"))
    held = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    asked: list[tuple[str, str]] = []

    def fetch(source, *, revision, allow_patterns):
        asked.append((source, revision))
        for name in held:
            if not any(fnmatch(name, pattern) for pattern in allow_patterns):
                (folder / name).unlink(missing_ok=True)
        return str(folder)

    monkeypatch.setattr(loading, "snapshot_download", fetch)
    model = load("owner/model", revision="abc", variant=variant)
    assert asked == [("owner/model", "abc")]
    assert model.fingerprint == before
    for part in ("unet", "vae", "text_encoder"):
        assert weights_of_part(folder, part).suffixes[:-1] == ([".fp16"] if variant else [])
    name = next(iter(load_file(weights_of_part(folder, "vae"))))
    rewrite(weights_of_part(folder, "vae"), lambda state: state.pop(name))
    with pytest.raises(InputError, match=rf"1 of .* are missing \({name}\)"):
        load("owner/model", variant=variant)


@pytest.mark.parametrize("filed", ["bf16", "fp16", "fp32"])
def test_loading_takes_no_more_memory_than_weights_are_kept_in(tmp_path, monkeypatch, filed):
    components = tiny_sd3()
    config = {**components.denoiser.config, "num_layers": 12, "_use_default_values": []}
    deep = SD3Transformer2DModel.from_config(config)
    components = components.with_module("transformer", deep)
    weights = weights_of(components, filed)
    write_folder(tmp_path, components, weights)
    # activations of small models take more than their weights
    monkeypatch.setattr(loading, "check_answers", lambda *_: None)
    loaded, peaks = {}, {}
    for storage in ("fp32", "bf16"):
        with PeakMemory() as memory:
            loaded[storage] = load_family(
                "sd3", source=str(tmp_path), storage=storage, precision="auto"
            )
        peaks[storage] = memory.peak
        assert loaded[storage].fingerprint == weights.fingerprint
    sizes = {
        name: [tensor.numel() for tensor in state.values()]
        for name, state in weights.states.items()
        if name != "vae"
    }
    for name in sizes:
        exact = loaded["fp32"].components.modules[name].state_dict()
        for key, tensor in loaded["bf16"].components.modules[name].state_dict().items():
            assert torch.equal(tensor, exact[key].bfloat16()), f"{name}: {key}"
    # tensors that are read as they are filed are the file's pages, which are counted here, too
    count, largest = sum(map(sum, sizes.values())), max(map(max, sizes.values()))
    less = 0 if filed == "fp32" else 2 * count
    # what else is in memory at the peak is as large as some tensors
    assert peaks["bf16"] <= peaks["fp32"] - less + 16 * largest, (peaks, less, largest)


@pytest.mark.parametrize("revision", ["main", None, "c" * 40])
def test_a_hub_id_without_a_commit_is_told_which_one_it_got(
    folder, tmp_path, monkeypatch, caplog, revision
):
    snapshot = shutil.copytree(folder, tmp_path / "snapshots" / ("c" * 40))
    monkeypatch.setattr(loading, "snapshot_download", lambda *_, **__: str(snapshot))
    model = load("owner/model", revision=revision)
    assert model.commit == "c" * 40
    said = [r.getMessage() for r in caplog.records if "not pinned" in r.getMessage()]
    assert len(said) == (revision in ("main", None))
    assert all(f"checkpoint.revision={'c' * 40}" in one for one in said)
    assert load(folder).commit is None


def test_a_gated_hub_id_is_told_as_such(monkeypatch):
    def fetch(*_, **__):
        raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "")))

    monkeypatch.setattr(loading, "snapshot_download", fetch)
    with pytest.raises(InputError, match=r"is gated(.|\n)*huggingface\.co/owner/model, then hf"):
        load("owner/model")


@pytest.mark.parametrize(("own", "wrong"), [("sdxl", "sd"), ("sd", "sdxl"), ("flux", "sd3")])
def test_a_folder_of_another_family_is_told_by_what_is_in_it(own, wrong, tmp_path):
    folder = shutil.copytree(folder_of(own), tmp_path / own)
    for named in (True, False):
        with pytest.raises(InputError, match=rf"checkpoint\.family={own}$"):
            load_family(wrong, source=str(folder))
        assert load_family(own, source=str(folder)).family.name == own
        if named:
            (folder / "model_index.json").unlink()


def test_the_denoisers_class_tells_another_family(folder):
    shutil.move(folder / "unet", folder / "transformer")
    shutil.copytree(folder / "text_encoder", folder / "text_encoder_2")
    config = folder / "transformer" / "config.json"
    held = {**json.loads(config.read_text()), "_class_name": "SD3Transformer2DModel"}
    config.write_text(json.dumps(held))
    with pytest.raises(InputError, match=r"checkpoint\.family=sd3"):
        load(folder, family="sdxl")


def test_a_text_encoder_under_another_prefix_is_refused(folder):
    path = weights_of_part(folder, "text_encoder")
    state = {f"clip.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    count = len(state)
    with pytest.raises(InputError, match=f"{count} of {count} are missing.*{count} are unexpec"):
        load(folder)


def test_a_unet_without_its_mid_block_is_refused(folder):
    def change(state):
        for name in [name for name in state if name.startswith("mid_block")]:
            del state[name]

    rewrite(weights_of_part(folder, "unet"), change)
    with pytest.raises(InputError, match=r"are missing \(mid_block\..*, \.\.\.\)"):
        load(folder)


def test_extras_of_known_programs_are_accepted(folder):
    before = load(folder).fingerprint
    for part, extras in (
        ("text_encoder", ["text_model.embeddings.position_ids", "logit_scale",
                          "text_projection.weight", "vision_model.post_layernorm.weight"]),
        ("vae", ["loss.logvar", "model_ema.decay"]),
    ):  # fmt: skip
        more = {name: torch.ones(1) for name in extras}
        rewrite(weights_of_part(folder, part), lambda state, more=more: state.update(more))
    assert load(folder).fingerprint == before


def test_a_text_encoder_without_the_older_prefix_and_an_old_autoencoder_are_the_same(folder):
    before = load(folder).fingerprint
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(state):
        for name in [n for n in state if ".mid_block.attentions.0.to_" in n]:
            new = next(new for new in old if f".{new}." in name)
            state[name.replace(new, old[new])] = state.pop(name)

    def modernize(state):
        for name in list(state):
            state[name.removeprefix("text_model.")] = state.pop(name)

    rewrite(weights_of_part(folder, "vae"), age)
    rewrite(weights_of_part(folder, "text_encoder"), modernize)
    assert load(folder).fingerprint == before


def test_a_shard_without_a_tensor_of_the_index_is_refused(folder):
    path = weights_of_part(folder, "unet")
    state = load_file(path)
    names = sorted(state)
    stem = "diffusion_pytorch_model"
    shards = {f"{stem}-{k + 1:05}-of-00002.safetensors": names[k::2] for k in range(2)}
    index = {name: shard for shard, own in shards.items() for name in own}
    (folder / "unet" / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    for shard, own in shards.items():
        save_file({n: state[n] for n in own}, folder / "unet" / shard, metadata={"format": "pt"})
    before = load(folder).fingerprint
    path.unlink()
    assert load(folder).fingerprint == before
    lost = next(iter(shards))
    rewrite(folder / "unet" / lost, lambda state: state.pop(names[0]))
    with pytest.raises(InputError, match=r"1 of .* are missing"):
        load(folder)
    (folder / "unet" / lost).unlink()
    with pytest.raises(InputError, match="are missing"):
        load(folder)


@pytest.mark.parametrize(
    "part", ["model.diffusion_model", "first_stage_model", "cond_stage_model"]
)
@pytest.mark.parametrize("kind", ["missing", "unexpected", "of another shape"])
def test_the_tensors_of_a_single_file_are_checked_too(folder, part, kind, single):
    name = next(n for n in load_file(single) if n.startswith(part) and n.endswith("bias"))

    def change(state):
        if kind == "unexpected":
            state[f"{part}.extra"] = torch.zeros(1)
        else:
            tensor = state.pop(name)
            if kind != "missing":
                state[name] = torch.zeros(len(tensor) + 1)

    rewrite(single, change)
    with pytest.raises(InputError) as refused:
        load(single, config=str(folder))
    said = str(refused.value)
    assert (f"{part}.extra" if kind == "unexpected" else name) in said
    assert str(single) in said


def test_extras_of_a_single_file_are_accepted(folder, single):
    extras = ("model_ema.decay", "betas", "first_stage_model.loss.logvar",
              "cond_stage_model.transformer.text_model.embeddings.position_ids",
              "cond_stage_model.logit_scale")  # fmt: skip
    more = {name: torch.zeros(1) for name in extras}
    rewrite(single, lambda state: state.update(more))
    assert load(single, config=str(folder)).fingerprint == load(folder).fingerprint


# --- each part is itself, and they fit


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}))


def test_a_tokenizer_without_its_vocabulary_is_refused(folder):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"knows . tokens, but the text encoder(.|\n)*json"):
        load(folder)


def test_a_tokenizer_without_its_merges_is_refused(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    model = json.loads(path.read_text("utf-8"))["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = folder / "tokenizer" / "merges.txt"
    merges.write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]) + "\n")
    before = load(folder).fingerprint
    path.unlink()
    assert load(folder).fingerprint == before
    merges.unlink()
    with pytest.raises(InputError, match=r"merges\.txt"):
        load(folder)


def test_a_tokenizer_with_more_tokens_than_the_encoder_is_refused(folder):
    path = folder / "tokenizer" / "tokenizer.json"
    held = json.loads(path.read_text("utf-8"))
    last = max(held["model"]["vocab"].values())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    held["added_tokens"].append({**added, "id": last + 1, "content": "<new>", "special": True})
    held["model"]["vocab"]["<new>"] = last + 1
    path.write_text(json.dumps(held))
    with pytest.raises(InputError, match=r"knows \d+ tokens, but the text encoder has"):
        load(folder)


def test_a_text_encoder_that_hears_nothing_is_refused(folder):
    def deafen(state):
        for tensor in state.values():
            tensor.zero_()

    rewrite(weights_of_part(folder, "text_encoder"), deafen)
    with pytest.raises(InputError, match="the same embedding"):
        load(folder)


def test_weights_that_are_no_numbers_are_refused(folder):
    rewrite(weights_of_part(folder, "unet"), lambda state: state["conv_out.bias"].fill_(torch.nan))
    with pytest.raises(InputError, match="the UNet gives no numbers"):
        load(folder)


def test_an_inpainting_unet_is_refused(folder):
    change_json(folder / "unet" / "config.json", in_channels=9)

    def widen(state):
        state["conv_in.weight"] = torch.zeros(8, 9, 3, 3)

    rewrite(weights_of_part(folder, "unet"), widen)
    with pytest.raises(InputError, match=r"takes 9 channels and gives 4.*inpainting"):
        load(folder)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("class_embed_type", "identity"), ("addition_embed_type", "text_image")],
)
def test_a_unet_that_asks_for_more_than_text_is_refused(folder, setting, value):
    change_json(folder / "unet" / "config.json", **{setting: value})
    with pytest.raises(InputError, match=r"unet.config\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("vae/config.json", {"scaling_factor": 0}),
        ("vae/config.json", {"scaling_factor": "much"}),
        ("unet/config.json", {"sample_size": 0}),
        ("unet/config.json", {"sample_size": "large"}),
        ("unet/config.json", {"norm_num_groups": 3}),
        ("text_encoder/config.json", {"hidden_size": 24}),
        ("text_encoder/config.json", {"hidden_act": "loud"}),
        ("text_encoder/config.json", {"return_dict": False}),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}),
        ("scheduler/scheduler_config.json", {"beta_end": 2.0}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "none"}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "wide"}),
        ("scheduler/scheduler_config.json", {"steps_offset": 60}),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}),
        ("scheduler/scheduler_config.json", {"algorithm_type": "none"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "long"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 1}),
        ("tokenizer/tokenizer_config.json", {"bos_token": "<new>"}),
    ],
)
def test_a_value_that_cannot_be_is_one_message_with_the_file(folder, file, values):
    change_json(folder / file, **values)
    with pytest.raises(InputError) as refused:
        load(folder)
    assert file.partition("/")[0] in str(refused.value)


def test_a_load_counts_no_evaluation_and_leaves_the_random_state(folder):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = load(folder)
    assert torch.equal(torch.rand(1), expected)
    assert model.unet_evaluations == 0
