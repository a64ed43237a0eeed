"""Edits of tiny models."""

import torch

from dori_lightning.mitigations.edits import MaskEdit, Origin
from dori_lightning.models.latent_diffusion import LatentDiffusion


def value_masks(model: LatentDiffusion, row: int = 0) -> MaskEdit:
    """A mask over one output row of the first value layer."""
    name = f"{next(iter(model.layers('text.value')))}.weight"
    rows = dict(model.denoiser().named_parameters())[name].shape[0]
    return MaskEdit(Origin(model.fingerprint), {name: torch.arange(rows) == row})
