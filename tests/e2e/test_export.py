import json
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from dori_lightning.mitigations.edits import (
    Edit,
    MaskEdit,
    Origin,
    PairMaskEdit,
    WeightEdit,
    read_edit,
    write_edit,
)
from dori_lightning.models.export import weights_of, write_folder
from dori_lightning.models.generation import generation_noise
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.protocol import Sampling
from dori_lightning.tasks import export as export_task
from dori_lightning.types import InputError
from support.runs import SMALL, on_tiny, run_task, write_pairs
from support.tiny import tiny_model

HERE = "test_export"


def value_rows(model, share):
    names = [f"{name}.weight" for name in model.layers("cross_attention.value")]
    return {name: torch.arange(8) < 8 * share for name in names}


@dataclass(frozen=True)
class Pruned:
    """Blocks a share of all value neurons, for everybody."""

    name: str = "pruned"
    share: float = 0.5

    def apply(self, model, pairs, context):
        return MaskEdit(Origin(model.fingerprint), value_rows(model, self.share))


@dataclass(frozen=True)
class PrunedPerPair:
    """Blocks other neurons for each pair."""

    name: str = "pruned_per_pair"

    def apply(self, model, pairs, context):
        shares = {pair.id: 0.25 * (k + 1) for k, pair in enumerate(pairs)}
        masks = {name: value_rows(model, share) for name, share in shares.items()}
        return PairMaskEdit(Origin(model.fingerprint), masks)


@dataclass(frozen=True)
class Trained:
    """Changes a layer by less than half precision can hold."""

    name: str = "trained"

    def apply(self, model, pairs, context):
        name = "conv_in.weight"
        before = dict(model.denoiser().named_parameters())[name].detach()
        return WeightEdit(Origin(model.fingerprint), {name: before * 1.0001})


@dataclass(frozen=True)
class AtInference:
    """Changes no weight."""

    name: str = "at_inference"

    def apply(self, model, pairs, context):
        @dataclass(frozen=True)
        class Filter(Edit):
            origin: Origin | None = None

            @contextmanager
            def applied(self, model):
                yield

        return Filter()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A checkpoint in half precision, as published ones are, and pairs."""
    place = tmp_path_factory.mktemp("material")
    made = tiny_model(place / "fp32").components
    write_folder(place / "checkpoint", made, weights_of(made, "fp16"))
    write_pairs(place / "pairs")
    return place


def export(material, folder, *more, mitigation=None, task="export"):
    chosen = (
        [f"mitigation._target_={HERE}.{mitigation.__name__}", f"mitigation.name={mitigation.name}"]
        if mitigation
        else []
    )
    run_task(folder, f"task={task}", *on_tiny(material, "corpus=none", *chosen, *more))
    return folder


def load(source, config=None):
    return load_checkpoint(
        name="x", source=str(source), config=config and str(config), device="cpu"
    )


@pytest.fixture(scope="module")
def original(material):
    return load(material / "checkpoint")


def images(model):
    noise = torch.stack([generation_noise(k, model.latent_shape) for k in range(2)])
    prompts = model.encode_prompts(["a red boat", "a cat at night"])
    return model.generate(prompts, noise, Sampling("ddim", 2, 2.0, 1))


def same_weights(first, second):
    a, b = first.denoiser().state_dict(), second.denoiser().state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def dtypes(path):
    with safe_open(path, framework="pt") as file:
        return {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def left_over(folder):
    known = {"diffusers", "method.json", "edit.safetensors", ".export.lock"}
    files = [path.name for path in folder.iterdir() if path.name not in known]
    return [name for name in files if not name.startswith("tiny-") or "partial" in name]


def test_without_an_edit_both_forms_draw_the_same_images_bit_for_bit(material, original, tmp_path):
    folder = export(material, tmp_path / "run")
    diffusers, single = folder / "diffusers", folder / "tiny-none.safetensors"
    assert not left_over(folder)
    assert not (folder / "edit.safetensors").exists()
    assert dtypes(single) == {"F16"}
    expected = images(original)
    for model in (load(diffusers), load(single, diffusers)):
        assert model.fingerprint == original.fingerprint
        assert torch.equal(images(model), expected)
    card = (diffusers / "README.md").read_text()
    assert "Nothing: no weight differs" in card
    assert "was not audited" in card
    assert original.fingerprint in card
    assert str(material) not in card
    assert set(yaml.safe_load(card[4:].partition("\n---\n")[0])) == {
        "library_name",
        "pipeline_tag",
        "tags",
    }


def test_an_edit_is_in_the_weights_of_both_forms_bit_for_bit(material, original, tmp_path):
    folder = export(material, tmp_path / "run", mitigation=Pruned)
    diffusers, single = folder / "diffusers", folder / "tiny-pruned.safetensors"
    edit = read_edit(folder / "edit.safetensors")
    plain = images(original)
    assert edit.origin is not None
    with edit.applied(original):
        expected = images(original)
        assert not torch.equal(expected, plain)
        for model in (load(diffusers), load(single, diffusers)):
            assert same_weights(model, original)
            assert torch.equal(images(model), expected)
    assert model.fingerprint != original.fingerprint
    with safe_open(single, framework="pt") as file:
        note = json.loads(file.metadata()["dori_lightning"])
    assert note == {
        "fingerprint": model.fingerprint,
        "original": original.fingerprint,
        "edit": edit.identity,
    }
    card = (diffusers / "README.md").read_text()
    for part in (original.fingerprint, model.fingerprint, edit.identity, "pruned"):
        assert part in card
    assert "changed 768 weights in 16 tensors" in card, "4 of 8 neurons x 12 inputs x 16 layers"
    assert "2 of kind vm" in card
    pipeline = StableDiffusionPipeline.from_pretrained(
        diffusers, safety_checker=None, local_files_only=True
    )
    loaded = pipeline.unet.state_dict()
    assert all(torch.equal(t, loaded[n]) for n, t in model.denoiser().state_dict().items())


def test_trained_weights_that_half_precision_would_round_are_kept_exactly(
    material, original, tmp_path
):
    folder = export(material, tmp_path / "run", mitigation=Trained)
    assert dtypes(folder / "diffusers/unet/diffusion_pytorch_model.safetensors") == {"F32"}
    assert dtypes(folder / "diffusers/vae/diffusion_pytorch_model.safetensors") == {"F16"}
    assert dtypes(folder / "tiny-trained.safetensors") == {"F16", "F32"}
    with read_edit(folder / "edit.safetensors").applied(original):
        assert same_weights(load(folder / "diffusers"), original)
    card = (folder / "diffusers" / "README.md").read_text()
    assert "unet fp32, vae fp16, text_encoder fp16; every weight has exactly" in card

    half = export(material, tmp_path / "half", "task.dtype=fp16", mitigation=Trained)
    assert dtypes(half / "tiny-trained.safetensors") == {"F16"}
    assert "weights were rounded" in (half / "diffusers" / "README.md").read_text()


def test_an_edit_file_gives_the_export_that_its_mitigation_gives(material, tmp_path):
    made = export(material, tmp_path / "made", mitigation=Pruned)
    edit = made / "edit.safetensors"
    # the pairs that the edit was made for are not needed
    again = export(material, tmp_path / "again", f"task.edit={edit}", "pairs.path=no/such/folder")
    for name in ("diffusers/unet/diffusion_pytorch_model.safetensors", "tiny-pruned.safetensors"):
        assert (made / name).read_bytes() == (again / name).read_bytes()


def test_an_edit_of_another_checkpoint_is_refused_and_both_are_named(material, original, tmp_path):
    edit = MaskEdit(Origin("another", mitigation="nemo"), value_rows(original, 0.5))
    path = write_edit(tmp_path / "edit.safetensors", edit)
    with pytest.raises(
        InputError, match=f"fingerprint another, but tiny has {original.fingerprint}"
    ):
        export(material, tmp_path / "run", f"task.edit={path}")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="cannot read the edit"):
        export(material, tmp_path / "run", f"task.edit={tmp_path / 'nothing'}")


def test_an_edit_per_pair_needs_a_pair_or_a_union(material, original, tmp_path):
    with pytest.raises(InputError, match=r"each of 2 pairs") as caught:
        export(material, tmp_path / "run", mitigation=PrunedPerPair)
    assert "task.pair=ID" in str(caught.value)
    assert "nemo_union" in str(caught.value)
    with pytest.raises(InputError, match="no masks of the pair pair9") as caught:
        export(material, tmp_path / "run", "task.pair=pair9", mitigation=PrunedPerPair)
    assert "one of pair0, pair1" in str(caught.value)
    with pytest.raises(InputError, match="one edit for all pairs"):
        export(material, tmp_path / "run", "task.pair=pair0", mitigation=Pruned)
    assert not (tmp_path / "run").exists()

    folder = export(material, tmp_path / "run", "task.pair=pair1", mitigation=PrunedPerPair)
    edit = read_edit(folder / "edit.safetensors")
    assert isinstance(edit, MaskEdit)
    assert set(edit.counts().values()) == {4}
    with edit.applied(original):
        assert same_weights(load(folder / "diffusers"), original)
    assert "those of pair1 are in this checkpoint" in (folder / "diffusers/README.md").read_text()


def test_what_changes_no_weight_cannot_be_exported(material, tmp_path):
    with pytest.raises(InputError, match="at_inference changes how images"):
        export(material, tmp_path / "run", mitigation=AtInference)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("task.formats=[]", "task.formats"),
        ("task.formats=[diffusers,ckpt]", "task.formats"),
        ("task.dtype=half", "task.dtype"),
        ("task.audit=no/such/run", "cannot read"),
        ("task.edit=no/such/edit", "cannot read the edit"),
    ],
)
def test_impossible_settings_are_refused_before_the_checkpoint_is_read(
    material, tmp_path, override, named
):
    with pytest.raises(InputError, match=named):
        export(material, tmp_path / "run", override, "checkpoint.source=no/such/checkpoint")


def test_one_form_alone_has_its_card_beside_it(material, tmp_path):
    folder = export(material, tmp_path / "run", "task.formats=single_file")
    assert not (folder / "diffusers").exists()
    assert left_over(folder) == ["README.md"]
    assert load(folder / "tiny-none.safetensors", material / "checkpoint").resolution == 32


def test_a_failure_leaves_nothing_half_written_and_the_next_run_finishes(
    material, original, tmp_path, monkeypatch
):
    real, calls = export_task.check_written, []

    def fails(source, *args, **options):
        calls.append(source)
        if len(calls) == 2:  # the single file, once the folder is done
            raise OSError(28, "No space left on device")
        real(source, *args, **options)

    monkeypatch.setattr(export_task, "check_written", fails)
    before = {n: t.clone() for n, t in original.denoiser().state_dict().items()}
    with pytest.raises(OSError, match="No space left"):
        export(material, tmp_path / "run", mitigation=Pruned)
    folder = tmp_path / "run"
    assert not left_over(folder)
    assert not list(folder.glob("tiny-*"))
    done = folder / "diffusers/unet/diffusion_pytorch_model.safetensors"
    time = done.stat().st_mtime_ns

    (folder / ".partial-tiny-pruned.safetensors").write_bytes(b"of a killed run")
    export(material, folder, mitigation=Pruned)
    assert not left_over(folder)
    assert done.stat().st_mtime_ns == time, "what was complete is left"
    assert len(calls) == 3
    finished = load(folder / "tiny-pruned.safetensors", folder / "diffusers")
    assert finished.fingerprint == load(folder / "diffusers").fingerprint
    assert all(torch.equal(before[n], t) for n, t in original.denoiser().state_dict().items())


def test_a_folder_with_another_export_is_refused_by_what_differs(material, tmp_path):
    folder = export(material, tmp_path / "run", "task.formats=[diffusers]", mitigation=Pruned)
    with pytest.raises(InputError, match=r"edit\.identity"):
        export(material, folder, "+mitigation.share=0.25", mitigation=Pruned)
    with pytest.raises(InputError, match=r"exported\.dtype: None there, 'bf16' now"):
        export(material, folder, "task.dtype=bf16", mitigation=Pruned)
    export(material, folder, mitigation=Pruned)
    assert (folder / "tiny-pruned.safetensors").is_file(), "a further form may join"


def test_the_card_carries_the_audit_of_this_edit_and_refuses_another(material, tmp_path):
    audit = export(material, tmp_path / "audit", *SMALL, mitigation=Pruned, task="audit")
    folder = export(material, tmp_path / "run", *SMALL, mitigation=Pruned)
    weights = folder / "diffusers/unet/diffusion_pytorch_model.safetensors"
    time = weights.stat().st_mtime_ns
    assert "was not audited" in (folder / "diffusers/README.md").read_text()
    found = list((tmp_path / "cache" / "edits").glob("*.safetensors"))
    assert len(found) == 1, "the export uses the edit that the audit made"

    export(material, folder, *SMALL, f"task.audit={audit}", mitigation=Pruned)
    card = (folder / "diffusers/README.md").read_text()
    assert "was not audited" not in card
    assert "| pruned | vm | prompt |" in card
    assert "| pruned | control | dori |" in card
    assert "above 0.50 by local_correlation (threshold fixed)" in card
    assert "a red boat on sea" not in card, "prompts stay out"
    assert weights.stat().st_mtime_ns == time, "the weights are left"

    with pytest.raises(InputError, match=r"is the audit of checkpoint .* under edit") as caught:
        export(material, tmp_path / "other", *SMALL, f"task.audit={audit}")
    assert json.loads((audit / "edit.json").read_text())["identity"] in str(caught.value)
    assert not (tmp_path / "other" / "diffusers").exists()

    exported = f"checkpoint.source={folder / 'diffusers'}"
    direct = export(material, tmp_path / "direct", *SMALL, exported, task="audit")
    export(material, folder, *SMALL, f"task.audit={direct}", mitigation=Pruned)
    assert "\n| vm | prompt |" in (folder / "diffusers/README.md").read_text()


def test_the_command_line_exports(material, tmp_path, run, capsys):
    command = on_tiny(material, "corpus=none", f"paths.output={tmp_path}", "name=run")
    assert run("task=export", *command, task=None) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "run")]
    assert (tmp_path / "run" / "diffusers" / "model_index.json").is_file()
