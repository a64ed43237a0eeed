"""Which of a pair's reference images attacks and mitigations aim at."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dori_lightning.audit.context import AuditContext, reference_images
from dori_lightning.metrics.calibration import ReferenceImages
from dori_lightning.metrics.replication import per_pair
from dori_lightning.models.generation import (
    GenerationRequest,
    baseline_cache_key,
    generate_images,
    image_seeds,
    load_images,
)
from dori_lightning.models.protocol import Sampling, TextToImage
from dori_lightning.runtime import distributed
from dori_lightning.runtime.logging import progress_bar
from dori_lightning.types import Pair, Pairs


def aim(context: AuditContext) -> AuditContext:
    """Aim an audit's pairs, as ``aimed_pairs`` does; the context itself where none has a choice.

    Called when all processes are there.
    """
    pairs = aimed_pairs(
        context.pairs,
        context.references,
        model=context.model,
        sampling=context.sampling,
        cache=context.cache,
    )
    if pairs == tuple(context.pairs):
        return context
    measures = context.references.measures
    return replace(
        context,
        pairs=Pairs(pairs, skipped=context.pairs.skipped),
        data=context.data.with_pairs(pairs),
        references=reference_images(pairs, context.model.resolution, measures),
    )


def aimed_pairs(
    pairs: Sequence[Pair],
    references: ReferenceImages,
    *,
    model: TextToImage,
    sampling: Sampling,
    cache: Path,
) -> tuple[Pair, ...]:
    """Aim each pair with several reference images at the one that its prompt draws best.

    That is the one most similar, by the configured decider, to the images that the checkpoint
    generates from the prompt without an edit; of equals the first. So every mitigation and attack
    of a sweep aims at the same image. Pairs with one image stay as they are, and where there are
    no others nothing is generated.

    Args:
        pairs: The audited pairs.
        references: Their reference images, in the pairs' order.
        model: The checkpoint, without an edit.
        sampling: How images are generated.
        cache: Folder shared by the jobs of a sweep; the images are kept there for the audit.
    """
    several = [pair for pair in pairs if pair.others]
    if not several:
        return tuple(pairs)
    folder = cache / "unmitigated" / baseline_cache_key(model, sampling) / "prompt"
    own = several[distributed.rank() :: distributed.world_size()]
    requests = [
        GenerationRequest(
            folder / pair.id, model.encode_prompts([pair.prompt]).float().cpu()[0], pair.id
        )
        for pair in own
    ]
    total = len(requests) * sampling.images_per_pair
    with progress_bar("choose references", total) as advance:
        generate_images(model, requests, sampling, advance=advance)
    measures = references.measures
    best = {}
    for pair, request in zip(own, requests, strict=True):
        images = load_images(request.folder, image_seeds(sampling))
        described = measures.descriptors[measures.decider].describe(images)
        each = references.compare(measures.decider, described, pair).numpy()
        best[pair.id] = int(np.argmax(per_pair(each.T)))
    chosen = distributed.all_gather_dict(best)
    return tuple(
        pair.aimed_at(pair.references[chosen[pair.id]]) if pair.others else pair for pair in pairs
    )
