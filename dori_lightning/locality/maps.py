"""A picture of many embeddings in two dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from dori_lightning.locality.distances import distances

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.locality.groups import PromptSet, TriggerSet
    from dori_lightning.types import Init

__all__ = ["Place", "places_of"]

PERPLEXITY = 30.0
"""Of t-SNE; at most a third of the points. The paper does not give its own."""


@dataclass(frozen=True)
class Place:
    """One embedding in the picture.

    Attributes:
        what: ``start``, ``end``, ``own_prompt``, ``memorized_prompt`` or ``control_prompt``.
        pair: Whose.
        start: Where the attack began; None for prompts.
        restart: Which attack; an end and its start share it.
        pca: First two principal components.
        tsne: The two coordinates of t-SNE; distances between clusters mean little there.
    """

    what: Literal["start", "end", "own_prompt", "memorized_prompt", "control_prompt"]
    pair: str
    start: Init | None
    restart: int
    pca: tuple[float, float]
    tsne: tuple[float, float]


def places_of(
    triggers: Sequence[TriggerSet],
    *,
    memorized_prompts: PromptSet,
    control_prompts: PromptSet,
    seed: int = 0,
) -> tuple[Place, ...]:
    """Project starts, ends and prompts together.

    Args:
        triggers: Triggers of memorized images.
        memorized_prompts: Of other memorized images.
        control_prompts: Of control images.
        seed: Of t-SNE.

    Returns:
        One place per embedding; none where there are fewer than four.
    """
    names: list[tuple[Literal["start", "end", "own_prompt", "memorized_prompt", "control_prompt"],
                      str, Init | None, int]] = []  # fmt: skip
    rows: list[torch.Tensor] = []
    for own in triggers:
        for restart, start, end in zip(own.restarts, own.starts, own.ends, strict=True):
            names += [("start", own.pair.id, own.start, restart),
                      ("end", own.pair.id, own.start, restart)]  # fmt: skip
            rows += [start, end]
    for own in {own.pair.id: own for own in triggers}.values():
        names.append(("own_prompt", own.pair.id, None, 0))
        rows.append(own.prompt)
    names += [("memorized_prompt", pair.id, None, 0) for pair in memorized_prompts.pairs]
    names += [("control_prompt", pair.id, None, 0) for pair in control_prompts.pairs]
    rows += [*memorized_prompts.embeddings, *control_prompts.embeddings]
    if len(rows) < 4:
        return ()
    stacked = torch.stack(rows).flatten(1)
    pca = PCA(2, svd_solver="full").fit_transform(stacked.double().numpy())
    tsne = TSNE(
        2,
        perplexity=min(PERPLEXITY, (len(rows) - 1) / 3),
        metric="precomputed",
        init="random",
        random_state=seed,
    ).fit_transform(distances(stacked).numpy().astype(np.float32))
    return tuple(
        Place(what, pair, start, restart, (float(a), float(b)), (float(c), float(d)))
        for (what, pair, start, restart), (a, b), (c, d) in zip(names, pca, tsne, strict=True)
    )
