"""Attack, generate and score: the images of an audit and what they say."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dori_lightning.attacks.embedding_attack import Conditioning, attack_rounds, run_attacks
from dori_lightning.audit.context import AuditContext
from dori_lightning.metrics.calibration import calibrate_measures
from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.metrics.replication import is_copy
from dori_lightning.mitigations.edits import Edit
from dori_lightning.models.generation import (
    GenerationRequest,
    generate_images,
    image_seeds,
    load_images,
)
from dori_lightning.runtime import distributed
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import BASELINE, Calibration, Cell, Condition, Outcome


@dataclass(frozen=True)
class Generated:
    """The embeddings that images were generated from.

    Attributes:
        conditionings: Prompts and adversarial embeddings, generated from under the edit.
        baseline: Prompts, generated from without the edit; empty where there is no edit.
        calibration: The threshold that early stopping used; None without early stopping.
    """

    conditionings: tuple[Conditioning, ...]
    baseline: tuple[Conditioning, ...]
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Evaluation:
    """Scores of all images.

    Attributes:
        outcomes: Of the images under the edit.
        baseline: Of the prompts' images without it; empty where there is no edit.
        calibration: The threshold, set on the checkpoint without an edit.
        cells: Rows of the answer, those of mitigation ``none`` last.
    """

    outcomes: tuple[Outcome, ...]
    baseline: tuple[Outcome, ...]
    calibration: Calibration
    cells: tuple[Cell, ...]


def attack_and_generate(
    context: AuditContext,
    edit: Edit,
    *,
    on_round: Callable[[Sequence[Conditioning]], None] | None = None,
) -> Generated:
    """Search embeddings under the edit, and generate from prompts and embeddings.

    Each process does its share; the shares of all are on the disk when this returns.

    Args:
        context: The audit.
        edit: What the mitigation changes.
        on_round: Called with the embeddings of one initial point and restart.
    """
    prompts, images = prompt_conditionings(context), context.folder / "pictures"
    mitigated, calibration = not edit.is_empty, None
    if mitigated:
        generate(context, prompts, context.unmitigated, title="before")
    if context.attack.early_stop:
        if not mitigated:
            generate(context, prompts, images, edit=edit.identity, title="prompts")
        distributed.barrier()
        # before the attack, whose images have no part in it; by every process, so that all fail
        # where no threshold separates
        folder = context.unmitigated if mitigated else images
        calibration = distributed.broadcast_object(
            calibrate(context, [measure(context, c, folder) for c in prompts])
        )
    with edit.applied(context.model):
        attacked = run_attacks(
            context.attack_context(edit.identity),
            attack_rounds(context.attack, context.pairs),
            trainer=context.trainer,
            on_round=on_round,
            reproduced=partial(reproduced_pairs, context, calibration, edit.identity)
            if calibration
            else None,
        )
        conditionings = (*prompts, *attacked)
        generate(context, conditionings, images, edit=edit.identity, title="generate")
    distributed.barrier()
    return Generated(conditionings, prompts if mitigated else (), calibration)


def evaluate(context: AuditContext, generated: Generated) -> Evaluation:
    """Score every image against its pair's, and count the replicas."""
    images = context.folder / "pictures"
    outcomes = tuple(measure(context, c, images) for c in generated.conditionings)
    baseline = tuple(measure(context, c, context.unmitigated) for c in generated.baseline)
    calibration = generated.calibration or calibrate(context, baseline or outcomes)
    counted = [(context.mitigation.name, outcomes), *([(BASELINE, baseline)] if baseline else [])]
    cells = [
        cell
        for mitigation, scored in counted
        for cell in cells_of(
            scored,
            calibration,
            checkpoint=context.model.name,
            mitigation=mitigation,
            aggregation=context.references.measures.aggregation,
        )
    ]
    return Evaluation(outcomes, baseline, calibration, tuple(cells))


def prompt_conditionings(context: AuditContext) -> tuple[Conditioning, ...]:
    """The prompts of all pairs, without an attack."""
    return tuple(
        Conditioning(pair, Condition("prompt"), 0, context.data.encoded(pair).embedding)
        for pair in context.pairs
    )


def image_folder(folder: Path, conditioning: Conditioning) -> Path:
    """Where the images of a conditioning lie below ``folder``."""
    condition = conditioning.condition
    if condition.attack == "prompt":
        return folder / "prompt" / conditioning.pair.id
    name = f"dori_{condition.init}_r{conditioning.restart}_s{conditioning.spent}"
    return folder / name / conditioning.pair.id


def generate(
    context: AuditContext,
    conditionings: Sequence[Conditioning],
    folder: Path,
    *,
    edit: str = "none",
    title: str,
) -> None:
    """Generate this process's share of the images of conditionings.

    Args:
        context: The audit; its model carries the edit already.
        conditionings: What to generate from.
        folder: Where the images go.
        edit: Identity of the edit.
        title: Title of the progress bar.
    """
    trainer, sampling = context.trainer, context.sampling
    requests = [
        GenerationRequest(image_folder(folder, c), c.embedding, c.pair.id)
        for c in conditionings[trainer.global_rank :: trainer.world_size]
    ]
    total = len(requests) * sampling.images_per_pair
    with progress_bar(title, total) as advance:
        generate_images(context.model, requests, sampling, edit=edit, advance=advance)


def measure(context: AuditContext, conditioning: Conditioning, folder: Path) -> Outcome:
    """Score the images of a conditioning, which lie in ``folder``, against its pair's image."""
    seeds, place = image_seeds(context.sampling), image_folder(folder, conditioning)
    scores = context.references.measure(
        conditioning.pair, load_images(place, seeds), failed=conditioning.status != "ok"
    )
    return Outcome(
        pair=conditioning.pair,
        condition=conditioning.condition,
        restart=conditioning.restart,
        status=conditioning.status,
        seeds=seeds,
        **vars(scores),
        loss_first=conditioning.loss_first,
        loss_last=conditioning.loss_last,
        displacement=conditioning.displacement,
        images=tuple(place / f"{seed}.png" for seed in seeds),
        stopped_at=conditioning.stopped_at,
    )


def calibrate(context: AuditContext, outcomes: Sequence[Outcome]) -> Calibration:
    """Set the threshold between images of unattacked prompts and the autoencoder's limit.

    Args:
        context: The audit; its model carries no edit.
        outcomes: Outcomes of the checkpoint without an edit; only those of prompts are used.

    Raises:
        InputError: No threshold separates replicas from other images.
    """
    model, references = context.model, context.references
    prompted = [outcome for outcome in outcomes if outcome.condition.attack == "prompt"]
    latents = [context.data.encoded(pair).latent[None] for pair in references.pairs]
    return calibrate_measures(
        references,
        prompted,
        images={o.pair.id: load_images(o.images[0].parent, o.seeds) for o in prompted},
        reconstructions=torch.cat(
            [model.decode_latents(latent.to(model.device)).cpu() for latent in latents]
        ),
    )


def reproduced_pairs(
    context: AuditContext,
    calibration: Calibration,
    edit: str,
    conditionings: Sequence[Conditioning],
) -> frozenset[str]:
    """Generate from an attack's embeddings so far, and name the pairs that they reproduce.

    Decided as the report decides it: same seeds, descriptor, threshold and aggregation. Each
    process scores the images that it generated itself.

    Args:
        context: The audit; its model carries the edit already.
        calibration: The threshold of replication.
        edit: Identity of the edit.
        conditionings: One for each pair.

    Returns:
        Pair ids, the same on every process.
    """
    folder, trainer = context.folder / "pictures", context.trainer
    generate(context, conditionings, folder, edit=edit, title="look")
    aggregation = context.references.measures.aggregation
    reproduced = {
        c.pair.id: is_copy(measure(context, c, folder), calibration, aggregation)
        for c in conditionings[trainer.global_rank :: trainer.world_size]
    }
    return frozenset(k for k, copy in distributed.all_gather_dict(reproduced).items() if copy)
