"""What a mitigation changes: applied and undone bit for bit, named by its content, kept in a file.

Pruning gives masks (which weights are zero), for all pairs at once or for each pair its own;
fine-tuning gives the weights it changed. A defence at inference is an edit that changes no weight.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.runtime.cache import tensors_and_note
from dori_lightning.types import InputError

log = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]

EVERYBODY = "*"
"""Stands for all pairs where masks are the same for everybody; no pair id may hold it."""


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
                f"  fix:   apply it to the checkpoint it was made for, or compute it again"
            )


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """What a mitigation changes in a model; applied in a context, undone exactly afterwards.

    A new kind of edit needs ``origin`` and ``applied``. The other methods say what holds for a
    defence at inference, which changes no weight; it names its settings in ``identity``.

    Attributes:
        origin: Where it comes from; None for the edit that changes nothing.
        kind: Name of its kind in files; empty where it is cheap to make again and not kept.
        is_empty: Whether nothing at all is different under the edit.
    """

    kind: ClassVar[str] = ""
    is_empty: ClassVar[bool] = False
    origin: Origin | None

    @cached_property
    def identity(self) -> str:
        """Content hash, part of the identity of every result made under the edit."""
        fingerprint = self.origin.fingerprint if self.origin else ""
        # pairs by name too: one without a mask is left alone, and is a possible owner of controls
        digest = hashlib.sha256("|".join([self.kind, fingerprint, *sorted(self.pairs)]).encode())
        for name, tensor in sorted(self.tensors().items()):
            value = tensor.detach().cpu().contiguous()
            digest.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            # flat, because a single number cannot be viewed as bytes
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:24]

    @property
    def pairs(self) -> tuple[str, ...]:
        """Ids of the pairs that have weights of their own; empty where all see the same."""
        return ()

    @abstractmethod
    def applied(self, model: TextToImage) -> AbstractContextManager[None]:
        """Context in which the model carries the edit.

        Raises:
            InputError: The edit was made for another checkpoint.
        """

    def counts(self) -> dict[str, int]:
        """Rows or weights that it names, by parameter; for per-pair edits, on average."""
        return {}

    def changed(self, model: TextToImage) -> dict[str, int] | None:
        """How many weights have another value under the edit, by parameter that it names.

        A mask over weights that are zero already changes none. Under per-pair edits a weight
        counts that is different for any pair.

        Args:
            model: The checkpoint, without the edit.

        Returns:
            None where the edit works without changing weights, as a defence at inference does.

        Raises:
            InputError: The edit was made for another checkpoint.
        """
        del model
        return None

    def for_pair(self, pair_id: str) -> Edit:
        """The edit as one pair sees it, with the same weights for all."""
        del pair_id
        return self

    def masks_by_pair(self) -> dict[str, dict[str, torch.Tensor]]:
        """Pair id, or `EVERYBODY`, to parameter to mask; empty unless the edit prunes."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it consists of, by name."""
        return {}

    @classmethod
    def from_tensors(cls, origin: Origin, tensors: Tensors, pairs: Sequence[str]) -> Self:
        """The edit with these ``tensors`` and ``pairs``, for kinds that are kept in files."""
        del pairs
        return cls(origin, tensors)  # type: ignore[call-arg]


@dataclass(frozen=True)
class EmptyEdit(Edit):
    """The edit that changes nothing."""

    is_empty: ClassVar[bool] = True
    origin: Origin | None = None

    @property
    def identity(self) -> str:
        """A name that no content hash has."""
        return "none"

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[None]:
        """Leave the model as it is."""
        del model
        yield

    def changed(self, model: TextToImage) -> dict[str, int]:
        """Nothing."""
        del model
        return {}


@dataclass(frozen=True, eq=False)
class MaskEdit(Edit):
    """Weights that are zero for everybody.

    Attributes:
        origin: Where it comes from.
        masks: Parameter name to what is pruned (True): whole output rows, shape (C_out,), or
            single weights, in the parameter's shape. Where a whole row of a layer's weight is
            pruned, its bias is, too: what is blocked gives zero.
    """

    kind: ClassVar[str] = "mask"
    origin: Origin
    masks: Tensors

    def __post_init__(self) -> None:
        _check_boolean(self.masks)

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[None]:
        """Zero the weights while open."""
        saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        try:
            for _, mask, weights in self.pruned(model):
                parameter = weights.data
                mask = mask.to(parameter.device)
                saved.append((parameter, mask, parameter[mask].clone()))
                parameter[mask] = 0
            yield
        finally:
            for parameter, mask, values in saved:
                parameter[mask] = values

    def pruned(self, model: TextToImage) -> list[tuple[str, torch.Tensor, nn.Parameter]]:
        """Names, masks and parameters of all that is pruned, biases of whole rows too."""
        parameters = _parameters_of(model, self.origin, self.masks, rows=True)
        known = dict(model.denoiser().named_parameters())
        found = [(name, mask, parameters[name]) for name, mask in self.masks.items()]
        for name, mask in self.masks.items():
            bias = f"{name.removesuffix('.weight')}.bias"
            if name.endswith(".weight") and mask.dim() == 1 < known[name].dim() and bias in known:
                found.append((bias, mask, known[bias]))
        return found

    def counts(self) -> dict[str, int]:
        """Pruned rows or weights by parameter."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    def changed(self, model: TextToImage) -> dict[str, int]:
        """Pruned weights that are not zero."""
        return {
            name: int(parameter.detach()[mask.to(parameter.device)].count_nonzero())
            for name, mask, parameter in self.pruned(model)
        }

    def masks_by_pair(self) -> dict[str, dict[str, torch.Tensor]]:
        """The masks, for everybody."""
        return {EVERYBODY: dict(self.masks)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The masks by parameter."""
        return dict(self.masks)


@dataclass(frozen=True, eq=False)
class PairMaskEdit(Edit):
    """Weights that are zero for one pair, for each pair its own.

    A forward pass may hold rows of many pairs: each row sees its own pair's weights. Rows of a
    pair that has no mask of its own (a control) see those of ``owner_of``.

    Attributes:
        origin: Where it comes from.
        masks: Pair id to parameter name (of a linear layer's weight) to what is pruned, as in
            ``MaskEdit``.
    """

    kind: ClassVar[str] = "pair_mask"
    origin: Origin
    masks: Mapping[str, Tensors]

    def __post_init__(self) -> None:
        if not self.masks:
            raise ValueError("a per-pair edit needs a pair")
        for masks in self.masks.values():
            _check_boolean(masks)

    @property
    def pairs(self) -> tuple[str, ...]:
        """Ids of the pairs that have masks."""
        return tuple(self.masks)

    def for_pair(self, pair_id: str) -> MaskEdit:
        """One pair's edit, as an edit for everybody."""
        return MaskEdit(self.origin, self.masks[owner_of(pair_id, self.pairs)])

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[None]:
        """Give every linear layer with masks a forward that looks whose rows it has."""
        for masks in self.masks.values():
            _parameters_of(model, self.origin, masks, rows=True)
        modules = dict(model.denoiser().named_modules())
        patched: list[nn.Module] = []
        try:
            for name in sorted({name for masks in self.masks.values() for name in masks}):
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
        pruned = {
            pair: masks[name].to(module.weight.device)
            for pair, masks in self.masks.items()
            if name in masks
        }

        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = model.row_pairs
            if rows is None or len(rows) != len(x):
                raise RuntimeError(
                    "a per-pair edit is applied, but the model was not told whose rows these are"
                )
            owner = {pair: owner_of(pair, self.pairs) for pair in dict.fromkeys(rows)}
            owners = [owner[pair] for pair in rows]
            return masked_linear(x, module.weight, module.bias, owners, pruned)

        return forward

    def counts(self) -> dict[str, int]:
        """Pruned rows or weights by parameter, on average over pairs."""
        total: dict[str, int] = {}
        for masks in self.masks.values():
            for name, mask in masks.items():
                total[name] = total.get(name, 0) + int(mask.sum())
        return {name: round(count / len(self.masks)) for name, count in total.items()}

    def changed(self, model: TextToImage) -> dict[str, int]:
        """Weights that are not zero and that any pair's masks prune."""
        union: dict[str, torch.Tensor] = {}
        for masks in self.masks.values():
            for name, mask in masks.items():
                union[name] = union[name] | mask if name in union else mask
        return MaskEdit(self.origin, union).changed(model)

    def masks_by_pair(self) -> dict[str, dict[str, torch.Tensor]]:
        """The masks of each pair."""
        return {pair: dict(masks) for pair, masks in self.masks.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The masks by ``pair|parameter``."""
        return {f"{pair}|{n}": mask for pair, own in self.masks.items() for n, mask in own.items()}

    @classmethod
    def from_tensors(cls, origin: Origin, tensors: Tensors, pairs: Sequence[str]) -> Self:
        """The edit with these masks."""
        masks: dict[str, dict[str, torch.Tensor]] = {pair: {} for pair in pairs}
        for name, mask in tensors.items():
            pair, _, parameter = name.partition("|")
            masks[pair][parameter] = mask
        return cls(origin, masks)


@dataclass(frozen=True, eq=False)
class WeightEdit(Edit):
    """Weights that have other values for everybody.

    Attributes:
        origin: Where it comes from.
        weights: Parameter name to its new value, in the parameter's shape.
    """

    kind: ClassVar[str] = "weights"
    origin: Origin
    weights: Tensors

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[None]:
        """Put the new weights in place while open."""
        parameters = _parameters_of(model, self.origin, self.weights)
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
        """Weights of the parameters that were trained."""
        return {name: value.numel() for name, value in self.weights.items()}

    def changed(self, model: TextToImage) -> dict[str, int]:
        """Weights that differ once they have the model's dtype."""
        return {
            name: int((parameter.detach() != self.weights[name].to(parameter)).sum())
            for name, parameter in _parameters_of(model, self.origin, self.weights).items()
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by parameter."""
        return dict(self.weights)


@dataclass(frozen=True, eq=False)
class LayeredEdit(Edit):
    """Weights on top of another edit, such as what was trained while the model carried that.

    Attributes:
        origin: Of the weights on top.
        base: The edit below.
        top: Weights that replace what they have under it.
    """

    origin: Origin
    base: Edit
    top: WeightEdit

    @classmethod
    def over(cls, base: Edit, top: WeightEdit) -> LayeredEdit:
        """Weights over an edit; those over weights over an edit are one layer, not two."""
        if isinstance(base, LayeredEdit):
            weights = {**base.top.weights, **top.weights}
            base, top = base.base, WeightEdit(top.origin, weights)
        return cls(top.origin, base, top)

    @cached_property
    def identity(self) -> str:
        """Hash of both."""
        both = f"{self.base.identity}+{self.top.identity}"
        return hashlib.sha256(both.encode()).hexdigest()[:24]

    @property
    def pairs(self) -> tuple[str, ...]:
        """Ids of the pairs that have weights of their own below."""
        return self.base.pairs

    def for_pair(self, pair_id: str) -> LayeredEdit:
        """The same weights over one pair's edit."""
        return LayeredEdit(self.origin, self.base.for_pair(pair_id), self.top)

    @contextmanager
    def applied(self, model: TextToImage) -> Iterator[None]:
        """Carry the edit below, and the weights over it."""
        with self.base.applied(model), self.top.applied(model):
            yield

    def changed(self, model: TextToImage) -> dict[str, int] | None:
        """Weights that differ, where the edit below changes weights; see `Edit.changed`."""
        below = self.base.changed(model)
        return None if below is None else {**below, **self.top.changed(model)}


def changed_weights(edit: Edit, model: TextToImage) -> int | None:
    """Count the weights that differ under an edit (see `Edit.changed`), and log the share.

    Args:
        edit: The edit.
        model: The checkpoint, without the edit.
    """
    by_parameter = edit.changed(model)
    if by_parameter is None or edit.is_empty:
        return None if by_parameter is None else 0
    changed = sum(by_parameter.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    say = log.info if changed else log.warning
    say("the edit changes %d of %d weights (%.3g %%)", changed, total, 100 * changed / total)
    return changed


def _parameters_of(
    model: TextToImage, origin: Origin, tensors: Tensors, *, rows: bool = False
) -> dict[str, nn.Parameter]:
    """Parameters of the denoiser that an edit's tensors belong to.

    Args:
        model: Whose denoiser.
        origin: Says which checkpoint the edit is for.
        tensors: Parameter name to a tensor of the parameter's shape.
        rows: Whether a tensor may also have one element per output row, (C_out,).

    Raises:
        InputError: It is another checkpoint, or its denoiser has no parameter of a name, or one
            of another shape.
    """
    origin.check(model)
    known = dict(model.denoiser().named_parameters())
    for name, tensor in tensors.items():
        if name not in known:
            raise InputError(f"the edit changes {name}, which {model.name} does not have")
        shape = known[name].shape
        if tensor.shape != shape and not (rows and tensor.shape == shape[:1]):
            raise InputError(
                f"the edit has shape {tuple(tensor.shape)} for {name}, but {model.name} has "
                f"{tuple(shape)} there"
            )
    return {name: known[name] for name in tensors}


def _check_boolean(masks: Tensors) -> None:
    """Refuse masks that are not boolean: written and read again they would be another edit."""
    for name, mask in masks.items():
        if mask.dtype is not torch.bool:
            raise TypeError(f"masks are boolean, that of {name} is {mask.dtype}")


def owner_of(pair_id: str, pairs: tuple[str, ...]) -> str:
    """Whose mask a pair's rows see: its own, or one that its name alone decides.

    Controls have no mask of their own; under the masks of the edited pairs in turn they tell what
    those cost.
    """
    if pair_id in pairs:
        return pair_id
    number = int.from_bytes(hashlib.blake2b(pair_id.encode(), digest_size=8).digest(), "big")
    return sorted(pairs)[number % len(pairs)]


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    owners: Sequence[str],
    pruned: Tensors,
) -> torch.Tensor:
    """Apply a linear layer to a batch whose rows differ in which weights are zero.

    What a row gives depends on its own mask and, on the CPU, not by a bit on the rows beside it.
    Whole output rows are zeroed after one product for everybody, bias and all. Single weights
    cannot be; there, rows of one owner share a product, or on
    the CPU each row has its own, since kernels are chosen by shape.

    Args:
        x: Inputs (N, ..., D).
        weight: (C, D).
        bias: (C,), or None.
        owners: Whose mask each row sees, length N.
        pruned: Owner to what is zero: output rows (C,) or single weights (C, D). Rows of others
            see the layer as it is.
    """
    masks = [pruned.get(owner) for owner in owners]
    if all(mask is None or mask.dim() == 1 for mask in masks):
        y = F.linear(x, weight, bias)
        nothing = torch.zeros(len(weight), dtype=torch.bool, device=y.device)
        zero = torch.stack([nothing if mask is None else mask for mask in masks])
        zero = zero.view(len(x), *[1] * (x.dim() - 2), len(weight))
        return torch.where(zero, torch.zeros((), dtype=y.dtype, device=y.device), y)
    weights = {
        owner: weight.masked_fill(mask if mask.dim() == 2 else mask[:, None], 0)
        for owner in dict.fromkeys(owners)
        if (mask := pruned.get(owner)) is not None
    }
    biases = {
        owner: bias.masked_fill(mask, 0)
        for owner in weights
        if bias is not None and (mask := pruned.get(owner)) is not None and mask.dim() == 1
    }
    parts = [
        F.linear(
            x[start:stop],
            weights.get(owners[start], weight),
            biases.get(owners[start], bias),
        )
        for start, stop in _runs(owners, single=x.device.type == "cpu")
    ]
    return torch.cat(parts)


def _runs(owners: Sequence[str], *, single: bool) -> Iterator[tuple[int, int]]:
    """Places of neighbouring rows with one owner, or of every row by itself."""
    start = 0
    for stop in range(1, len(owners) + 1):
        if single or stop == len(owners) or owners[stop] != owners[start]:
            yield start, stop
            start = stop


LAYOUT = "1"
"""Version of the files of edits."""

_LARGEST = 2**31
"""Elements of a mask, at most: a damaged shape must not ask for all memory."""


def write_edit(path: Path, edit: Edit) -> Path:
    """Write an edit as safetensors; of masks, the flat places of what is pruned.

    Args:
        path: Where to, ``.safetensors``.
        edit: A mask, per-pair mask or weight edit.

    Raises:
        TypeError: It is of another kind, which has nothing to write.
    """
    if not edit.kind or edit.origin is None:
        raise TypeError(f"{type(edit).__name__} has nothing to write")
    tensors, shapes = {}, {}
    for name, tensor in edit.tensors().items():
        if tensor.dtype is torch.bool:
            shapes[name] = list(tensor.shape)
            tensor = tensor.flatten().nonzero()[:, 0].to(torch.int32)
        tensors[name] = tensor.detach().cpu().contiguous()
    note = {
        "layout": LAYOUT,
        "kind": edit.kind,
        "identity": edit.identity,
        "origin": json.dumps(asdict(edit.origin)),
        "shapes": json.dumps(shapes),
        "pairs": json.dumps(edit.pairs),
    }
    return write_atomically(path, save(tensors, metadata=note))


def read_edit(path: Path) -> Edit:
    """Read an edit that ``write_edit`` wrote; nothing in the file is executed.

    Raises:
        InputError: There is no such file, or it is damaged or of another layout.
    """
    try:
        data = path.read_bytes()  # not mapped: a file cut by another process would kill this one
    except OSError as error:
        raise InputError(f"cannot read the edit {path}: {error.strerror or error}") from error
    try:
        tensors, note = tensors_and_note(data)
        if "layout" not in note:
            raise ValueError("it holds tensors, but does not say of which edit")
        if note["layout"] != LAYOUT:
            raise ValueError(f"its layout is {note['layout']}, not {LAYOUT}")
        kind = {known.kind: known for known in (MaskEdit, PairMaskEdit, WeightEdit)}[note["kind"]]
        masks = {
            name: _mask(shape, tensors.pop(name))
            for name, shape in json.loads(note["shapes"]).items()
        }
        origin, pairs = Origin(**json.loads(note["origin"])), json.loads(note["pairs"])
        edit = kind.from_tensors(origin, masks | tensors, pairs)
        if edit.identity != note["identity"]:
            raise ValueError("its content does not fit the hash in it")
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} is no edit of this program, or damaged: {error}\n"
            f"  fix:   remove it, it will be computed again"
        ) from error
    return edit


def _mask(shape: Sequence[int], places: torch.Tensor) -> torch.Tensor:
    if math.prod(shape) > _LARGEST:
        raise ValueError(f"a mask of shape {tuple(shape)} is no model's")
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[places.long()] = True
    return mask
