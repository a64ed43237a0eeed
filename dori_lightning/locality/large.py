"""How often embeddings draw the image: against budget, between two triggers, on other models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from dori_lightning.attacks.draws import keyed_generator
from dori_lightning.locality.estimates import Rate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.locality.groups import TriggerSet
    from dori_lightning.types import Init

__all__ = [
    "AtLarge",
    "BudgetPoint",
    "Line",
    "LinePoint",
    "Transfer",
    "lines_between",
    "points_on",
]

Toward = Literal["same_image", "other_image", "random"]
TOWARDS: tuple[Toward, ...] = ("same_image", "other_image", "random")


@dataclass(frozen=True)
class BudgetPoint:
    """Success after some steps, on the model that was attacked.

    Attributes:
        held: Whether the images are ``memorized`` or ``control``.
        start: Where the attacks began.
        steps: Steps spent.
        rate: Attacks that draw their image.
        diverged: Attacks that stopped being finite; left out of the rate.
    """

    held: Literal["memorized", "control"]
    start: Init
    steps: int
    rate: Rate
    diverged: int


@dataclass(frozen=True)
class Line:
    """A straight line from one trigger to another embedding.

    Attributes:
        pair: The image whose trigger it begins with, and whose picture is looked for.
        toward: Where it ends: another trigger of the ``same_image``, a trigger of an
            ``other_image``, or a ``random`` embedding, both as controls.
        number: Which line of the image.
        first: Where it begins (T, D).
        last: Where it ends (T, D).
    """

    pair: str
    toward: Toward
    number: int
    first: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True)
class LinePoint:
    """Success at one place of lines.

    Attributes:
        toward: Which lines.
        place: Share of the way, 0 at the trigger.
        rate: Embeddings there that draw the image of the line's beginning.
    """

    toward: Toward
    place: float
    rate: Rate


@dataclass(frozen=True)
class Transfer:
    """Success of triggers on one model.

    Attributes:
        model: Name of the mitigation, ``none`` for the checkpoint as it is.
        searched: Whether this is the model that the triggers were searched on.
        held: Whether the images are ``memorized`` or ``control``.
        start: Where the attacks began; ``prompt_itself`` for the unattacked prompt.
        rate: Embeddings that draw their image. Of memorized images only triggers that work on the
            searched model are asked.
    """

    model: str
    searched: bool
    held: Literal["memorized", "control"]
    start: Init | Literal["prompt_itself"]
    rate: Rate


@dataclass(frozen=True)
class AtLarge:
    """How often embeddings draw the image.

    Attributes:
        budget: Success against steps.
        lines: Success between two triggers.
        transfers: Success on other models.
    """

    budget: tuple[BudgetPoint, ...]
    lines: tuple[LinePoint, ...]
    transfers: tuple[Transfer, ...]


def lines_between(triggers: Sequence[TriggerSet], *, count: int, seed: int = 0) -> list[Line]:
    """Lines from triggers of each image to another one's, another image's, and random ones.

    Trigger k of an image is paired with the next one of the same image, with trigger k of the next
    image, and with a standard normal embedding. Where an image has one trigger, or is alone, the
    lines that would need another are left out.

    Args:
        triggers: Working triggers of the images, from one start.
        count: Lines of each kind and image, at most.
        seed: Of the random embeddings.
    """
    lines = []
    sets = [own for own in triggers if len(own.ends)]
    for place, own in enumerate(sets):
        # a line there and the same line back would be counted twice
        pairs = 1 if len(own.ends) == 2 else len(own.ends)
        for k in range(min(count, pairs)):
            if len(own.ends) > 1:
                other = own.ends[(k + 1) % len(own.ends)]
                lines.append(Line(own.pair.id, "same_image", k, own.ends[k], other))
            if len(sets) > 1:
                stranger = sets[(place + 1) % len(sets)]
                last = stranger.ends[k % len(stranger.ends)]
                lines.append(Line(own.pair.id, "other_image", k, own.ends[k], last))
            noise = torch.randn(
                own.ends[k].shape, generator=keyed_generator("line", seed, own.pair.id, k)
            )
            lines.append(Line(own.pair.id, "random", k, own.ends[k], noise))
    return lines


def points_on(line: Line, places: Sequence[float]) -> torch.Tensor:
    """Embeddings (P, T, D) at shares of the way, 0 at the line's beginning and 1 at its end."""
    way = torch.tensor(places, dtype=line.first.dtype)[:, None, None]
    return (1 - way) * line.first + way * line.last
