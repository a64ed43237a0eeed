"""Count what a task asks of a model: rows through its denoiser, autoencoder and text encoder."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from dori_lightning.models.stable_diffusion import StableDiffusion

__all__ = ["Counts", "counted"]


@dataclass
class Counts:
    """Rows through each part so far, and the forward passes they went in.

    Attributes:
        unet: Rows through the denoiser.
        unet_passes: Its forward passes.
        encoded: Pictures that were encoded.
        decoded: Latents that were decoded.
        prompts: Prompts that were encoded.
    """

    unet: int = 0
    unet_passes: int = 0
    encoded: int = 0
    decoded: int = 0
    prompts: int = 0


@contextmanager
def counted(model: StableDiffusion) -> Iterator[Counts]:
    """Count by the modules themselves while open, whoever calls them and from which thread."""
    counts, one = Counts(), threading.Lock()

    def unet(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        with one:
            counts.unet += len(inputs[0])
            counts.unet_passes += 1

    def encoder(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        counts.encoded += len(inputs[0])

    def decoder(_: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        with one:
            counts.decoded += len(inputs[0])

    def text(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        counts.prompts += len(inputs[0] if inputs else keywords["input_ids"])

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module, hook in (
            (model.unet, unet),
            # the autoencoder's own forward is not used
            (model.autoencoder.encoder, encoder),
            (model.autoencoder.decoder, decoder),
            (model.text_encoder, text),
        )
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
