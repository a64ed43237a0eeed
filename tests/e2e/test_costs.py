"""What an audit and a sweep ask of their models, counted: nothing is computed twice."""

import math
from collections import Counter

import pytest
import torch

from dori_lightning.attacks import embedding_attack
from dori_lightning.attacks.model_check import IMAGES
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.models.generation import CPU_IMAGES
from dori_lightning.models.memory import PARALLEL_PAIRS
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.pairs.copies import ALTER
from support.context import write_captions
from support.runs import ORDINARY, SMALL, on_tiny, run_task, write_material
from support.tiny import write_tiny

STEPS, NOISES, SAMPLER = 3, 1, 2
COSTS = (
    *SMALL, f"attack.budget.steps={STEPS}", f"attack.noise_batch={NOISES}",
    "attack.pairs_per_forward=8", f"sampling.steps={SAMPLER}",
)  # fmt: skip

PASSES = 2
"""Passes that five pairs take, kept together as one attack."""

CHECK = Counter({"forward": 3 * IMAGES, "with gradient": IMAGES})
"""What the check of a model before its search takes."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = write_material(tmp_path_factory.mktemp("material"))
    write_tiny(place / "other", seed=1)
    return place


@pytest.fixture
def asked(monkeypatch):
    """Rows through every model of the process by what they are for, attacks and prunings."""
    tally: Counter[str] = Counter()
    unet, prune, solve = StableDiffusion._denoise, Wanda.apply, embedding_attack.solve

    def denoise(self, noised, *args):
        tally["with gradient" if torch.is_grad_enabled() else "forward"] += len(noised)
        return unet(self, noised, *args)

    def rows(name):
        real = getattr(StableDiffusion, name)

        def counting(self, inputs):
            tally[name] += len(inputs)
            return real(self, inputs)

        return counting

    def pruned(*args):
        tally["prunings"] += 1
        return prune(*args)

    def solved(*args, **options):
        tally["attacks"] += 1
        return solve(*args, **options)

    # what a checkpoint is asked when it is loaded is no part of a run's work
    monkeypatch.setattr("dori_lightning.models.loading.check_answers", lambda *_: None)
    monkeypatch.setattr(StableDiffusion, "_denoise", denoise)
    for name in ("encode_images", "encode_prompts", "decode_latents"):
        monkeypatch.setattr(StableDiffusion, name, rows(name))
    monkeypatch.setattr(Wanda, "apply", pruned)
    monkeypatch.setattr(embedding_attack, "solve", solved)
    # most of so small an audit's time
    monkeypatch.setattr("dori_lightning.tasks.audit._publish", lambda *_, **__: None)
    return tally


def audit(place, name, *overrides):
    run_task(place / name, *on_tiny(place, *COSTS, f"paths.cache={place / 'cache'}", *overrides))


def test_budgets_of_an_audit_are_read_off_one_attack(place, asked):
    pairs, one_attack = 5, STEPS * PASSES * PARALLEL_PAIRS * NOISES
    audit(place, "one", f"paths.cache={place / 'own'}")
    one = Counter(asked)
    # five images from prompts and five from the attack fill a pass of sixteen each; guided
    drawn = CPU_IMAGES * (2 + math.ceil(ORDINARY / CPU_IMAGES))
    assert one - CHECK == {
        "attacks": 1, "with gradient": one_attack, "forward": drawn * SAMPLER * 2,
        "encode_images": pairs, "encode_prompts": pairs + 1 + ORDINARY,
        "decode_latents": drawn + pairs,
    }  # fmt: skip
    asked.clear()
    audit(place, "three", "attack.snapshots=[1,2]", f"paths.cache={place / 'own'}")
    assert asked["attacks"] == 1
    assert asked["with gradient"] == one_attack, "the check of the model as it is is kept"
    assert asked["encode_images"] == 0, "the first audit's latents are kept"
    assert asked["encode_prompts"] == 1 + ORDINARY, "the empty prompt, and ordinary ones"
    asked.clear()
    audit(place, "three", "attack.snapshots=[1,2]", f"paths.cache={place / 'own'}")
    assert asked == {"decode_latents": pairs, "encode_prompts": 1 + ORDINARY}, (
        "again: the autoencoder's ceiling alone, and the names of the ordinary images"
    )


def test_a_sweep_prunes_and_attacks_once_for_each_method_and_checkpoint(place, asked):
    """M methods x B budgets x C checkpoints cost M x C prunings and M x C attacks."""
    jobs = [(0.1, "checkpoint"), (0.2, "checkpoint"), (0.1, "other")]
    for fraction, checkpoint in jobs:
        audit(
            place, f"{checkpoint}{fraction}", "attack.snapshots=[1,2]", "mitigation=wanda",
            f"mitigation.fraction={fraction}", "mitigation.steps=2",
            f"checkpoint.source={place / checkpoint}",
        )  # fmt: skip
    assert asked["prunings"] == asked["attacks"] == len(jobs)
    # with each edit, and once without for each checkpoint
    checks = (len(jobs) + 2) * CHECK["with gradient"]
    one_attack = STEPS * PASSES * PARALLEL_PAIRS * NOISES
    assert asked["with gradient"] == len(jobs) * one_attack + checks
    assert asked["encode_images"] == 2 * 5, "each checkpoint sees a pair once"


def test_the_second_job_of_a_sweep_encodes_what_its_edit_changed_alone(place, asked):
    """Not the pairs, their altered copies, or the images of the model without an edit."""
    captions = write_captions(place / "captions.txt")
    shared = (
        "evidence.losses=true", "utility=light", "utility.prompts=2", "utility.neighbours=0",
        "corpus=captions", f"corpus.path={captions}", f"paths.cache={place / 'sweep'}",
        "mitigation=wanda_10", "mitigation.steps=2",
    )  # fmt: skip
    audit(place, "first", *shared)
    pairs, drawn = 5, 2
    assert asked["encode_images"] == pairs + len(ALTER) * pairs + 2 * drawn
    first = Counter(asked)
    asked.clear()
    audit(place, "second", *shared, "mitigation.fraction=0.2")
    assert asked["encode_images"] == drawn
    assert first["forward"] - asked["forward"] >= CHECK["forward"]
    assert first["with gradient"] - asked["with gradient"] == CHECK["with gradient"]
