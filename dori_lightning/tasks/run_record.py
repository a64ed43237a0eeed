"""Where a run's numbers come from."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.report.record import Provenance
from dori_lightning.runtime import peers
from dori_lightning.runtime.redaction import redact
from dori_lightning.runtime.signals import Interrupted
from dori_lightning.tracking import RunIdentity, Tracker, WeightsAndBiases, kept_id
from dori_lightning.types import InputError, Pair

# -------- provenance

_PACKAGES = (
    "dori_lightning",
    "torch",
    "lightning",
    "diffusers",
    "transformers",
    "torchmetrics",
    "hydra-core",
    "numpy",
    "pillow",
)


def to_container(cfg: DictConfig) -> dict[str, Any]:
    """Resolved configuration as plain containers."""
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    return {str(k): v for k, v in resolved.items()}


def git_sha() -> str | None:
    """Commit of the checkout this package runs from; None outside of one.

    Uncommitted changes add ``-dirty``.
    """
    here = Path(__file__).resolve().parent
    command = (
        "git",
        "-C",
        str(here),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    )
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide numbers."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def provenance_of(
    cfg: DictConfig, model: StableDiffusion, pairs: Sequence[Pair], *, started: datetime
) -> Provenance:
    """Describe a run that ends now."""
    import torch

    finished = datetime.now(UTC)
    device = (
        torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else f"CPU ({platform.machine()})"
    )
    return Provenance(
        git_sha=git_sha(),
        packages=package_versions(),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        device=device,
        seed=int(cfg.seed),
        config=redact(to_container(cfg)),
        checkpoint=model.name,
        fingerprint=model.fingerprint,
        image_hashes={pair.id: pair.sha256 for pair in pairs},
        started=started,
        finished=finished,
        unet_evaluations=model.unet_evaluations,
        wall_seconds=(finished - started).total_seconds(),
    )


# -------- tracking
# Open the loggers that a configuration asks for, and close them however the task ends.

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
        if cfg.logger and peers.speaks():
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
    config = redact(to_container(cfg))
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
