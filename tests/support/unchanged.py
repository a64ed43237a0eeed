"""Everything of a model that an edit, a fit or an attack could leave changed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dori_lightning.models.stable_diffusion import StableDiffusion


def _bytes(parameter: torch.Tensor) -> bytes:
    """Its bits; numpy has no bf16."""
    return parameter.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()


def state_of(model: StableDiffusion) -> dict[str, Any]:
    """Weights (another sign of zero would show), their flags, modes, hooks and the filter."""
    unet = model.denoiser()
    return {
        "weights": {
            name: (p.dtype, hashlib.blake2b(_bytes(p)).hexdigest())
            for name, p in unet.named_parameters()
        },
        "requires_grad": [p.requires_grad for p in unet.parameters()],
        "gradients": [name for name, p in unet.named_parameters() if p.grad is not None],
        "training": [module.training for module in unet.modules()],
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for name, m in unet.named_modules()
        },
        "filter": model.embedding_filter,
    }


@contextmanager
def unchanged(model: StableDiffusion) -> Iterator[None]:
    """Fail where the block leaves anything of the model other than it was."""
    before = state_of(model)
    yield
    assert state_of(model) == before
