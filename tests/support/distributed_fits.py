"""Fits by several processes: ``support.distributed_fits FOLDER METHOD [SEARCH SIGNAL]``.

Each process runs this with the environment of one that torchrun started. In the search of that
number the second process gets the signal.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from dori_lightning.attacks.budget import AttackSettings, BudgetSettings
from dori_lightning.mitigations import adversarial_finetuning
from dori_lightning.mitigations.adversarial_finetuning import AdversarialFinetuning, PoolSettings
from dori_lightning.mitigations.base import Mitigation
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.concept_ablation import ConceptAblation
from dori_lightning.mitigations.edits import WeightEdit
from dori_lightning.mitigations.esd import ESD
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.mitigations.replacements import AnchorSettings, SurrogateSettings
from dori_lightning.mitigations.siss import SISS
from dori_lightning.models.loading import load_checkpoint
from dori_lightning.runtime import distributed, signals
from dori_lightning.runtime.signals import Interrupted
from support.context import make_context, read_pairs

LR = 1e-3
ANCHORS = AnchorSettings(prompts=2, images=1, max_similarity=0.99, ordinary=4)

METHODS: dict[str, Mitigation] = {
    # an odd batch: one process has two rows, the other one
    "esd": ESD(
        "esd",
        variant="u",
        steps=2,
        batch=3,
        sampling_steps=3,
        finetune=FinetuneSettings(lr=LR, clip=0.5, weight_decay=0.0),
    ),
    "concept_ablation": ConceptAblation(
        "concept_ablation",
        anchors=ANCHORS,
        steps=2,
        batch=3,
        finetune=FinetuneSettings(lr=LR, clip=0.5, weight_decay=0.0),
    ),
    "siss": SISS(
        "siss",
        anchors=ANCHORS,
        steps=2,
        batch=3,
        micro_batch=2,
        finetune=FinetuneSettings(lr=LR, checkpoint_every=1),
    ),
    "adversarial": AdversarialFinetuning(
        name="adversarial",
        surrogates=SurrogateSettings(NoMitigation(), per_pair=2, candidates=2, max_similarity=0.9),
        pool=PoolSettings(
            attack=AttackSettings(
                inits=("prompt", "random"), budget=BudgetSettings(steps=2), noise_batch=2
            )
        ),
        finetune=FinetuneSettings(lr=LR, checkpoint_every=1),
        epochs=2,
        updates=2,
        adversarial_batch=4,
        ordinary_batch=2,
        ordinary_examples=4,
    ),
}


def fit(folder: Path, name: str, *, trainer: dict[str, Any] | None = None) -> WeightEdit:
    """Fit a method to the checkpoint and the pairs in ``folder``; its edits lie there too."""
    model = load_checkpoint(name="tiny", source=str(folder / "checkpoint"), device="cpu")
    pairs = read_pairs(folder)
    context = make_context(folder, model, pairs)
    if trainer is not None:
        settings = {"accelerator": "cpu", "logger": False, **trainer}
        object.__setattr__(
            context, "trainer", lambda **more: distributed.Trainer(**{**settings, **more})
        )
        distributed.start(context.trainer())
    found = context.find(METHODS[name], model, [p for p in pairs if p.kind != "control"])
    assert isinstance(found.edit, WeightEdit)
    return found.edit


def tell_in_a_search(number: int, signum: signal.Signals) -> None:
    """Have this process get a signal as its ``number``-th search of triggers begins."""
    solve, seen = adversarial_finetuning.solve, [0]

    def counting(*arguments: Any, **settings: Any) -> Any:
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), signum)
        return solve(*arguments, **settings)

    adversarial_finetuning.solve = counting


def main(folder: str, name: str, told: str | None = None, signum: str = "SIGTERM") -> int:
    """Fit; 143 where it was told to leave."""
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    with signals.handling():
        try:
            if told is not None and os.environ["RANK"] == "1":
                tell_in_a_search(int(told), signal.Signals[signum])
            fit(Path(folder), name, trainer={"devices": world, "strategy": "ddp"})
        except Interrupted as error:
            distributed.leave(error)
            return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
