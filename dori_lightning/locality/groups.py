"""Sets of text embeddings that are compared with each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from dori_lightning.types import Init, Pair

__all__ = ["GROUPS", "Group", "GroupName", "PromptSet", "TriggerSet"]

GroupName = Literal["triggers", "starts", "memorized_prompts", "control_prompts"]
GROUPS: tuple[GroupName, ...] = ("triggers", "starts", "memorized_prompts", "control_prompts")


@dataclass(frozen=True)
class TriggerSet:
    """What N attacks on one image began with and ended with.

    Attributes:
        pair: The image under attack, with its prompt.
        start: Where they began.
        prompt: Embedding (T, D) of the image's own prompt.
        restarts: Number of each attack, length N.
        starts: Initial embeddings (N, T, D).
        ends: Final embeddings (N, T, D).
        working: Whether each end draws the image on the model it was searched on, length N.
    """

    pair: Pair
    start: Init
    prompt: torch.Tensor
    restarts: tuple[int, ...]
    starts: torch.Tensor
    ends: torch.Tensor
    working: tuple[bool, ...]

    def only_working(self) -> TriggerSet:
        """The attacks that succeeded: an embedding that draws something else is no trigger."""
        kept = [k for k, works in enumerate(self.working) if works]
        return TriggerSet(
            self.pair,
            self.start,
            self.prompt,
            tuple(self.restarts[k] for k in kept),
            self.starts[kept],
            self.ends[kept],
            tuple(True for _ in kept),
        )


@dataclass(frozen=True)
class PromptSet:
    """Prompts of different pairs.

    Attributes:
        pairs: N pairs.
        embeddings: Their prompts' embeddings (N, T, D).
    """

    pairs: tuple[Pair, ...]
    embeddings: torch.Tensor


@dataclass(frozen=True)
class Group:
    """Embeddings that are compared with each other, layer by layer.

    Attributes:
        name: ``triggers`` of the images under study, the ``starts`` that those began with,
            ``memorized_prompts`` of other memorized images, ``control_prompts``.
        labels: Which image's each is, length N; one label for all prompts.
        pairs: The pair that each is asked about, length N.
        embeddings: Embeddings (N, T, D).
    """

    name: GroupName
    labels: tuple[str, ...]
    pairs: tuple[Pair, ...]
    embeddings: torch.Tensor
