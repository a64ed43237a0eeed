"""Progress of what a model is asked in one go: many prompts, or passes of its denoiser."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime.logging import progress_bar, with_progress


def encode_prompts(model: TextToImage, prompts: Sequence[str], title: str) -> torch.Tensor:
    """Prompts to embeddings (N, T, D), fp32, with a progress bar of that title."""
    return torch.cat([model.encode_prompts([prompt]) for prompt in with_progress(title, prompts)])


@contextmanager
def passes_shown(model: TextToImage, title: str, total: int) -> Iterator[None]:
    """Show a progress bar while open that each pass of the denoiser advances, of ``total``."""
    with (
        progress_bar(title, total) as advance,
        model.denoiser().register_forward_hook(lambda *_: advance(1)),
    ):
        yield
