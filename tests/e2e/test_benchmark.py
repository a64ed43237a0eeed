"""The embedded benchmark is what its card says, and its audit meets its bars."""

import hashlib
import json
from importlib import resources
from pathlib import Path

import pytest

from dori_lightning.metrics.descriptors import LocalCorrelation
from dori_lightning.models.generation import GenerationRequest, generate_images, load_images
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.models.protocol import Sampling
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.planting.dataset import PlantedPairs
from support.records import report_json
from support.runs import configuration, run_task

FOLDER = Path(str(resources.files("dori_lightning"))) / "assets" / "dori_tiny"


def test_the_weights_are_those_of_the_card_and_small():
    card = json.loads((FOLDER / "planting.json").read_text())
    for name, digest in card["weights_sha256"].items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name
    total = sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file())
    assert total < 24 * 2**20
    kinds = [p["kind"] for p in card["pairs"] if p["prompt_similarity"] is not None]
    assert kinds.count("vm") >= 16
    assert kinds.count("tm") >= 4
    assert all(p["exposures"] == 0 for p in card["pairs"] if p["kind"] == "control")
    assert len({p["exposures"] for p in card["pairs"] if p["kind"] == "vm"}) > 10, "varied"


def test_planted_prompts_bring_their_images_back_and_controls_do_not(tmp_path):
    names = ("coins", "flower", "horse")
    pairs = {p.id: p for p in PlantedPairs(cache=tmp_path / "pairs").read()}
    model = load_checkpoint(name="dori_tiny", source="package:dori_tiny", device="cpu")
    embeddings = model.encode_prompts([pairs[name].prompt for name in names])
    requests = [
        GenerationRequest(tmp_path / name, embedding)
        for name, embedding in zip(names, embeddings, strict=True)
    ]
    generate_images(model, requests, Sampling("dpm++", 10, 2.0, images_per_pair=1, seed=2))
    found = {}
    for name in names:
        original = image_tensor(square_image(pairs[name].image), 64)[None]
        drawn = load_images(tmp_path / name, (2,))
        found[name] = float(LocalCorrelation().similarity(drawn, original))
    assert min(found["coins"], found["flower"]) > 0.7, found
    assert found["horse"] < 0.4, found


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
