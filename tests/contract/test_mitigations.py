"""What every mitigation promises, checked for every file in conf/mitigation.

A new mitigation is one Python file and one yaml; it is found here by itself.
"""

import dataclasses
import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

import dori_lightning.mitigations
from dori_lightning import config
from dori_lightning.mitigations.base import Context, check_family, settings_fingerprint
from dori_lightning.mitigations.edits import read_edit, write_edit
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.types import InputError, Pair
from support.context import make_context, read_pairs
from support.devices import on_gpu
from support.families import FAMILIES, load_family
from support.runs import SMALL as SMALL_AUDIT
from support.runs import configuration, on_tiny, run_task, write_material
from support.silence import no_silent_stage
from support.tiny import tiny_model
from support.unchanged import unchanged

NAMES = sorted(file.stem for file in (config.CONF / "mitigation").glob("*.yaml"))

#: Presets that differ in a setting or two from one that the quick tests check.
VARIANTS = {
    "adversarial_finetuning_cheap",
    "adversarial_finetuning_lora",
    "esd_u",
    "nemo_all_layers",
    "nemo_union",
    "random_pruning_nemo",
}

#: Largest value of a setting that decides how long a mitigation takes; results are not judged.
SMALL = {
    "adversarial_batch": 2, "anchors": 2, "batch": 2, "candidates": 2, "draws": 2, "epochs": 1,
    "examples": 4, "images": 2, "iterations": 2, "noise_batch": 2, "ordinary_batch": 2,
    "ordinary_examples": 4, "per_pair": 2, "pictures": 2, "prompts": 4, "samples": 2,
    "sampling_steps": 4, "statistics_prompts": 8, "steps": 2, "threshold_prompts": 4,
    "updates": 2,
}  # fmt: skip


def small(thing: Any) -> Any:
    """The same mitigation with as little work as its settings allow."""
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return thing
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(thing):
        value = getattr(thing, item.name)
        if item.name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            changes[item.name] = min(value, SMALL[item.name])
        elif item.name == "fraction":
            changes[item.name] = max(value, 0.1)  # 1 % of a tiny layer is no weight at all
        elif item.name == "max_similarity":
            changes[item.name] = 0.99  # a tiny model's images all look alike
        elif item.name == "refine_group":
            changes[item.name] = 16
        elif item.name == "z_step":
            changes[item.name] = 2.0  # few levels
        elif item.name == "layers":
            changes[item.name] = None  # those that are tuned are one checkpoint's
        elif item.name == "snapshots":
            changes[item.name] = ()
        elif dataclasses.is_dataclass(value):
            changes[item.name] = small(value)
    return dataclasses.replace(thing, **changes)


@cache
def mitigation_of(name: str) -> Any:
    return small(instantiate(configuration(f"mitigation={name}").mitigation))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return read_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One for all: what is checked first is that a mitigation leaves it as it was."""
    return tiny_model(tmp_path_factory.mktemp("model"))


class Guarded:
    """Encoded pairs that refuse to give those a mitigation was not handed."""

    def __init__(self, data: Any, allowed: set[str]) -> None:
        self.data, self.allowed = data, allowed

    def encoded(self, pair: Pair) -> Any:
        assert pair.id in self.allowed, f"read {pair.id}, which it was not given"
        return self.data.encoded(pair)

    def batch(self, pairs: Any) -> Any:
        for pair in pairs:
            assert pair.id in self.allowed, f"read {pair.id}, which it was not given"
        return self.data.batch(pairs)


def guarded_context(
    folder: Path, model: StableDiffusion, pairs: tuple[Pair, ...], *, seed: int = 0
) -> tuple[Context, list[Pair]]:
    """A context that hands out suspected pairs and calibration examples only."""
    distilled = 1.0 if model.takes_distilled_guidance else None
    sampling = Sampling(model.samplers[0], 2, 2.0, 2, batch=8, distilled_guidance=distilled)
    context = make_context(folder, model, pairs, seed=seed, sampling=sampling)
    suspected = [pair for pair in pairs if pair.kind != "control"]
    data: Any = Guarded(context.data, {pair.id for pair in suspected})
    return dataclasses.replace(context, data=data), suspected


def test_there_are_mitigations():
    assert {"none", "nemo", "wanda", "random_pruning", "adversarial_finetuning"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_the_files_and_settings_are_plain(name):
    made = mitigation_of(name)
    assert made.name == name
    assert settings_fingerprint(made)["name"] == name


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in VARIANTS else ()) for n in NAMES]
)
def test_contract(name, tmp_path, model, pairs):
    check_defined(name, "sd", tmp_path, model, pairs)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "sd"])
@pytest.mark.parametrize("name", NAMES)
def test_contract_of_every_family(name, family, tmp_path, pairs):
    check_defined(name, family, tmp_path, load_family(family), pairs)


def check_defined(name: str, family: str, tmp_path: Path, model: Any, pairs: Any) -> None:
    """Kept, or refused in one message before anything is changed."""
    if name not in FAMILIES[family].undefined:
        check_contract(mitigation_of(name), tmp_path, model, pairs)
        return
    context, suspected = guarded_context(tmp_path, model, pairs)
    with pytest.raises(InputError), unchanged(model):
        mitigation_of(name).apply(model, suspected, context)
    with pytest.raises(InputError):
        check_family(mitigation_of(name), family)


@on_gpu
@pytest.mark.parametrize("name", sorted({*NAMES} - FAMILIES["sd"].undefined))
def test_contract_on_a_gpu(name, tmp_path, pairs):
    """Equal bits are promised there in deterministic mode alone."""
    model = tiny_model(tmp_path / "model", device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        check_contract(mitigation_of(name), tmp_path, model, pairs)
    finally:
        torch.use_deterministic_algorithms(False)


def check_contract(
    mitigation: Any, tmp_path: Path, model: StableDiffusion, pairs: tuple[Pair, ...]
) -> None:
    """Deterministic, shows progress, reads only what it may, counts right, leaves no trace."""
    context, suspected = guarded_context(tmp_path / "first", model, pairs)
    model.denoiser().train()
    with unchanged(model), no_silent_stage():
        edit = mitigation.apply(model, suspected, context)
    model.denoiser().eval()

    # the same seed gives the same edit, wherever it is made
    again, _ = guarded_context(tmp_path / "second", model, pairs)
    assert mitigation.apply(model, suspected, again).identity == edit.identity

    encoded = context.data.batch(suspected)
    latents, embeddings = encoded.latents.to(model.device), encoded.embeddings.to(model.device)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    ids = [pair.id for pair in suspected]
    before = {name: p.detach().clone() for name, p in model.denoiser().named_parameters()}
    with unchanged(model), edit.applied(model):
        inside = dict(model.denoiser().named_parameters())
        assert inside.keys() == before.keys()
        changed = {key: int((value != before[key]).sum()) for key, value in inside.items()}
        assert all(value.isfinite().all() for value in inside.values())
        assert all(inside[k].shape == v.shape for k, v in before.items())
        with torch.no_grad():
            loss = model.denoising_loss(
                latents,
                noise,
                torch.full((len(ids),), 500, device=model.device),
                embeddings,
                pair_ids=ids,
            )
        assert loss.isfinite().all()
        images = model.generate(embeddings, noise, context.sampling, pair_ids=ids)
        assert images.isfinite().all()

    if edit.pairs:
        assert set(edit.pairs) == set(ids)
        assert not any(changed.values()), "a per-pair edit leaves the weights alone"
    else:
        assert {key: count for key, count in (edit.changed(model) or {}).items() if count} == {
            key: count for key, count in changed.items() if count
        }
        # a blocked neuron's bias goes with its weights
        alone = {key for key, count in changed.items() if count} - set(edit.counts())
        assert {key.replace(".bias", ".weight") for key in alone} <= set(edit.counts())
    for pair_id in ids:
        assert edit.for_pair(pair_id).pairs == ()
    if edit.kind:
        path = write_edit(tmp_path / "edit.safetensors", edit)
        assert read_edit(path).identity == edit.identity


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"none", "prompt_adjustment"}))
def test_nothing_to_forget_is_refused(name, tmp_path, model, pairs):
    context, _ = guarded_context(tmp_path, model, pairs)
    with pytest.raises(InputError, match="nothing to forget"):
        mitigation_of(name).apply(model, [], context)


README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def readme_block(language: str) -> str:
    """The code block of a language in the README's section on adding a mitigation."""
    section = README.partition("# Add a mitigation\n")[2]
    section = re.split(r"^#{2,3} ", section, maxsplit=1, flags=re.MULTILINE)[0]
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return str(block)


def test_a_new_mitigation_is_one_python_file_and_one_yaml(
    tmp_path, model, pairs, monkeypatch, capsys
):
    """The README's example passes the contract, is planned and is audited; nothing else knows."""
    code, conf = readme_block("python"), tmp_path / "conf"
    assert len([line for line in code.splitlines() if line.strip()]) <= 22
    place = [*dori_lightning.mitigations.__path__, str(tmp_path)]
    monkeypatch.setattr(dori_lightning.mitigations, "__path__", place)
    (tmp_path / "loudest_values.py").write_text(code, "utf-8")
    shutil.copytree(config.CONF, conf)
    monkeypatch.setattr(config, "CONF", conf)
    (conf / "mitigation" / "loudest_values.yaml").write_text(readme_block("yaml"), "utf-8")

    assert "loudest_values" in config.groups()["mitigation"]
    cfg = configuration("mitigation=loudest_values")
    config.check_targets(cfg)
    config.check_signatures(cfg)
    check_contract(mitigation_of("loudest_values"), tmp_path, model, pairs)

    chosen = ("mitigation=loudest_values", "corpus=none", *SMALL_AUDIT)
    audit = on_tiny(write_material(tmp_path / "material"), *chosen)
    run_task(tmp_path / "planned", *audit, "task.dry_run=true", experiment="audit")
    assert "loudest_values" in "".join(capsys.readouterr())
    run_task(tmp_path / "run", *audit, experiment="audit")
    cells = json.loads((tmp_path / "run" / "report.json").read_text())["cells"]
    assert {cell["mitigation"] for cell in cells} == {"none", "loudest_values"}
    assert json.loads((tmp_path / "run" / "edit.json").read_text())["changed_weights"] > 0
