"""The record of a run: its provenance, and its loggers, which are told how it ended."""

import functools
import logging
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from dori_lightning.config import unescaped
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.report.record import Provenance
from dori_lightning.runtime import peers
from dori_lightning.runtime.artifacts import content_hash, drop_keys
from dori_lightning.runtime.redaction import redact
from dori_lightning.runtime.signals import Interrupted
from dori_lightning.tasks.status import sweep_overrides
from dori_lightning.tracking import (
    RunIdentity,
    Tracker,
    WeightsAndBiases,
    has_offline_runs,
    kept_id,
    sync_command,
)
from dori_lightning.types import InputError, Pair, first_line

log = logging.getLogger(__name__)

_PACKAGES = (
    "dori_lightning", "torch", "lightning", "diffusers", "transformers", "torchmetrics",
    "hydra-core", "numpy", "pillow",
)  # fmt: skip
"""Packages that decide numbers."""

_SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
_NAME_LENGTH = 120
"""Characters of a run's name; W&B takes 128."""


def to_container(cfg: DictConfig) -> dict[str, Any]:
    """Resolved configuration as plain containers."""
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    return {str(k): v for k, v in resolved.items()}


_SINCE = {
    "family": "sd", "text_encoder_2": None, "storage": "auto", "transformer": None,
    "prompt_tokens": None, "lora": None,
}  # fmt: skip
"""Settings of a checkpoint that folders from before they existed lack, where they are at these."""


def deciding_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings that decide the results on it.

    Not ``base``: it says what else is attacked. Settings younger than a folder that could be
    resumed are left out where they are at their defaults.
    """
    free = ("device", "channels_last", "gradient_checkpointing", "text_encoders", "base")
    kept = {k: v for k, v in checkpoint.items() if k not in _SINCE or v != _SINCE[k]}
    return drop_keys(kept, *free)


FINGERPRINT = "checkpoint.fingerprint"
"""Where a run folder's settings name the checkpoint itself, known once it is loaded."""


def with_fingerprint(method: Mapping[str, Any], model: LatentDiffusion) -> dict[str, Any]:
    """Settings that decide a task's results, with the checkpoint that they were used on."""
    return {**method, "checkpoint": {**method["checkpoint"], "fingerprint": model.fingerprint}}


def git_sha() -> str | None:
    """Commit of the checkout this package runs from; None outside of one.

    Uncommitted changes add ``-dirty``.
    """
    here = str(Path(__file__).resolve().parent)
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        answer = subprocess.run(
            ("git", "-C", here, *describe), capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide numbers."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def numerics() -> dict[str, bool]:
    """Switches of torch that decide how a GPU rounds."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "tf32_matmul": cuda.matmul.allow_tf32,
        "tf32_convolution": cudnn.allow_tf32,
        "reduced_precision_bf16": bool(cuda.matmul.allow_bf16_reduced_precision_reduction),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": cudnn.benchmark,
        "flash_attention": cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        "efficient_attention": cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        "cudnn_attention": cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
    }


def provenance_of(
    cfg: DictConfig, model: LatentDiffusion, pairs: Sequence[Pair], *, started: datetime
) -> Provenance:
    """Describe a run that ends now."""
    finished, device = datetime.now(UTC), f"CPU ({platform.machine()})"
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
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
        image_hashes={
            **{pair.id: pair.sha256 for pair in pairs},
            **{f"{p.id}/{own.image.name}": own.sha256 for p in pairs for own in p.others},
        },
        started=started,
        finished=finished,
        unet_evaluations=model.unet_evaluations,
        coder_rows=replace(model.coder_rows),
        wall_seconds=(finished - started).total_seconds(),
        replaced=model.replaced,
        loras=model.loras,
        commit=model.commit,
        numerics=numerics() if model.device.type == "cuda" else {},
    )


@contextmanager
def tracked(cfg: DictConfig, folder: Path, *, tags: Sequence[str] = ()) -> Iterator[Tracker]:
    """Open the loggers of one run, and close them with its exit code however it ends.

    Args:
        cfg: The run's configuration.
        folder: Run folder; all files of loggers are in it.
        tags: What to filter runs by, besides the version.

    Yields:
        The loggers of ``cfg.logger``; none on every process but the first.

    Raises:
        InputError: A logger cannot be opened.
    """
    tracker = Tracker()
    try:
        if cfg.logger and peers.speaks():
            for logger in _opened_loggers(cfg, folder, tags):
                tracker.add(logger)
        yield tracker
    except BaseException as error:
        code = _exit_code(error)
        if code:
            tracker.summary({"error": redact(f"{type(error).__name__}: {first_line(error)}")})
        tracker.finish(code)
        raise
    else:
        tracker.finish()
    finally:
        if tracker.loggers and has_offline_runs(folder):
            log.info("Weights & Biases: offline. To upload this run:\n%s", sync_command(folder))


def logged(run: Callable[[DictConfig, Path], None]) -> Callable[[DictConfig, Path], None]:
    """Decorate a task that logs nothing but its settings and its exit code."""

    @functools.wraps(run)
    def run_tracked(cfg: DictConfig, folder: Path) -> None:
        with tracked(cfg, folder):
            run(cfg, folder)

    return run_tracked


def _opened_loggers(cfg: DictConfig, folder: Path, tags: Sequence[str]) -> Iterator[Logger]:
    identity = _identity(cfg, folder, tags)
    for node in cfg.logger.values():
        made = instantiate(node)
        if isinstance(made, WeightsAndBiases):
            yield made.start(identity, folder)
        else:
            yield made(save_dir=folder)


def _identity(cfg: DictConfig, folder: Path, tags: Sequence[str]) -> RunIdentity:
    about: dict[str, Any] = {
        "folder": str(folder),
        "git_sha": git_sha(),
        "packages": package_versions(),
        **{name.lower(): os.environ[name] for name in _SLURM if name in os.environ},
    }
    group, name = None, str(cfg.name)
    if HydraConfig.initialized():
        settings = HydraConfig.get()
        overrides = list(settings.overrides.task)
        about["choices"] = dict(settings.runtime.choices)
        about["overrides"] = redact([unescaped(override) for override in overrides])
        if settings.mode is RunMode.MULTIRUN:
            place = Path(settings.sweep.dir)
            swept = sweep_overrides(place)
            group = _sweep_id(place, str(cfg.sweep), swept)
            name = _differing(overrides, swept) or name
    return RunIdentity(
        # an agent of a W&B sweep names the one run that it starts
        id=kept_id(folder, "run", given=None if group else os.environ.get("WANDB_RUN_ID")),
        name=redact(name)[:_NAME_LENGTH],
        group=group,
        job_type=str(cfg.task.name),
        tags=(*tags, f"v{version('dori_lightning')}"),
        config={**redact(to_container(cfg)), "run": about},
    )


def _sweep_id(place: Path, name: str, overrides: Sequence[str]) -> str:
    """Id of a sweep: made by its first job, read by the others and on a resume.

    Other overrides in the same folder are another sweep.
    """
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M")
    purpose = f"sweep {content_hash(sorted(overrides))[:16]}"
    return kept_id(place, purpose, prefix=f"{name}-{now}-")


def _differing(job: Sequence[str], sweep: Sequence[str]) -> str:
    """The overrides in which a job differs from others of its sweep; groups by their last part."""
    parser = OverridesParser.create()
    swept = {o.key_or_group for o in parser.parse_overrides(list(sweep)) if o.is_sweep_override()}
    return ", ".join(
        f"{o.key_or_group.rpartition('/')[2]}={unescaped(o.get_value_element_as_str())}"
        for o in parser.parse_overrides(list(job))
        if o.key_or_group in swept
    )


def _exit_code(error: BaseException) -> int:
    """The code that the program ends with for an error."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, Interrupted):
        return error.code
    return 2 if isinstance(error, InputError) else 1
