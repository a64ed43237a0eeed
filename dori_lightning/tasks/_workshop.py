"""Give mitigations what they work with, as the configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from dori_lightning import trainers
from dori_lightning.mitigations.base import Workshop

if TYPE_CHECKING:
    import lightning.pytorch as L
    from omegaconf import DictConfig

    from dori_lightning.metrics.measure import Originals
    from dori_lightning.mitigations.base import Found
    from dori_lightning.models.protocol import Sampling
    from dori_lightning.pairs.datamodule import PairsDataModule
    from dori_lightning.tracking.tracker import Tracker

__all__ = ["edit_record", "workshop_of"]

CURVE_POINTS = 500
"""Points of a training's curves."""


def workshop_of(
    cfg: DictConfig,
    *,
    data: PairsDataModule,
    originals: Originals,
    sampling: Sampling,
    tracker: Tracker | None = None,
) -> Workshop:
    """Workshop whose edits lie in the cache that the jobs of a sweep share.

    All processes of the run are there from here on: they make an edit together.
    """

    def trainer(**settings: Any) -> L.Trainer:
        if tracker is not None and "max_steps" in settings:  # a fit, however long, as one curve
            settings = {
                "logger": tracker.training("finetune"),
                "log_every_n_steps": max(1, settings["max_steps"] // CURVE_POINTS),
                **settings,
            }
        made: L.Trainer = instantiate(cfg.trainer, **settings)
        return made

    trainers.start(trainer())
    return Workshop(
        seed=cfg.seed,
        corpus=instantiate(cfg.corpus),
        data=data,
        originals=originals,
        sampling=sampling,
        trainer=trainer,
        folder=Path(cfg.paths.cache) / "edits",
    )


def edit_record(found: Found, mitigation: str, *, changed: int | None = None) -> bytes:
    """What a run folder says of the edit it was made under, as JSON.

    Args:
        found: The edit.
        mitigation: Name of the mitigation.
        changed: Weights that differ under it, None where it works without changing any.
    """
    origin = found.edit.origin
    record = {
        "mitigation": mitigation,
        "identity": found.edit.identity,
        "key": found.key,
        "made": found.made,
        "cost": dict(origin.cost) if origin else {},
        "changed_weights": changed,
        "counts": found.edit.counts(),
        "notes": dict(origin.notes) if origin else {},
    }
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
