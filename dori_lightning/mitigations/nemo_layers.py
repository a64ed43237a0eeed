"""Which value layers carry the conditioning: measured on the checkpoint, not assumed.

NeMo's seven layers are those that matter in Stable Diffusion v1; another checkpoint may carry its
conditioning elsewhere, and then pruning them hides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dori_lightning.attacks.draws import keyed_generator
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from dori_lightning.models.protocol import Sampling, TextToImage

__all__ = ["LayerInfluence", "layer_influence"]


@dataclass(frozen=True)
class LayerInfluence:
    """What it does to the predicted noise when one value layer sees the empty prompt instead.

    Attributes:
        change: Norm of the difference over the norm of the noise; mean over prompts.
        share: Norm of the difference over that of the difference which the empty prompt makes
            everywhere; 1 where this layer carries all that the prompt does. Shares need not add
            up to 1.
    """

    change: float
    share: float


@torch.no_grad()
def layer_influence(
    model: TextToImage,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    seed: int = 0,
    timestep: int | None = None,
) -> dict[str, LayerInfluence]:
    """Measure every cross-attention value layer, in execution order.

    The latents are the model's own pictures of the prompts, noised again, so that no pictures are
    needed and the model sees what it would see while it generates.

    Args:
        model: The checkpoint.
        prompts: A few ordinary prompts, N.
        sampling: How their pictures are generated.
        seed: Of the two noises.
        timestep: Where the noise is predicted; None for the middle of the schedule.

    Raises:
        InputError: There is no such timestep.
    """
    when = model.num_train_timesteps // 2 if timestep is None else timestep
    if not 0 <= when < model.num_train_timesteps:
        raise InputError(
            f"task.timestep must be in 0..{model.num_train_timesteps - 1}, got {timestep}"
        )
    embeddings = model.encode_prompts(prompts)
    start, noise = (
        torch.randn(
            (len(prompts), *model.latent_shape),
            generator=keyed_generator("layer influence", seed, which),
        ).to(model.device)
        for which in ("start", "noise")
    )
    timesteps = torch.full((len(prompts),), when, device=model.device)
    empty = model.empty_embedding()
    with model.frozen():
        noised = model.noised(model.denoise(embeddings, start, sampling), noise, timesteps)
        usual = model.predict_noise(noised, timesteps, embeddings)
        without = model.predict_noise(noised, timesteps, empty.expand_as(embeddings))
        found = {}
        for name, layer in model.layers("cross_attention.value").items():
            handle = layer.register_forward_hook(_empty_instead(empty))
            try:
                changed = model.predict_noise(noised, timesteps, embeddings)
            finally:
                handle.remove()
            found[name] = LayerInfluence(
                change=_ratio(changed - usual, usual),
                share=_ratio(changed - usual, without - usual),
            )
    return found


def _empty_instead(empty: torch.Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> Any:
        # forward itself, which calls no hooks
        return module.forward(empty.to(inputs[0].dtype).expand_as(inputs[0]))

    return hook


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float:
    """Mean over rows of a ratio of norms; 0 where both are zero."""
    norms, scales = part.flatten(1).norm(dim=1), whole.flatten(1).norm(dim=1)
    return float(torch.where(norms == 0, torch.zeros_like(norms), norms / scales).mean())
