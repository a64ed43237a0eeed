"""What a mitigation changes: applied and undone bit for bit, named by its content.

Pruning gives masks (which weights are zero), for all pairs at once or for each pair its own;
fine-tuning gives the weights it changed.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from dori_lightning.mitigations.edit_tensors import check_masks, content_hash, parameters_of
from dori_lightning.mitigations.row_masks import masked_linear, owner_of
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    import torch

    from dori_lightning.models.protocol import TextToImage

__all__ = [
    "Edit",
    "EmptyEdit",
    "MaskEdit",
    "Origin",
    "PairMaskEdit",
    "WeightEdit",
    "owner_of",
]


@dataclass(frozen=True)
class Origin:
    """Where an edit comes from.

    Attributes:
        fingerprint: Of the checkpoint it was made for.
        mitigation: Name of the mitigation.
        settings: Its settings, plain values.
        cost: What it took to find it, such as ``unet_evaluations`` and ``seconds``.
        notes: What the mitigation has to say, by pair or in all; plain values.
    """

    fingerprint: str
    mitigation: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def check(self, model: TextToImage) -> None:
        """Refuse another checkpoint.

        Raises:
            InputError: Names both fingerprints.
        """
        if model.fingerprint != self.fingerprint:
            raise InputError(
                f"the edit {self.mitigation or '(unnamed)'} was made for a checkpoint with "
                f"fingerprint {self.fingerprint}, but {model.name} has {model.fingerprint}\n"
                f"  mend:  apply it to the checkpoint it was made for, or compute it again"
            )


class Edit(Protocol):
    """What a mitigation changes in a model; applied in a context, undone exactly afterwards."""

    @property
    def origin(self) -> Origin | None:
        """Where it comes from; None for the edit that changes nothing."""
        ...

    @property
    def identity(self) -> str:
        """Content hash, part of the identity of every result made under the edit."""
        ...

    def applied(self, model: TextToImage) -> AbstractContextManager[None]:
        """Context in which the model carries the edit.

        Raises:
            InputError: The edit was made for another checkpoint.
        """
        ...

    def counts(self) -> dict[str, int]:
        """How many weights of each parameter the edit changes; for per-pair edits, on average."""
        ...


@dataclass(frozen=True)
class EmptyEdit:
    """The edit that changes nothing."""

    identity: str = "none"
    origin: Origin | None = None

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[None]:
        """Leave the model as it is."""
        del model
        yield

    def counts(self) -> dict[str, int]:
        """Nothing."""
        return {}


@dataclass(frozen=True, eq=False)
class MaskEdit:
    """Weights that are zero for everybody.

    Attributes:
        origin: Where it comes from.
        masks: Parameter name to what is pruned (True): whole output rows, shape (C_out,), or
            single weights, in the parameter's shape.
    """

    origin: Origin
    masks: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        check_masks(self.masks)

    @cached_property
    def identity(self) -> str:
        """Content hash."""
        return content_hash("mask", self.origin.fingerprint, self.masks)

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[None]:
        """Zero the weights while open."""
        self.origin.check(model)
        parameters = parameters_of(model, self.masks, rows=True)
        saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        try:
            for name, mask in self.masks.items():
                parameter = parameters[name].data
                mask = mask.to(parameter.device)
                saved.append((parameter, mask, parameter[mask].clone()))
                parameter[mask] = 0
            yield
        finally:
            for parameter, mask, values in saved:
                parameter[mask] = values

    def counts(self) -> dict[str, int]:
        """Pruned rows or weights by parameter."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}


@dataclass(frozen=True, eq=False)
class PairMaskEdit:
    """Weights that are zero for one pair, for each pair its own.

    A pass may hold rows of many pairs: each row sees its own pair's weights. Rows of a pair that
    has no mask of its own (a control) see those of ``owner_of``.

    Attributes:
        origin: Where it comes from.
        masks: Pair id to parameter name (of a linear layer's weight) to what is pruned, as in
            ``MaskEdit``.
    """

    origin: Origin
    masks: Mapping[str, Mapping[str, torch.Tensor]]

    def __post_init__(self) -> None:
        if not self.masks:
            raise ValueError("a per-pair edit needs a pair")
        for own in self.masks.values():
            check_masks(own)

    @cached_property
    def identity(self) -> str:
        """Content hash."""
        flat = {f"{pair}|{name}": m for pair, own in self.masks.items() for name, m in own.items()}
        # the pairs too: one without a mask is left alone, and is a possible owner of controls
        return content_hash("pair_mask", self.origin.fingerprint, flat, sorted(self.masks))

    def of(self, pair_id: str) -> MaskEdit:
        """One pair's edit, as an edit for everybody."""
        return MaskEdit(self.origin, self.masks[owner_of(pair_id, tuple(self.masks))])

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[None]:
        """Give every linear layer with masks a forward that looks whose rows it has."""
        self.origin.check(model)
        for own in self.masks.values():
            parameters_of(model, own, rows=True)
        modules = dict(model.denoiser().named_modules())
        patched: list[nn.Module] = []
        try:
            for name in sorted({name for own in self.masks.values() for name in own}):
                module = modules[name.rpartition(".")[0]]
                if not isinstance(module, nn.Linear) or not name.endswith(".weight"):
                    raise TypeError(f"per-pair masks need weights of linear layers, got {name}")
                if "forward" in vars(module):
                    raise RuntimeError(f"{name} has a forward of its own, such as a second edit's")
                module.forward = self._forward(model, module, name)  # type: ignore[assignment,method-assign]
                patched.append(module)
            yield
        finally:
            for module in patched:
                del module.forward

    def _forward(
        self, model: TextToImage, module: nn.Linear, name: str
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        pairs = tuple(self.masks)
        pruned = {
            pair: own[name].to(module.weight.device)
            for pair, own in self.masks.items()
            if name in own
        }

        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = model.row_pairs
            if rows is None or len(rows) != len(x):
                raise RuntimeError(
                    "a per-pair edit is applied, but the model was not told whose rows these are"
                )
            owner = {pair: owner_of(pair, pairs) for pair in dict.fromkeys(rows)}
            owners = [owner[pair] for pair in rows]
            return masked_linear(x, module.weight, module.bias, owners, pruned)

        return forward

    def counts(self) -> dict[str, int]:
        """Pruned rows or weights by parameter, on average over pairs."""
        total: dict[str, int] = {}
        for own in self.masks.values():
            for name, mask in own.items():
                total[name] = total.get(name, 0) + int(mask.sum())
        return {name: round(count / len(self.masks)) for name, count in total.items()}


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """Weights that were trained.

    The new values rather than differences are kept: adding a difference would round.

    Attributes:
        origin: Where it comes from.
        weights: Parameter name to new value.
    """

    origin: Origin
    weights: Mapping[str, torch.Tensor]

    @cached_property
    def identity(self) -> str:
        """Content hash."""
        return content_hash("weights", self.origin.fingerprint, self.weights)

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[None]:
        """Put the new weights in place while open."""
        self.origin.check(model)
        parameters = parameters_of(model, self.weights)
        saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for name, value in self.weights.items():
                parameter = parameters[name].data
                saved.append((parameter, parameter.clone()))
                parameter.copy_(value)
            yield
        finally:
            for parameter, before in saved:
                parameter.copy_(before)

    def counts(self) -> dict[str, int]:
        """Weights of the changed parameters."""
        return {name: value.numel() for name, value in self.weights.items()}
