"""Choose the feed-forward weights that a text embedding uses more than a base does.

Reference: Chavhan et al., Memorized images in diffusion models share a subspace that can be
located and deleted (2024); the scores are Wanda's (Sun et al., 2024).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from dori_lightning.mitigations.wanda_norms import input_norms, pooled
from dori_lightning.progress import stage
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dori_lightning.mitigations.wanda_norms import Tracing
    from dori_lightning.models.protocol import TextToImage

__all__ = ["select", "select_over_time", "wanda_masks"]


def wanda_masks(
    model: TextToImage,
    embeddings: torch.Tensor,
    base_embeddings: torch.Tensor,
    *,
    tracing: Tracing,
    fraction: float,
    select_ratio: float = 0.0,
    pool: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Masks of text embeddings, of prompts or from anywhere else.

    The model runs before this returns, in passes that all embeddings share; masks are made one
    by one as they are asked for, since each is as large as the layers. On the CPU an embedding's
    mask does not depend on the others.

    Args:
        model: Checkpoint; left as it was.
        embeddings: Text embeddings (N, T, D).
        base_embeddings: Those they are compared with (M, T, D); their norms are pooled.
        tracing: Which passes are looked at.
        fraction: Share of each output row that may be pruned, in (0, 1).
        select_ratio: Share of the steps in which a weight must be chosen more often; 0 is the
            union over steps.
        pool: One mask for all embeddings, from their pooled norms, rather than one for each.

    Returns:
        For each embedding in turn: ``<layer>.weight`` to (C_out, C_in), True where pruned, on
        the CPU.

    Raises:
        InputError: The sampler takes fewer steps, or ``fraction`` of a row is less than one
            weight.
    """
    weights = {
        name: _weight(layer)
        for name, layer in model.layers("feed_forward.out", tracing.stages).items()
    }
    for name, weight in weights.items():
        _check_row(name, weight.shape[1], fraction)
    count = len(embeddings)
    device = model.device
    together = torch.cat([embeddings.to(device), base_embeddings.to(device)])
    norms = input_norms(model, together, tracing)
    base = {name: pooled(value[count:]) for name, value in norms.items()}
    if pool:
        targets = [{name: pooled(value[:count]) for name, value in norms.items()}]
    else:
        targets = [{name: value[k] for name, value in norms.items()} for k in range(count)]

    def made() -> Iterator[dict[str, torch.Tensor]]:
        with stage("wanda: select", len(targets)) as advance:
            for target in targets:
                yield {
                    f"{name}.weight": select_over_time(
                        weight,
                        target[name],
                        base[name],
                        fraction=fraction,
                        select_ratio=select_ratio,
                    ).cpu()
                    for name, weight in weights.items()
                }
                advance(1)

    return made()


def select(
    weight: torch.Tensor, target_norm: torch.Tensor, base_norm: torch.Tensor, fraction: float
) -> torch.Tensor:
    """Weights that are among a row's most important and more important than for the base.

    Args:
        weight: (C_out, C_in), any float dtype; scores are fp32.
        target_norm: Norms of a step's inputs under the target (C_in,), >= 0.
        base_norm: The same under the base (C_in,).
        fraction: r; the floor(r C_in) highest scores |weight| * norm of each row are candidates.

    Returns:
        Boolean mask (C_out, C_in).
    """
    size = weight.detach().abs().float()
    target, base = size * target_norm, size * base_norm
    top = target.topk(_row_count(weight.shape[1], fraction), dim=1).indices
    chosen = torch.zeros_like(target, dtype=torch.bool).scatter_(1, top, True)
    return chosen & (target > base)


def select_over_time(
    weight: torch.Tensor,
    target_norms: torch.Tensor,
    base_norms: torch.Tensor,
    *,
    fraction: float,
    select_ratio: float,
) -> torch.Tensor:
    """Weights that ``select`` chooses in more than ``select_ratio`` of S steps.

    Args:
        weight: (C_out, C_in).
        target_norms: Norms of each step (S, C_in).
        base_norms: The same under the base (S, C_in).
        fraction: As for ``select``.
        select_ratio: In [0, 1).

    Returns:
        Boolean mask (C_out, C_in).
    """
    times = torch.zeros(weight.shape, dtype=torch.int32, device=weight.device)
    for target, base in zip(target_norms, base_norms, strict=True):
        times += select(weight, target, base, fraction)
    return times > select_ratio * len(target_norms)


def _row_count(width: int, fraction: float) -> int:
    # 0.29 * 100 is 28.999...96 in floating point
    return math.floor(fraction * width + 1e-9)


def _check_row(name: str, width: int, fraction: float) -> None:
    if _row_count(width, fraction) < 1:
        raise InputError(
            f"{fraction} of the {width} weights in a row of {name} is less than one weight\n"
            f"  where: mitigation.fraction\n"
            f"  mend:  at least {1 / width:.4g}, or drop the layer's stage from mitigation.stages"
        )


def _weight(layer: torch.nn.Module) -> torch.Tensor:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight
