"""What transformers with joint attention and flow matching share: SD3 and FLUX.1.

In diffusers' names: text has projections and a feed-forward layer of its own in every joint block.
"""

from collections.abc import Mapping
from typing import Any

from dori_lightning.models.protocol import LayerRole

JOINT_TEXT_WEIGHTS = (
    r"\.(add_[qkv]_proj|norm_added_[qk]|to_add_out|ff_context|norm1_context)\."
    r"|^context_embedder\."
)
"""Pattern of weights through which text enters."""

JOINT_OUTER_WEIGHTS = r"^(time_text_embed|norm_out|proj_out)\."
"""Pattern of weights outside of all blocks."""

_JOINT_ENDINGS: dict[LayerRole, str] = {
    "text.value": r"attn\.add_v_proj",
    "text.key": r"attn\.add_k_proj",
    "feed_forward.out": r"ff\.net\.2",
    "feed_forward.out.text": r"ff_context\.net\.2",
}


def joint_layers(stage: str) -> dict[tuple[LayerRole, str], str]:
    """Names of the joint blocks' layers by role, all in one stage, as patterns.

    ``attn2``, which some blocks have, is a second attention among the image's tokens and in no
    role.
    """
    return {
        (role, stage): rf"transformer_blocks\.\d+\.{ending}"
        for role, ending in _JOINT_ENDINGS.items()
    }


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
