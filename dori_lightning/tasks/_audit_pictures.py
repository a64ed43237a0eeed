"""Pictures of an audit: where they go, who draws them, and what they are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dori_lightning import processes
from dori_lightning.metrics.first_success import is_copy
from dori_lightning.metrics.measure import calibrate_measures
from dori_lightning.models.pictures import (
    PictureOrder,
    generate_pictures,
    load_pictures,
    picture_seeds,
)
from dori_lightning.progress import stage
from dori_lightning.types import Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dori_lightning.attacks.triggers import Trigger
    from dori_lightning.metrics.measure import Originals
    from dori_lightning.models.protocol import Sampling, TextToImage
    from dori_lightning.pairs.datamodule import PairsDataModule
    from dori_lightning.tasks._audit_setup import Bench
    from dori_lightning.types import Calibration

__all__ = ["calibrate", "copies", "draw", "measure", "place_of"]


def place_of(folder: Path, trigger: Trigger) -> Path:
    """Where a trigger's pictures go."""
    condition = trigger.condition
    if condition.attack == "prompt":
        return folder / "prompt" / trigger.pair.id
    name = f"dori_{condition.init}_r{trigger.restart}_s{trigger.spent}"
    return folder / name / trigger.pair.id


def draw(
    bench: Bench, triggers: Sequence[Trigger], folder: Path, *, edit: str = "none", title: str
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
    orders = [PictureOrder(place_of(folder, t), t.embedding, t.pair.id) for t in triggers]
    own = orders[trainer.global_rank :: trainer.world_size]
    total = len(own) * sampling.images_per_pair
    with stage(title, total, visible=trainer.is_global_zero) as advance:
        generate_pictures(bench.model, own, sampling, edit=edit, advance=advance)


def measure(
    trigger: Trigger, folder: Path, *, originals: Originals, sampling: Sampling
) -> Outcome:
    """Compare a trigger's pictures in ``folder`` with its original."""
    seeds, place = picture_seeds(sampling), place_of(folder, trigger)
    measured = originals.measure(
        trigger.pair, load_pictures(place, seeds), failed=trigger.status != "ok"
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
    bench: Bench, calibration: Calibration, edit: str, triggers: Sequence[Trigger]
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
        outcome = measure(trigger, folder, originals=bench.originals, sampling=bench.sampling)
        found[trigger.pair.id] = is_copy(
            outcome, calibration, bench.originals.measures.aggregation
        )
    return frozenset(name for name, copy in processes.gathered(found).items() if copy)


def calibrate(
    model: TextToImage, data: PairsDataModule, originals: Originals, outcomes: Sequence[Outcome]
) -> Calibration:
    """Set the threshold from what unattacked prompts give and what the autoencoder can give.

    Args:
        model: The checkpoint, without any edit.
        data: All pairs of the list, encoded.
        originals: Their pictures.
        outcomes: What the unedited checkpoint gave; those of prompts are used.

    Raises:
        InputError: No threshold separates.
    """
    prompted = [outcome for outcome in outcomes if outcome.condition.attack == "prompt"]
    pictures = {o.pair.id: load_pictures(o.images[0].parent, o.seeds) for o in prompted}
    latents = [data.encoded(pair).latent[None].to(model.device) for pair in originals.pairs]
    reconstructions = torch.cat([model.decode_latents(latent).cpu() for latent in latents])
    return calibrate_measures(
        originals, prompted, pictures=pictures, reconstructions=reconstructions
    )
