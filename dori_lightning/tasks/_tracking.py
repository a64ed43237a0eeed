"""Open the loggers that a configuration asks for, and close them however the task ends."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dori_lightning import ranks
from dori_lightning.interruption import Interrupted
from dori_lightning.redaction import redact
from dori_lightning.tasks._provenance import git_sha, package_versions, plain
from dori_lightning.tracking.identity import RunIdentity, kept_id
from dori_lightning.tracking.tracker import Tracker
from dori_lightning.tracking.weights_and_biases import WeightsAndBiases
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lightning.pytorch.loggers import Logger
    from omegaconf import DictConfig

__all__ = ["logged", "tracked"]

_SWEEP = "multirun.yaml"
_SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
_LONGEST = 120
"""Characters of a name; W&B takes 128."""


@contextmanager
def tracked(cfg: DictConfig, folder: Path, *, tags: Sequence[str] = ()) -> Iterator[Tracker]:
    """Loggers of one run, which are told how it ended.

    Args:
        cfg: The run's configuration.
        folder: Run folder; everything that loggers write is in it.
        tags: What to filter runs by, besides the version.

    Yields:
        The loggers of ``cfg.logger``; none on every process but the first.

    Raises:
        InputError: A logger cannot be opened.
    """
    tracker = Tracker()
    try:
        if cfg.logger and ranks.speaks():
            for logger in _opened(cfg, folder, tags):
                tracker.add(logger)
        yield tracker
    except BaseException as error:
        code = _exit_code(error)
        if code:
            tracker.summary({"error": redact(_said(error))})
        tracker.finish(code)
        raise
    tracker.finish()


def logged(run: Callable[[DictConfig, Path], None]) -> Callable[[DictConfig, Path], None]:
    """Log how a task ends that has nothing to tell on the way: its settings, and its exit code."""

    @functools.wraps(run)
    def tell(cfg: DictConfig, folder: Path) -> None:
        with tracked(cfg, folder):
            run(cfg, folder)

    return tell


def _opened(cfg: DictConfig, folder: Path, tags: Sequence[str]) -> Iterator[Logger]:
    run = _identity(cfg, folder, tags)
    for node in cfg.logger.values():
        made = instantiate(node)
        yield (
            made.start(run, folder)
            if isinstance(made, WeightsAndBiases)
            else made(save_dir=folder)
        )


def _identity(cfg: DictConfig, folder: Path, tags: Sequence[str]) -> RunIdentity:
    config = redact(plain(cfg))
    about: dict[str, Any] = {
        "folder": str(folder),
        "git_sha": git_sha(),
        "packages": package_versions(),
        **{name.lower(): os.environ[name] for name in _SLURM if name in os.environ},
    }
    group, name = None, str(cfg.name)
    if HydraConfig.initialized():
        settings = HydraConfig.get()
        own = list(settings.overrides.task)
        about["choices"] = dict(settings.runtime.choices)
        about["overrides"] = redact([_unescaped(override) for override in own])
        if settings.mode is RunMode.MULTIRUN:
            place = Path(settings.sweep.dir)
            given = _given(place / _SWEEP)
            group = _sweep_id(place, str(cfg.sweep), given)
            name = _differing(own, given) or name
    return RunIdentity(
        id=kept_id(folder, "run"),
        name=redact(name)[:_LONGEST],
        group=group,
        job_type=str(cfg.task.name),
        tags=(*tags, f"v{version('dori_lightning')}"),
        config={**config, "run": about},
    )


def _given(path: Path) -> list[str]:
    """What a sweep was told: overrides of its file and of its command line, the latter last."""
    if not path.is_file():
        return []
    cfg = OmegaConf.load(path)
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    told = OmegaConf.select(cfg, "hydra.overrides.task") or []
    return [*(f"{key}={value}" for key, value in params.items()), *map(str, told)]


def _sweep_id(place: Path, name: str, given: Sequence[str]) -> str:
    """Id of a sweep: made by the job that asks first, found again by the others and on a resume.

    Another command in the same folder is another sweep.
    """
    told = hashlib.sha256(json.dumps(sorted(given)).encode()).hexdigest()[:16]
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M")
    return kept_id(place, f"sweep {told}", prefix=f"{name}-{now}-")


def _differing(own: Sequence[str], given: Sequence[str]) -> str:
    """The overrides in which a job differs from others of its sweep; groups by their last part."""
    parser = OverridesParser.create()
    swept = {o.key_or_group for o in parser.parse_overrides(list(given)) if o.is_sweep_override()}
    parts = []
    for override in parser.parse_overrides(list(own)):
        if override.key_or_group in swept:
            key = override.key_or_group.rpartition("/")[2]
            parts.append(f"{key}={_unescaped(override.get_value_element_as_str())}")
    return ", ".join(parts)


def _unescaped(override: str) -> str:
    """An override as it was meant: escapes would hide an address and its password."""
    return re.sub(r"\\(.)", r"\1", override)


def _exit_code(error: BaseException) -> int:
    """The code that the program ends with for an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, Interrupted):
        return error.code
    return 2 if isinstance(error, InputError) else 1


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
