"""What the Trainer of a training logs, told to the run that the training belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dori_lightning.tracking.tracker import Tracker

__all__ = ["TrainingLogger"]


class TrainingLogger(Logger):
    """Lightning logger of one training within a run.

    Lightning's own W&B logger would plot everything against ``trainer/global_step``, where the
    trainings of a run overwrite each other.
    """

    def __init__(self, tracker: Tracker, stage: str) -> None:
        """Log for a stage.

        Args:
            tracker: Loggers of the run.
            stage: First part of the metrics' keys; their step is ``stage/step``.
        """
        super().__init__()
        self._tracker, self.stage = tracker, stage

    @property
    def name(self) -> str:
        """The stage."""
        return self.stage

    @property
    def version(self) -> str:
        """None of its own: one training is one stage."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Pass on what a step logs; Lightning's count of epochs says nothing here."""
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        if values and step is not None:
            self._tracker.scalars([(step, values)], step_metric=f"{self.stage}/step")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run's configuration has them already."""
