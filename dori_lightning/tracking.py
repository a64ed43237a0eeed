"""What the loggers of a run are told, and who the run is to them.

``Tracker`` speaks to all loggers of a run; each takes what it has a place for. Metrics are
``stage/name`` and are plotted against a step of their own, ``stage/step``: the steps of an
attack, of an audit's budget and of a training have nothing to do with each other. W&B drops what
comes with a step below one that it has seen, so its own step is never given.
"""

from __future__ import annotations

import json
import math
import netrc
import os
import re
import secrets
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from dori_lightning.runtime.artifacts import write_json
from dori_lightning.types import InputError, first_line

_FILE = "tracking.json"
_LONGEST_TAG = 64

_FIRST_HOST = "api.wandb.ai"
"""Where keys belong that were stored before the client's address changed."""


class Tracker:
    """All loggers of a run as one; without loggers, as on all ranks but the first, a no-op."""

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        """Forward to loggers.

        Args:
            loggers: Lightning loggers; scalars and the summary go to each, images, tables and
                files to those of W&B.
        """
        self.loggers = list(loggers)
        self._defined: set[str] = set()

    def add(self, logger: Logger) -> None:
        """Forward to one more logger."""
        self.loggers.append(logger)

    def scalars(
        self, rows: Iterable[tuple[int, Mapping[str, float]]], *, step_metric: str
    ) -> None:
        """Log metrics against a step of their own.

        Args:
            rows: Step, and its metrics by key such as ``attack/loss``.
            step_metric: Key of the steps, such as ``attack/step``.
        """
        for step, values in rows:
            self._define(values, step_metric)
            for logger in self.loggers:
                # W&B counts its own steps, see the top of the file
                own = None if isinstance(logger, WandbLogger) else step
                logger.log_metrics({**values, step_metric: step}, step=own)

    def image(self, event: str, image: Image.Image | None, *, caption: str) -> None:
        """Log the one image of an event, such as the grid of an attack's results.

        Args:
            event: Key, such as ``pictures/prompt``.
            image: The image; None where images are not to be shown.
            caption: How to read it.
        """
        if image is not None:
            for run in self._runs():
                run.log({event: _wandb().Image(image, caption=caption)})

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a table, once a run.

        Args:
            name: Its key.
            rows: Scalars, text, None and PIL images by column; a number that is not finite becomes
                None. Text that a spreadsheet would take for a formula is told apart by an
                apostrophe: W&B exports tables as CSV, and prompts are other people's.
        """
        for run in self._runs() if rows else ():
            data = [[_table_cell(cell) for cell in row.values()] for row in rows]
            run.log({name: _wandb().Table(columns=list(rows[0]), data=data)})

    def summary(self, values: Mapping[str, float | str | None]) -> None:
        """Set the values that runs are compared by; None and non-finite numbers are left out."""
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
        """Log files as one version of an artifact.

        Args:
            name: Name of the artifact; other runs may add versions to it.
            kind: Type of the artifact: ``embedding``, ``edit``, ``report``, ``table``.
            files: Name in the artifact to file; files that do not exist are left out.
            metadata: Where the files come from.
            copy: Copy the files into the run's staging folder: for those that lie outside of the
                run folder or may be written again before they are uploaded.
        """
        existing = {inside: path for inside, path in files.items() if path.is_file()}
        if not existing:
            return
        for run in self._runs():
            made = _wandb().Artifact(
                re.sub(r"[^A-Za-z0-9._-]", "-", name), kind, metadata=dict(metadata or {})
            )
            for inside, path in existing.items():
                made.add_file(str(path), name=inside, policy="mutable" if copy else "immutable")
            run.log_artifact(made)

    def training(self, stage: str) -> TrainingLogger:
        """Make a logger for a Trainer, whose metrics are plotted against ``stage/step``."""
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
        """Tell W&B which step the metrics are plotted against."""
        for key in (step_metric, *values):
            if key in self._defined:
                continue
            self._defined.add(key)
            for run in self._runs():
                if key == step_metric:
                    run.define_metric(key, hidden=True)
                else:
                    run.define_metric(key, step_metric=step_metric)


def _table_cell(cell: Any) -> Any:
    if isinstance(cell, Image.Image):
        return _wandb().Image(cell)
    if isinstance(cell, float) and not math.isfinite(cell):
        return None
    is_formula = isinstance(cell, str) and len(cell) > 1 and cell[0] in "=+-@\t\r\n"
    return f"'{cell}" if is_formula else cell


def _wandb() -> Any:
    """The client; late, since importing it takes a second that most runs need not spend."""
    import wandb

    return wandb


class TrainingLogger(Logger):
    """Lightning logger of one training within a run.

    Lightning's own W&B logger would plot everything against ``trainer/global_step``, where the
    trainings of a run overwrite each other.
    """

    def __init__(self, tracker: Tracker, stage: str) -> None:
        """Log the training of a stage.

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
        """Empty: a stage has one training."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Pass a step's metrics on, without Lightning's count of epochs."""
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        if values and step is not None:
            self._tracker.scalars([(step, values)], step_metric=f"{self.stage}/step")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Do nothing: the run's configuration holds them."""


@dataclass(frozen=True)
class RunIdentity:
    """The identity of a run, given to its loggers before it begins.

    Attributes:
        id: Unique id; a resumed run has the same one.
        name: Readable name.
        group: The same for all jobs of a sweep; None for a run on its own.
        job_type: The task.
        tags: Checkpoint, mitigation and version, to filter runs by.
        config: Resolved configuration and provenance, without secrets.
    """

    id: str
    name: str
    group: str | None
    job_type: str
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def kept_id(folder: Path, purpose: str, *, prefix: str = "", given: str | None = None) -> str:
    """Read the id that a folder stores for a purpose; made at the first call.

    Args:
        folder: Run folder or sweep folder, shared by all processes that need the same id.
        purpose: Name of the id within the folder.
        prefix: First part of a new id.
        given: The new id, where somebody else chose one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FILE
    with FileLock(folder / f".{_FILE}.lock"):
        ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if purpose not in ids:
            ids[purpose] = given or f"{prefix}{secrets.token_hex(4)}"
            write_json(path, ids)
        return str(ids[purpose])


_OFFLINE_RUNS = "wandb/offline-run-*"


def sync_command(folder: Path, *, sweep: bool = False) -> str:
    """The line for a shell that uploads what was written offline.

    A run that was resumed has several parts of one id, which the client joins, the oldest first.

    Args:
        folder: Run folder, or the folder of a sweep.
        sweep: Whether it holds the run folders of a sweep.
    """
    return f"wandb sync {shlex.quote(str(folder))}/{'*/' if sweep else ''}{_OFFLINE_RUNS}"


def has_offline_runs(folder: Path, *, sweep: bool = False) -> bool:
    """Whether a run, or any run of a sweep, was written offline."""
    return any(folder.glob(f"{'*/' if sweep else ''}{_OFFLINE_RUNS}"))


@dataclass(frozen=True)
class WeightsAndBiases:
    """How runs appear in Weights & Biases; a key cannot be set here, on purpose.

    Attributes:
        project: Project that the runs belong to.
        entity: Team or user; None for the account's default.
        group: Group of the run; None for the id of the sweep, made once for all its jobs.
        name: Readable name; None for the overrides in which a sweep's jobs differ.
        tags: Tags besides checkpoint, mitigation and version.
        offline: Write into the run folder alone, for ``wandb sync``; None to do so where neither
            ``WANDB_API_KEY`` nor ``wandb login`` gives a key. ``WANDB_MODE`` decides over None.
    """

    project: str = "dori_lightning"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: tuple[str, ...] = ()
    offline: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tags", tuple(self.tags))

    def start(self, run: RunIdentity, folder: Path) -> WandbLogger:
        """Open the run.

        Args:
            run: Its identity.
            folder: Run folder, for the client's files.

        Raises:
            InputError: The run is to be online, and there is no key or no connection.
        """
        import wandb

        try:
            started = wandb.init(
                project=self.project,
                entity=self.entity,
                dir=str(folder),
                id=run.id,
                resume="allow",
                name=self.name or run.name,
                group=self.group or run.group,
                job_type=run.job_type,
                tags=[*dict.fromkeys(tag[:_LONGEST_TAG] for tag in (*run.tags, *self.tags))],
                config=dict(run.config),
                mode=self._mode(),
                # the client's own metadata holds the command line as it was typed, secrets too
                settings=wandb.Settings(x_disable_meta=True, disable_git=True),
            )
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            raise InputError(
                f"no online run in Weights & Biases: {first_line(error)}\n"
                f"  where: logger.wandb\n"
                f"  fix:   wandb login, or logger.wandb.offline=true and later:\n"
                f"         {sync_command(folder)}"
            ) from error
        return WandbLogger(experiment=started, save_dir=folder)

    def _mode(self) -> Any:
        """W&B's mode; None leaves it to ``WANDB_MODE``."""
        if self.offline is None and "WANDB_MODE" in os.environ:
            return None
        offline = not _key_is_set() if self.offline is None else self.offline
        return "offline" if offline else "online"


def _key_is_set() -> bool:
    """Whether the environment, the client's settings or a netrc file hold a key; stays offline."""
    import wandb

    settings = wandb.setup().settings
    if os.environ.get("WANDB_API_KEY") or settings.api_key or settings.identity_token_file:
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except FileNotFoundError:
        return False
    except netrc.NetrcParseError as error:
        raise InputError(
            f"cannot look for a key of Weights & Biases: {error}\n"
            f"  where: {error.filename}\n"
            f"  fix:   repair the file, or set logger.wandb.offline=true or false"
        ) from None
    hosts = (urlsplit(settings.base_url).netloc, _FIRST_HOST)
    return any(known.authenticators(host) is not None for host in hosts)
