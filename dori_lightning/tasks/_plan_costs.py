"""What an evaluation of a checkpoint's denoiser costs, counted on its architecture.

Operations per row were counted with ``torch.utils.flop_counter`` on the architectures of the
checkpoints without weights, one multiply-add as two operations: for SD 1.x at 64 x 64 latents 0.80
TFLOP forward, and 0.87 more for the gradient of the embedding alone (weights are frozen, so the
backward pass is about as long as the forward pass, not twice), or 1.60 more for that of all
weights. The same forward pass is often quoted as 338.7 GMAC or 0.68 TFLOP: that leaves out the
products inside attention.

How much of a card's peak this work reaches decides the hours. Published throughputs of diffusers
and of MosaicML's training imply 27 to 39 % of an A100's dense bf16 peak at batches of 8 to 128;
here it is 30 % for every card. For the embedded benchmark the speed is that of the attack on two
CPU cores, 4 s for 50 steps of 8 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dori_lightning.models.protocol import Sampling

__all__ = ["CHECKPOINTS", "FRACTION", "CheckpointCost", "Evaluations", "drawn"]

FRACTION = 0.30
"""Share of a card's peak that the estimate assumes."""

_PEAK = {"H100": 989.0, "A100": 312.0}
"""Dense bf16 peak, TFLOP/s (SXM cards)."""
_CARDS = {name: peak * FRACTION for name, peak in _PEAK.items()}
_TWO_CORES = {"two CPU cores": 400 * (0.484e-3 + 0.505e-3) / 4.0}

BYTES_PER_PIXEL = 1.6
"""Of a photograph as PNG: about half of its three bytes; an assumption."""


@dataclass(frozen=True)
class Evaluations:
    """Work, in rows that go through the denoiser or the decoder.

    Attributes:
        forward: Without gradient.
        attack: With the gradient of the embedding.
        training: With the gradient of the weights.
        decoded: Latents that are decoded to pictures.
    """

    forward: int = 0
    attack: int = 0
    training: int = 0
    decoded: int = 0

    def __add__(self, other: Evaluations) -> Evaluations:
        return Evaluations(
            self.forward + other.forward,
            self.attack + other.attack,
            self.training + other.training,
            self.decoded + other.decoded,
        )

    @property
    def rows(self) -> int:
        """Rows that go through the denoiser."""
        return self.forward + self.attack + self.training


def drawn(pictures: int, sampling: Sampling) -> Evaluations:
    """Work of drawing pictures; guidance takes two rows a step."""
    halves = 1 if sampling.guidance == 1 else 2
    return Evaluations(forward=pictures * sampling.steps * halves, decoded=pictures)


@dataclass(frozen=True)
class CheckpointCost:
    """One checkpoint's architecture in numbers.

    Attributes:
        forward: TFLOP of a row of the denoiser.
        to_embedding: TFLOP more for the gradient of the embedding.
        to_weights: TFLOP more for the gradient of all weights.
        decode: TFLOP to decode a picture.
        parameters: Weights of the denoiser.
        embedding: Numbers of a text embedding.
        resolution: Pixels of a picture's side.
        speeds: TFLOP per second by device.
    """

    forward: float
    to_embedding: float
    to_weights: float
    decode: float
    parameters: int
    embedding: int
    resolution: int
    speeds: dict[str, float]

    def tflop(self, work: Evaluations) -> float:
        """Operations of some work."""
        return (
            work.rows * self.forward
            + work.attack * self.to_embedding
            + work.training * self.to_weights
            + work.decoded * self.decode
        )

    def hours(self, work: Evaluations) -> dict[str, float]:
        """Estimated hours of some work by device."""
        return {name: self.tflop(work) / speed / 3600 for name, speed in self.speeds.items()}

    @property
    def picture_bytes(self) -> float:
        """Estimated size of a picture's file."""
        return BYTES_PER_PIXEL * self.resolution**2


_SD1 = CheckpointCost(0.8033, 0.8659, 1.6035, 2.5145, 859_520_964, 77 * 768, 512, _CARDS)
_SD2 = CheckpointCost(0.8043, 0.8669, 1.6045, 2.5145, 865_910_724, 77 * 1024, 512, _CARDS)
_SD2_768 = CheckpointCost(2.1491, 2.5138, 4.2941, 5.7543, 865_910_724, 77 * 1024, 768, _CARDS)

CHECKPOINTS: dict[str, CheckpointCost] = {
    "sd14": _SD1,
    "sd15": _SD1,
    "sd20_base": _SD2,
    "sd20": _SD2_768,
    "sd21": _SD2_768,
    "dori_tiny": CheckpointCost(
        0.484e-3, 0.505e-3, 0.960e-3, 1.259e-3, 8_687_464, 16 * 96, 64, _TWO_CORES
    ),
}
"""By the name of the checkpoint; others have no known cost."""
