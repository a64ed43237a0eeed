"""Give mitigations what they work with, as the configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from dori_lightning.mitigations.base import Workshop

if TYPE_CHECKING:
    import lightning.pytorch as L
    from omegaconf import DictConfig

    from dori_lightning.metrics.measure import Originals
    from dori_lightning.mitigations.base import Found
    from dori_lightning.models.protocol import Sampling
    from dori_lightning.pairs.datamodule import PairsDataModule

__all__ = ["edit_record", "workshop_of"]


def workshop_of(
    cfg: DictConfig, *, data: PairsDataModule, originals: Originals, sampling: Sampling
) -> Workshop:
    """Workshop whose edits lie in the cache that the jobs of a sweep share."""

    def trainer(**settings: Any) -> L.Trainer:
        # an edit is made by one process, the others of a run wait for its file
        made: L.Trainer = instantiate(
            cfg.trainer, **{"devices": 1, "num_nodes": 1, "strategy": "auto", **settings}
        )
        return made

    return Workshop(
        seed=cfg.seed,
        corpus=instantiate(cfg.corpus),
        data=data,
        originals=originals,
        sampling=sampling,
        trainer=trainer,
        folder=Path(cfg.paths.cache) / "edits",
    )


def edit_record(found: Found, mitigation: str) -> bytes:
    """What a run folder says of the edit it was made under, as JSON."""
    origin = found.edit.origin
    record = {
        "mitigation": mitigation,
        "identity": found.edit.identity,
        "key": found.key,
        "made": found.made,
        "cost": dict(origin.cost) if origin else {},
        "counts": found.edit.counts(),
        "notes": dict(origin.notes) if origin else {},
    }
    return (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
