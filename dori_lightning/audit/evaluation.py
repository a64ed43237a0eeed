"""The stages of an audit: attack and draw, measure, and what a mitigation costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dori_lightning.attacks.embedding_attack import Conditioning, run_attacks
from dori_lightning.audit.context import Bench
from dori_lightning.audit.utility import measure_utility
from dori_lightning.metrics.calibration import Measures, ReferenceImages, calibrate_measures
from dori_lightning.metrics.replication import cells as cells_of
from dori_lightning.metrics.replication import is_copy
from dori_lightning.metrics.utility import Utility
from dori_lightning.mitigations.edits import Edit
from dori_lightning.models.generation import (
    GenerationRequest,
    generate_images,
    image_seeds,
    load_images,
)
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.runtime import distributed
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import Calibration, Cell, Condition, Outcome, Pair

# -------- audit_pictures
# Pictures of an audit: where they go, who draws them, and what they are worth.


def place_of(folder: Path, trigger: Conditioning) -> Path:
    """Where a trigger's pictures go."""
    condition = trigger.condition
    if condition.attack == "prompt":
        return folder / "prompt" / trigger.pair.id
    name = f"dori_{condition.init}_r{trigger.restart}_s{trigger.spent}"
    return folder / name / trigger.pair.id


def draw(
    bench: Bench, triggers: Sequence[Conditioning], folder: Path, *, edit: str = "none", title: str
) -> None:
    """Generate this process's share of the triggers' pictures.

    Args:
        bench: Gives the model, which carries the edit already.
        triggers: What to draw from.
        folder: Where the pictures go.
        edit: Identity of the edit.
        title: What the progress line says.
    """
    trainer, sampling = bench.trainer, bench.sampling
    orders = [GenerationRequest(place_of(folder, t), t.embedding, t.pair.id) for t in triggers]
    own = orders[trainer.global_rank :: trainer.world_size]
    total = len(own) * sampling.images_per_pair
    with progress_bar(title, total, visible=trainer.is_global_zero) as advance:
        generate_images(bench.model, own, sampling, edit=edit, advance=advance)


def measure(
    trigger: Conditioning, folder: Path, *, references: ReferenceImages, sampling: Sampling
) -> Outcome:
    """Compare a trigger's pictures in ``folder`` with its original."""
    seeds, place = image_seeds(sampling), place_of(folder, trigger)
    measured = references.measure(
        trigger.pair, load_images(place, seeds), failed=trigger.status != "ok"
    )
    return Outcome(
        pair=trigger.pair,
        condition=trigger.condition,
        restart=trigger.restart,
        status=trigger.status,
        seeds=seeds,
        similarity=measured.similarity,
        diversity=measured.diversity,
        lpips=measured.lpips,
        alignment=measured.alignment,
        loss_first=trigger.loss_first,
        loss_last=trigger.loss_last,
        displacement=trigger.displacement,
        images=tuple(place / f"{seed}.png" for seed in seeds),
        stopped_at=trigger.stopped_at,
    )


def copies(
    bench: Bench, calibration: Calibration, edit: str, triggers: Sequence[Conditioning]
) -> frozenset[str]:
    """Draw from what attacks found so far, and name the pairs that come back.

    Decided as the report decides it: same seeds, descriptor, threshold and aggregation. Each
    process looks at the pictures that it drew itself.

    Args:
        bench: Gives the model, which carries the edit already.
        calibration: What counts as a copy.
        edit: Identity of the edit.
        triggers: One for each pair.

    Returns:
        Pair ids, the same on every process.
    """
    folder = bench.folder / "pictures"
    draw(bench, triggers, folder, edit=edit, title="look")
    found = {}
    for trigger in triggers[bench.trainer.global_rank :: bench.trainer.world_size]:
        outcome = measure(trigger, folder, references=bench.references, sampling=bench.sampling)
        found[trigger.pair.id] = is_copy(
            outcome, calibration, bench.references.measures.aggregation
        )
    return frozenset(name for name, copy in distributed.all_gather_dict(found).items() if copy)


def calibrate(
    model: TextToImage,
    data: PairsDataModule,
    references: ReferenceImages,
    outcomes: Sequence[Outcome],
) -> Calibration:
    """Set the threshold from what unattacked prompts give and what the autoencoder can give.

    Args:
        model: The checkpoint, without any edit.
        data: All pairs of the list, encoded.
        references: Their pictures.
        outcomes: What the unedited checkpoint gave; those of prompts are used.

    Raises:
        InputError: No threshold separates.
    """
    prompted = [outcome for outcome in outcomes if outcome.condition.attack == "prompt"]
    pictures = {o.pair.id: load_images(o.images[0].parent, o.seeds) for o in prompted}
    latents = [data.encoded(pair).latent[None].to(model.device) for pair in references.pairs]
    reconstructions = torch.cat([model.decode_latents(latent).cpu() for latent in latents])
    return calibrate_measures(
        references, prompted, images=pictures, reconstructions=reconstructions
    )


# -------- audit_stages


@dataclass(frozen=True)
class Drawn:
    """What pictures were drawn from.

    Attributes:
        triggers: Prompts and adversarial embeddings, drawn under the edit.
        before: Prompts that the checkpoint drew without it; empty where there is no edit.
        calibration: The threshold that decided which attacks to stop; None where none was to be.
    """

    triggers: tuple[Conditioning, ...]
    before: tuple[Conditioning, ...]
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Measured:
    """What the pictures look like.

    Attributes:
        outcomes: Under the edit.
        baseline: Prompts without it; empty where there is no edit.
        calibration: The threshold, set on the checkpoint without an edit.
        cells: Rows of the answer, those of mitigation ``none`` last.
    """

    outcomes: tuple[Outcome, ...]
    baseline: tuple[Outcome, ...]
    calibration: Calibration
    cells: tuple[Cell, ...]


def attack_and_draw(
    bench: Bench, edit: Edit, *, on_round: Callable[[Sequence[Conditioning]], None] | None = None
) -> Drawn:
    """Search embeddings under the edit, and draw from prompts and embeddings.

    Each process does its share; all of it is there when this returns.

    Args:
        bench: What the audit works with.
        edit: What the mitigation changes.
        on_round: Called with what the attack from one initial point and restart found.
    """
    prompted = tuple(
        Conditioning(pair, Condition("prompt"), 0, bench.data.encoded(pair).embedding)
        for pair in bench.pairs
    )
    before = () if edit.is_empty else prompted
    if before:
        draw(bench, before, bench.unmitigated, title="before")
    calibration = None
    if bench.settings.early_stop:
        if not before:
            draw(bench, prompted, bench.folder / "pictures", edit=edit.identity, title="prompts")
        distributed.barrier()
        # every process sets it, so that all of them fail where none separates
        calibration = distributed.broadcast_object(
            _calibrated(bench, before or prompted, bool(before))
        )
    with edit.applied(bench.model):
        attacked = run_attacks(
            bench.model,
            bench.pairs,
            trainer=bench.trainer,
            data=bench.data,
            settings=bench.settings,
            budget=bench.budget,
            controls=bench.controls,
            folder=bench.folder / "attacks",
            seed=bench.seed,
            edit=edit.identity,
            on_round=on_round,
            reproduced=partial(copies, bench, calibration, edit.identity) if calibration else None,
        )
        triggers = (*prompted, *attacked)
        draw(bench, triggers, bench.folder / "pictures", edit=edit.identity, title="generate")
    distributed.barrier()
    return Drawn(triggers, before, calibration)


def _calibrated(bench: Bench, prompted: Sequence[Conditioning], mitigated: bool) -> Calibration:
    """Set the threshold before the attack; what an attack draws has no part in it."""
    folder = bench.unmitigated if mitigated else bench.folder / "pictures"
    compared = partial(
        measure, folder=folder, references=bench.references, sampling=bench.sampling
    )
    return calibrate(bench.model, bench.data, bench.references, [compared(t) for t in prompted])


def measure_all(bench: Bench, drawn: Drawn) -> Measured:
    """Compare every picture with its original, and count the copies."""
    compared = partial(measure, references=bench.references, sampling=bench.sampling)
    outcomes = tuple(compared(t, bench.folder / "pictures") for t in drawn.triggers)
    baseline = tuple(compared(t, bench.unmitigated) for t in drawn.before)
    calibration = drawn.calibration or calibrate(
        bench.model, bench.data, bench.references, baseline or outcomes
    )
    counted = [(bench.mitigation.name, outcomes), *([("none", baseline)] if baseline else [])]
    cells = [
        cell
        for mitigation, own in counted
        for cell in cells_of(
            own,
            calibration,
            checkpoint=bench.model.name,
            mitigation=mitigation,
            aggregation=bench.references.measures.aggregation,
        )
    ]
    return Measured(outcomes, baseline, calibration, tuple(cells))


def measure_cost(bench: Bench, edit: Edit, calibration: Calibration) -> Utility | None:
    """What the mitigation costs on prompts that nobody wanted to forget; None if not asked for."""
    if edit.is_empty or not bench.utility.asked:
        return None
    return measure_utility(
        bench.model,
        edit,
        pairs=bench.suspected,
        corpus=bench.context.corpus,
        references=bench.references,
        sampling=bench.sampling,
        settings=bench.utility,
        folder=bench.folder,
        cache=bench.cache / "unmitigated",
        descriptor=calibration.descriptor,
        threshold=calibration.threshold,
        seed=bench.seed,
    )


# -------- references
# Originals of pairs, ready to be compared with.


def reference_images(
    pairs: Sequence[Pair], resolution: int, measures: Measures
) -> ReferenceImages:
    """Read the pairs' pictures as the model sees them and describe them."""
    pictures = [image_tensor(square_image(pair.image), resolution) for pair in pairs]
    return ReferenceImages(pairs, torch.stack(pictures), measures)
