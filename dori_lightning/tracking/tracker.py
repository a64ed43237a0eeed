"""What tasks tell the loggers of a run; every logger takes what it has a place for.

Metrics are ``stage/name`` and are plotted against a step of their own, ``stage/step``: the steps
of an attack, of an audit's budget and of a training have nothing to do with each other. W&B drops
what comes with a step below one that it has seen, so its own step is never given.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from dori_lightning.tracking.training import TrainingLogger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from lightning.pytorch.loggers import Logger

__all__ = ["Tracker"]


class Tracker:
    """The loggers of a run as one; with no loggers, as on every process but the first, nothing."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        """Speak for loggers.

        Args:
            loggers: Lightning loggers; scalars and the summary go to each, pictures, tables and
                files to those of W&B.
        """
        self.loggers = list(loggers)
        self._defined: set[str] = set()

    def add(self, logger: Logger) -> None:
        """Speak for one more logger."""
        self.loggers.append(logger)

    def scalars(
        self, rows: Iterable[tuple[int, Mapping[str, float]]], *, step_metric: str
    ) -> None:
        """Log metrics at steps of their own.

        Args:
            rows: Step and the metrics there, by key such as ``attack/loss``.
            step_metric: Key of the steps, such as ``attack/step``.
        """
        for step, values in rows:
            self._define(values, step_metric)
            for logger in self.loggers:
                # W&B counts for itself, see above
                own = None if isinstance(logger, WandbLogger) else step
                logger.log_metrics({**values, step_metric: step}, step=own)

    def pictures(self, event: str, picture: Image.Image | None, *, caption: str) -> None:
        """Log one picture for an event: a grid of everything that it drew.

        Args:
            event: Key, such as ``pictures/attack_from_prompt``.
            picture: The grid; None where pictures are not to be shown.
            caption: How to read it.
        """
        if picture is None:
            return
        for run in self._runs():
            run.log({event: _wandb().Image(picture, caption=caption)})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table, once a run; its cells are scalars, text, None and PIL pictures.

        Text that a spreadsheet would take for a formula is told apart by an apostrophe: W&B
        exports tables as CSV, and prompts are other people's.
        """
        for run in self._runs():
            wandb = _wandb()
            held = [
                [
                    wandb.Image(cell) if isinstance(cell, Image.Image) else _no_formula(cell)
                    for cell in row
                ]
                for row in rows
            ]
            run.log({name: wandb.Table(columns=list(columns), data=held)})

    def summary(self, values: Mapping[str, float | str | None]) -> None:
        """Set what runs are compared by; what is None or no finite number is left out."""
        known = {
            key: value
            for key, value in values.items()
            if value is not None and not (isinstance(value, float) and not math.isfinite(value))
        }
        numbers = {key: value for key, value in known.items() if not isinstance(value, str)}
        for logger in self.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary.update(known)
            elif numbers:
                logger.log_metrics(numbers)

    def artifact(
        self,
        name: str,
        *,
        kind: str,
        files: Mapping[str, Path],
        metadata: Mapping[str, Any] | None = None,
        copy: bool = True,
    ) -> None:
        """Hand files over for keeping, as one version of an artifact.

        Args:
            name: Name of the artifact; other runs may add versions to it.
            kind: Type of the artifact: ``embedding``, ``edit``, ``report``, ``table``.
            files: Name in the artifact to file; files that do not exist are left out.
            metadata: What they were made from.
            copy: Copy the files into the run's staging folder: for those that lie outside of the
                run folder or may be written again before they are uploaded.
        """
        held = {inside: path for inside, path in files.items() if path.is_file()}
        if not held:
            return
        for run in self._runs():
            made = _wandb().Artifact(
                re.sub(r"[^A-Za-z0-9._-]", "-", name), kind, metadata=dict(metadata or {})
            )
            for inside, path in held.items():
                made.add_file(str(path), name=inside, policy="mutable" if copy else "immutable")
            run.log_artifact(made)

    def training(self, stage: str) -> TrainingLogger:
        """Logger for a Trainer, whose metrics are then plotted against ``stage/step``."""
        return TrainingLogger(self, stage)

    def finish(self, exit_code: int = 0) -> None:
        """Close the loggers; a run whose code is not 0 counts as failed.

        A W&B run that is not closed would take the metrics of a sweep's next job.
        """
        for logger in self.loggers:
            logger.finalize("failed" if exit_code else "success")
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=exit_code)

    def _runs(self) -> list[Any]:
        """W&B runs among the loggers."""
        return [one.experiment for one in self.loggers if isinstance(one, WandbLogger)]

    def _define(self, values: Mapping[str, float], step_metric: str) -> None:
        """Tell W&B what the metrics are plotted against."""
        for key in (step_metric, *values):
            if key in self._defined:
                continue
            self._defined.add(key)
            for run in self._runs():
                if key == step_metric:
                    run.define_metric(key, hidden=True)
                else:
                    run.define_metric(key, step_metric=step_metric)


def _no_formula(cell: Any) -> Any:
    """A text cell as itself, or behind an apostrophe where it begins like a formula."""
    is_formula = isinstance(cell, str) and len(cell) > 1 and cell[0] in "=+-@\t\r\n"
    return f"'{cell}" if is_formula else cell


def _wandb() -> Any:
    """The client; late, since importing it takes a second that most runs need not spend."""
    import wandb

    return wandb
