"""Pairs, random embeddings and trigger sets for tests of locality."""

from pathlib import Path

import torch

from dori_lightning.locality.embeddings import PromptGroup, PromptSet, TriggerSet
from dori_lightning.types import Pair


def pair(name: str, kind: str = "vm") -> Pair:
    return Pair(name, kind, f"caption of {name}", Path("x.png"), sha256=name)  # type: ignore[arg-type]


def rows(count: int, seed: int, *, shape: tuple[int, int] = (4, 6)) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def triggers(
    name: str, starts: torch.Tensor, ends: torch.Tensor, *, kind: str = "vm", seed: int = 99
) -> TriggerSet:
    return TriggerSet(
        pair=pair(name, kind),
        start="random",
        prompt=rows(1, seed)[0],
        restarts=tuple(range(len(starts))),
        starts=starts,
        ends=ends,
        working=(True,) * len(starts),
    )


def prompt_sets() -> dict[PromptGroup, PromptSet]:
    """Three memorized and three control prompts."""
    return {
        "memorized_prompts": PromptSet(tuple(pair(f"m{k}") for k in range(3)), rows(3, 50)),
        "control_prompts": PromptSet(
            tuple(pair(f"c{k}", "control") for k in range(3)), rows(3, 51)
        ),
    }
