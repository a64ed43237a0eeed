"""Pairs, random embeddings and attempts for tests of locality."""

from pathlib import Path

import torch

from dori_lightning.locality.embeddings import Attempt, Group, PromptGroup
from dori_lightning.types import Pair


def pair(name: str, kind: str = "vm") -> Pair:
    return Pair(name, kind, f"caption of {name}", Path("x.png"), sha256=name)  # type: ignore[arg-type]


def rows(count: int, seed: int, *, shape: tuple[int, int] = (4, 6)) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def attempts(
    name: str, starts: torch.Tensor, ends: torch.Tensor, *, kind: str = "vm"
) -> list[Attempt]:
    """Attacks on one image from random embeddings, all of which work."""
    return [
        Attempt(pair(name, kind), "random", k, start, end, works=True)
        for k, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def own_prompts(*names: str) -> dict[str, torch.Tensor]:
    return {name: rows(1, 99)[0] for name in names}


def prompt_groups() -> dict[PromptGroup, Group]:
    """Three memorized and three control prompts."""
    controls = tuple(pair(f"c{k}", "control") for k in range(3))
    return {
        "memorized_prompts": Group(
            "memorized_prompts", tuple(pair(f"m{k}") for k in range(3)), rows(3, 50)
        ),
        "control_prompts": Group("control_prompts", controls, rows(3, 51)),
    }
