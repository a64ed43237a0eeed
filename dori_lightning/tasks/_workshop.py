"""Give mitigations what they work with, as the configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from dori_lightning.mitigations.base import Workshop

if TYPE_CHECKING:
    import lightning.pytorch as L
    from omegaconf import DictConfig

    from dori_lightning.metrics.measure import Originals
    from dori_lightning.models.protocol import Sampling
    from dori_lightning.pairs.datamodule import PairsDataModule

__all__ = ["workshop_of"]


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
