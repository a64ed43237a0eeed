"""How the K pictures of a pair become one number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["Aggregation", "per_pair"]

Aggregation = Literal["max", "median"]


def per_pair(similarities: ArrayLike, aggregation: Aggregation = "max") -> np.ndarray:
    """Reduce the K pictures of a pair to one number.

    Args:
        similarities: (..., K) similarities in [-1, 1], K >= 1.
        aggregation: ``max`` or ``median``.

    Returns:
        (...) float64; NaN where any of the K is NaN: what was not seen is not safe.

    Raises:
        ValueError: No pictures, or another aggregation.
    """
    array = np.asarray(similarities, np.float64)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(
            f"need at least one picture per pair, got similarities of shape {array.shape}"
        )
    if aggregation == "max":
        return np.asarray(array.max(-1))
    if aggregation == "median":
        return np.asarray(np.median(array, -1))
    raise ValueError(f"aggregation must be max or median, got {aggregation!r}")
