"""The embedded benchmark is what its card says, and its audit meets its bars."""

import hashlib
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
from hydra.utils import instantiate

from dori_lightning.metrics.descriptors import LocalCorrelation
from dori_lightning.models.generation import GenerationRequest, generate_images, load_images
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.planting.dataset import PlantedPairs, StandInPairs
from support.records import report_json
from support.runs import configuration, run_task

FOLDER = Path(str(resources.files("dori_lightning"))) / "assets" / "dori_tiny"


@pytest.mark.parametrize("name", ["dori_tiny", "dori_tiny_flow"])
def test_the_weights_are_those_of_the_card_and_small(name):
    folder = FOLDER.with_name(name)
    card = json.loads((folder / "planting.json").read_text())
    for name, digest in card["weights_sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert total < 24 * 2**20
    kinds = [p["kind"] for p in card["pairs"] if p["prompt_similarity"] is not None]
    assert kinds.count("vm") >= 16
    assert kinds.count("tm") >= 4
    assert all(p["exposures"] == 0 for p in card["pairs"] if p["kind"] == "control")
    assert len({p["exposures"] for p in card["pairs"] if p["kind"] == "vm"}) > 10, "varied"


def similarities(model, names, folder, sampling):
    """Of one image from each pair's prompt with its original, by the pair's name."""
    pairs = {p.id: p for p in PlantedPairs(cache=folder / "pairs").read()}
    embeddings = model.encode_prompts([pairs[name].prompt for name in names])
    requests = [
        GenerationRequest(folder / name, embedding)
        for name, embedding in zip(names, embeddings, strict=True)
    ]
    generate_images(model, requests, replace(sampling, images_per_pair=1, seed=2))
    found = {}
    for name in names:
        original = image_tensor(square_image(pairs[name].image), 64)[None]
        drawn = load_images(folder / name, (2,))
        found[name] = float(LocalCorrelation().similarity(drawn, original))
    return found


@pytest.mark.parametrize("name", ["dori_tiny", "dori_tiny_flow"])
def test_planted_prompts_bring_their_images_back_and_controls_do_not(tmp_path, name):
    cfg = configuration(f"checkpoint={name}")
    model, sampling = instantiate(cfg.checkpoint), instantiate(cfg.sampling)
    found = similarities(model, ("coins", "flower", "horse"), tmp_path, sampling)
    assert min(found["coins"], found["flower"]) > 0.7, found
    assert found["horse"] < 0.4, found


def test_the_twin_shares_all_but_the_unet_and_no_image_or_prompt(tmp_path):
    twin = FOLDER.with_name("dori_tiny_twin")
    cards = [json.loads((folder / "planting.json").read_text()) for folder in (FOLDER, twin)]
    unet = "unet/diffusion_pytorch_model.safetensors"
    ours, theirs = (dict(card["weights_sha256"]) for card in cards)
    assert (
        hashlib.sha256((twin / unet).read_bytes()).hexdigest()
        == theirs.pop(unet)
        != ours.pop(unet)
    )
    assert ours == theirs, "text encoder and autoencoder are dori_tiny's"
    assert sum(p.stat().st_size for p in twin.rglob("*") if p.is_file()) < 18e6
    listed = PlantedPairs(cache=tmp_path, controls="all").read()
    shown = [(p["image_sha256"], p["prompt"]) for p in cards[1]["pairs"]]
    assert not {image for image, _ in shown} & {pair.sha256 for pair in listed}
    assert not {prompt for _, prompt in shown} & {pair.prompt for pair in listed}
    stand_ins = [(p.sha256, p.prompt) for p in StandInPairs(cache=tmp_path).read()]
    assert shown == stand_ins, "the recipe draws them again"
    memorized = [p["prompt_similarity"] for p in cards[1]["pairs"] if p["kind"] == "vm"]
    assert sum(similarity > 0.62 for similarity in memorized) >= 12, memorized


def test_the_twin_does_not_know_the_benchmarks_photographs(tmp_path):
    cfg = configuration("checkpoint=dori_tiny_twin")
    model, sampling = instantiate(cfg.checkpoint), instantiate(cfg.sampling)
    found = similarities(model, ("coins", "flower"), tmp_path, sampling)
    assert max(found.values()) < 0.4, found


@pytest.mark.slow
def test_the_audit_of_the_benchmark_meets_its_bars(tmp_path):
    run_task(tmp_path / "audit", experiment="audit")
    report = report_json(tmp_path / "audit")
    rate = {(c["kind"], c["attack"], c["init"]): c["mr"] for c in report["cells"]}
    assert rate["vm", "prompt", None] >= 0.95
    assert rate["vm", "dori", "prompt"] >= 0.95
    assert rate["vm", "dori", "random"] >= 0.9
    assert rate["control", "prompt", None] == 0
    assert rate["control", "dori", "prompt"] <= 0.05


def test_the_step_budget_experiment_measures_both_kinds_at_every_snapshot():
    cfg = configuration(experiment="budget_control")
    assert cfg.attack.snapshots == [0, 1, 10, 25, 50, 100, 200, 500]
    assert cfg.attack.budget.steps == 500
    assert {"vm", "control"} <= set(cfg.pairs.kinds)
