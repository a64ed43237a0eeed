"""Whether the disk holds what an audit will write, estimated before hours are spent on it."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

from dori_lightning.attacks.budget import looked_at
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dori_lightning.attacks.settings import AttackSettings
    from dori_lightning.models.protocol import Sampling, TextToImage
    from dori_lightning.types import Budget, Pair

__all__ = ["audit_bytes", "check_space"]

log = logging.getLogger(__name__)

_BYTES_PER_PIXEL = 3.0
"""Of a PNG, at most: noise does not compress."""

_FILE = 4096
"""What a file takes besides its content: a block that is not filled, its header."""

_REPORT = 5_000_000
"""Record, figures and page, which holds thumbnails of a limited number of pairs."""


def audit_bytes(
    model: TextToImage,
    pairs: Sequence[Pair],
    *,
    settings: AttackSettings,
    budget: Budget,
    sampling: Sampling,
    mitigated: bool,
) -> int:
    """Bytes that an audit writes, at most: pictures, embeddings, encodings and the report.

    Edits are not among it: how large one is depends on the mitigation.

    Args:
        model: The checkpoint.
        pairs: Pairs under audit.
        settings: Attack settings.
        budget: Resolved budget.
        sampling: How pictures are generated.
        mitigated: Whether prompts are also drawn without the mitigation.
    """
    length, width = model.embedding_shape
    channels, height, side = model.latent_shape
    snapshots = len(looked_at(settings.snapshots, budget.steps))
    attacks = sum(len(settings.inits_of(pair.kind)) for pair in pairs) * settings.restarts
    prompts = len(pairs) * (2 if mitigated else 1)
    pictures = (prompts + attacks * snapshots) * sampling.images_per_pair
    # a search that can go on also keeps its offset and two means
    kept = snapshots + (3 if settings.early_stop else 0)
    embedding, latent = 4 * length * width, 4 * channels * height * side
    return round(
        pictures * (model.resolution**2 * _BYTES_PER_PIXEL + _FILE)
        + attacks * (kept * embedding + _FILE)
        + len(pairs) * (embedding + latent + _FILE)
        + _REPORT
    )


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk does not hold.

    Args:
        folder: Run folder, there or not yet; what an earlier run left in it is not needed again.
        needed: Bytes, at most.

    Raises:
        InputError: Less is free; says how much of each.
    """
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(place).free
    log.info("writes up to %s, %s are free", _words(max(0, needed - there)), _words(free))
    if needed - there > free:
        raise InputError(
            f"the disk has {_words(free)} free, but up to {_words(needed - there)} are to be "
            f"written\n"
            f"  where: {folder}\n"
            f"  mend:  free space, choose another disk with paths.output=FOLDER, or write less: "
            f"fewer attack.snapshots or sampling.images_per_pair"
        )


def _words(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
