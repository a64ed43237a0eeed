"""Where a run's numbers come from."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dori_lightning.report.record import Provenance, redact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.models.stable_diffusion import StableDiffusion
    from dori_lightning.types import Pair

__all__ = ["git_sha", "package_versions", "plain", "provenance_of"]

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


def plain(cfg: DictConfig) -> dict[str, Any]:
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
        config=redact(plain(cfg)),
        checkpoint=model.name,
        fingerprint=model.fingerprint,
        image_hashes={pair.id: pair.sha256 for pair in pairs},
        started=started,
        finished=finished,
        unet_evaluations=model.unet_evaluations,
        wall_seconds=(finished - started).total_seconds(),
    )
