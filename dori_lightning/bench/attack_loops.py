"""The attack as others would write it, each loop whole: what the package's own is held against.

All of them solve the same problem: Adam on a text embedding, the mean denoising error of a batch
of noise samples and timesteps that are drawn anew at every step, by the same keys as the package's
attack draws them (``attacks.draws``).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from dori_lightning.attacks.draws import noise_and_timesteps

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

    from dori_lightning.models.stable_diffusion import StableDiffusion

__all__ = ["AttackTask", "Found", "fair", "hand_written", "naive"]


@dataclass(frozen=True)
class AttackTask:
    """N searches.

    Attributes:
        ids: Pair ids, length N, for the draws.
        images: Pictures to reproduce (N, 3, H, W) in [0, 1], on the CPU.
        latents: Their latents (N, C, h, w), on the CPU.
        initial: Initial embeddings (N, T, D), on the CPU.
        steps: Steps of Adam.
        noise_batch: B, noise samples of a step.
        lr: Adam's learning rate.
        seed: Of the draws.
    """

    ids: tuple[str, ...]
    images: torch.Tensor
    latents: torch.Tensor
    initial: torch.Tensor
    steps: int
    noise_batch: int = 8
    lr: float = 0.1
    seed: int = 0

    def draw(
        self, model: StableDiffusion, row: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise (B, C, h, w) and timesteps (B,) of a step, on the model's device."""
        noise, timesteps = noise_and_timesteps(
            self.seed, self.ids[row], 0, step,
            shape=(self.noise_batch, *self.latents.shape[1:]), timesteps=model.num_train_timesteps,
        )  # fmt: skip
        return noise.to(model.device), timesteps.to(model.device)


@dataclass(frozen=True)
class Found:
    """What a loop found.

    Attributes:
        embeddings: Embeddings (N, T, D), on the CPU.
        losses: Attack loss of every step (N, steps), on the CPU.
    """

    embeddings: torch.Tensor
    losses: torch.Tensor


def _error(
    model: StableDiffusion,
    denoiser: nn.Module | Any,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of each row's predicted noise (N,), or of v."""
    alpha = model.alphas_cumprod[timesteps][:, None, None, None]
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    dtype = next(model.unet.parameters()).dtype
    output = denoiser(
        noised.to(dtype), timesteps, encoder_hidden_states=context.to(dtype), return_dict=False
    )[0].float()
    target = noise
    if model.prediction_type == "v_prediction":
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)


def naive(model: StableDiffusion, task: AttackTask) -> Found:
    """B0: weights left trainable, no autocast, picture encoded at every step, one by one."""
    embeddings, losses = [], []
    for row in range(len(task.ids)):
        embedding = task.initial[row : row + 1].clone().to(model.device).requires_grad_(True)
        optimizer = torch.optim.Adam([embedding], lr=task.lr)
        own = []
        for step in range(task.steps):
            latents = model.encode_images(task.images[row : row + 1])
            noise, timesteps = task.draw(model, row, step)
            with torch.enable_grad():
                loss = _error(
                    model, model.unet, latents.expand_as(noise), noise, timesteps,
                    embedding.expand(len(noise), -1, -1),
                ).mean()  # fmt: skip
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            own.append(loss.item())
        embeddings.append(embedding.detach().cpu()[0])
        losses.append(torch.tensor(own))
    model.unet.zero_grad(set_to_none=True)
    return Found(torch.stack(embeddings), torch.stack(losses))


def fair(model: StableDiffusion, task: AttackTask, denoiser: nn.Module | Any = None) -> Found:
    """B1: frozen, evaluation mode, autocast, cached latents, losses left on the device.

    Args:
        model: Model under attack; its autocast is used.
        task: What to search.
        denoiser: What to call instead of the model's denoiser, such as its compiled copy (B2).
    """
    # not "or": a compiled module has no truth value
    denoiser = model.unet if denoiser is None else denoiser
    embeddings, losses = [], []
    with model.frozen(), torch.enable_grad():
        for row in range(len(task.ids)):
            latents = task.latents[row].to(model.device)
            embedding = task.initial[row : row + 1].clone().to(model.device).requires_grad_(True)
            optimizer = torch.optim.Adam([embedding], lr=task.lr)
            own = []
            for step in range(task.steps):
                noise, timesteps = task.draw(model, row, step)
                with _autocast(model):
                    loss = _error(
                        model, denoiser, latents.expand_as(noise), noise, timesteps,
                        embedding.expand(len(noise), -1, -1),
                    ).mean()  # fmt: skip
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                own.append(loss.detach())
            embeddings.append(embedding.detach().cpu()[0])
            losses.append(torch.stack(own).cpu())
    return Found(torch.stack(embeddings), torch.stack(losses))


def hand_written(model: StableDiffusion, task: AttackTask, *, share: int) -> Found:
    """The package's own arithmetic without the package: ``share`` pairs a pass, losses summed.

    No Trainer, no ledger, no row that can stand still, no checks: the difference to the package's
    own attack is what these cost.
    """
    batch, rows = task.noise_batch, len(task.ids)
    embedding = task.initial.clone().to(model.device).requires_grad_(True)
    repeated = task.latents.to(model.device).repeat_interleave(batch, 0)
    optimizer = torch.optim.Adam([embedding], lr=task.lr)
    losses = []
    # the last pass is filled up, as the package does it
    passes = [
        [start + k if start + k < rows else start for k in range(share)]
        for start in range(0, rows, share)
    ]
    with model.frozen(), torch.enable_grad():
        for step in range(task.steps):
            drawn = [task.draw(model, row, step) for row in range(rows)]
            noise, timesteps = (torch.cat(part) for part in zip(*drawn, strict=True))
            gradient, own = torch.zeros_like(embedding), []
            for places in passes:
                count = len(dict.fromkeys(places))
                index = torch.tensor(places)
                samples = (index[:, None] * batch + torch.arange(batch)).flatten()
                point = embedding.detach()[index].requires_grad_(True)
                with _autocast(model):
                    error = _error(
                        model, model.unet, repeated[samples], noise[samples], timesteps[samples],
                        point.repeat_interleave(batch, 0),
                    )  # fmt: skip
                loss = error.view(share, batch).mean(1)
                (part,) = torch.autograd.grad(loss.sum(), point)
                gradient[index[:count]] = part[:count]
                own.append(loss.detach()[:count])
            embedding.grad = gradient
            optimizer.step()
            losses.append(torch.cat(own))
    return Found(embedding.detach().cpu(), torch.stack(losses, 1).cpu())


def _autocast(model: StableDiffusion) -> AbstractContextManager[Any]:
    if model.autocast is None:
        return nullcontext()
    return torch.autocast(model.device.type, model.autocast)
