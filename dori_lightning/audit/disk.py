"""Disk space that an audit takes, estimated before hours are spent on it."""

from collections.abc import Sequence

from dori_lightning.attacks.budget import AttackSettings, evaluation_steps
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.types import Budget, Pair

BYTES_PER_PIXEL = 3.0
"""Of a PNG, at most: noise does not compress."""

FILE_OVERHEAD = 4096
"""Bytes that a file takes besides its content: a block that is not filled, its header."""

REPORT_BYTES = 5_000_000
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
    """Bytes that an audit writes, at most: images, embeddings, encodings and the report.

    Edits are not among them: mitigations check the space for what they write themselves.

    Args:
        model: The checkpoint.
        pairs: Pairs under audit.
        settings: Attack settings.
        budget: Resolved budget.
        sampling: How images are generated.
        mitigated: Whether prompts are also generated from without the mitigation.
    """
    length, width = model.embedding_shape
    channels, height, side = model.latent_shape
    snapshots = len(evaluation_steps(settings.snapshots, budget.steps))
    attacks = sum(len(settings.inits_of(pair.kind)) for pair in pairs) * settings.restarts
    prompts = len(pairs) * (2 if mitigated else 1)
    images = (prompts + attacks * snapshots) * sampling.images_per_pair
    # an attack that can go on also keeps its offset and two means
    kept = snapshots + (3 if settings.early_stop else 0)
    embedding, latent = 4 * length * width, 4 * channels * height * side
    return round(
        images * (model.resolution**2 * BYTES_PER_PIXEL + FILE_OVERHEAD)
        + attacks * (kept * embedding + FILE_OVERHEAD)
        + len(pairs) * (embedding + latent + FILE_OVERHEAD)
        + REPORT_BYTES
    )
