"""How much later a flow transformer begins on larger images, as its scheduler says."""

from collections.abc import Mapping
from typing import Any


def shift_of_tokens(config: Mapping[str, Any], tokens: int) -> float:
    """Exponent mu of the shift ``e^mu / (e^mu + 1 / s - 1)`` of noise levels s.

    Linear in the image's tokens between two sizes that the scheduler's configuration states.

    Reference: Esser et al. (2024), section 5.3.2, https://arxiv.org/abs/2403.03206.

    Args:
        config: Of a flow-matching scheduler with ``use_dynamic_shifting``.
        tokens: Image tokens that the denoiser sees.
    """
    small, large = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (large - small)
    return float(config["base_shift"] + slope * (tokens - small))
