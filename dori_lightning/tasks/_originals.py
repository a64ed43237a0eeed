"""Originals of pairs, ready to be compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dori_lightning.metrics.measure import Measures, Originals
from dori_lightning.pairs.images import image_tensor, square_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.types import Pair

__all__ = ["originals_of"]


def originals_of(pairs: Sequence[Pair], resolution: int, measures: Measures) -> Originals:
    """Read the pairs' pictures as the model sees them and describe them."""
    pictures = [image_tensor(square_image(pair.image), resolution) for pair in pairs]
    return Originals(pairs, torch.stack(pictures), measures)
