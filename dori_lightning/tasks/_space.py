"""What an audit will write, estimated before hours are spent on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dori_lightning.attacks.budget import looked_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.attacks.settings import AttackSettings
    from dori_lightning.models.protocol import Sampling, TextToImage
    from dori_lightning.types import Budget, Pair

__all__ = ["audit_bytes"]

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

    Edits are not among it: mitigations ask for what they write themselves.

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
