"""What a mitigation is: something that looks at a model and pairs and returns an edit."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.types import Pair

__all__ = ["Edit", "EmptyEdit", "Mitigation"]


class Edit(Protocol):
    """What a mitigation changes in a model; applied in a context, undone exactly afterwards."""

    @property
    def identity(self) -> str:
        """Content hash, part of the identity of every result made under the edit."""
        ...

    def applied(self, model: TextToImage) -> AbstractContextManager[None]:
        """Context in which the model carries the edit."""
        ...


class Mitigation(Protocol):
    """A way to make a model forget pictures.

    Attributes:
        name: How reports call it.
    """

    name: str

    def apply(self, model: TextToImage, pairs: Sequence[Pair]) -> Edit:
        """Find the edit that should make ``model`` forget ``pairs``; leave the model as it was."""
        ...


@dataclass(frozen=True)
class EmptyEdit:
    """The edit that changes nothing."""

    identity: str = "none"

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[None]:
        """Leave the model as it is."""
        del model
        yield
