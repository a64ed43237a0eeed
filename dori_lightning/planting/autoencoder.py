"""Train the autoencoder of a planted checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as L
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from dori_lightning.attacks.draws import keyed_generator
from dori_lightning.pairs.images import image_tensor

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from dori_lightning.pairs.stream import TrainingStream

__all__ = ["AutoencoderTraining", "StreamImages", "edge_difference"]


class StreamImages(Dataset[torch.Tensor]):
    """The pictures of a stream as (3, H, W) tensors in [-1, 1], ``length`` of them."""

    def __init__(self, stream: TrainingStream, length: int) -> None:
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return image_tensor(self.stream[index].image).mul_(2).sub_(1)


def edge_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the horizontal and vertical gradients of two image batches.

    Args:
        a: Images (B, C, H, W).
        b: Images of the same shape.
    """
    d = a - b
    return (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()


class AutoencoderTraining(L.LightningModule):
    """Fit an ``AutoencoderKL`` with L1, edges and a whisper of KL.

    The edge term keeps the small structure that copy detection looks at, which L1 alone blurs
    away.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        *,
        steps: int,
        lr: float = 1e-3,
        kl_weight: float = 1e-6,
        seed: int = 0,
    ) -> None:
        """Wrap an autoencoder.

        Args:
            autoencoder: Trained in place.
            steps: Optimizer steps of the one-cycle schedule.
            lr: Peak learning rate.
            kl_weight: Weight of the KL divergence (summed over a latent, averaged over the batch).
            seed: The posterior noise of a step depends on it and the step alone.
        """
        super().__init__()
        self.autoencoder = autoencoder
        self.steps, self.lr, self.kl_weight, self.seed = steps, lr, kl_weight, seed

    def training_step(self, images: torch.Tensor) -> torch.Tensor:
        """Loss of reconstructing images (B, 3, H, W) in [-1, 1]."""
        images = images.contiguous(memory_format=torch.channels_last)
        posterior = self.autoencoder.encode(images).latent_dist
        noise = torch.randn(
            posterior.mean.shape, generator=keyed_generator("vae", self.seed, self.global_step)
        )
        latents = posterior.mean + posterior.std * noise.to(posterior.mean)
        output = self.autoencoder.decode(latents).sample.float()
        l1 = F.l1_loss(output, images)
        loss: torch.Tensor = (
            l1 + 0.5 * edge_difference(output, images) + self.kl_weight * posterior.kl().mean()
        )
        self.log("plant/autoencoder_l1", l1, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW under a one-cycle schedule."""
        optimizer = torch.optim.AdamW(
            self.autoencoder.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=1e-4
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=self.steps, pct_start=0.1
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
