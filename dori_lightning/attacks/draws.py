"""Random draws that depend on names, not on the order of consumption.

Every draw comes from its own CPU generator, seeded with a hash of what it is for. So an attack's
result does not depend on who else is in the batch, on the number of processes or on a resume.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["keyed_generator", "noise_and_timesteps", "random_embedding"]


def keyed_generator(*key: int | str) -> torch.Generator:
    """CPU generator seeded with a hash of ``key``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def noise_and_timesteps(
    seed: int, pair_id: str, restart: int, step: int, *, shape: tuple[int, ...], timesteps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and timesteps of one attack step for one pair; independent for each of the B elements.

    Args:
        seed: Run seed.
        pair_id: Which pair.
        restart: Which restart.
        step: Attack step, from 0.
        shape: (B, C, h, w).
        timesteps: T; timesteps are uniform on 0..T-1.

    Returns:
        Standard normal noise (B, C, h, w) and timesteps (B,).
    """
    generator = keyed_generator("attack", seed, pair_id, restart, step)
    noise = torch.randn(shape, generator=generator)
    return noise, torch.randint(0, timesteps, shape[:1], generator=generator)


def random_embedding(
    seed: int, pair_id: str, restart: int, shape: tuple[int, int]
) -> torch.Tensor:
    """Standard normal embedding (T, D): the ``random`` initial point.

    Reference: Finding DoRI (2507.16880), section on initialisation.
    """
    return torch.randn(shape, generator=keyed_generator("init", seed, pair_id, restart))
