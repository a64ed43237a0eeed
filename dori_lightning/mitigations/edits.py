"""What a mitigation changes: applied and undone bit for bit, named by its content.

Pruning gives masks (which weights are zero), for all pairs at once or for each pair its own;
fine-tuning gives the weights it changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from torch.nn import functional as F

from dori_lightning.models.protocol import TextToImage
from dori_lightning.runtime.artifacts import write_atomically
from dori_lightning.types import InputError

# -------- edit_tensors
# The tensors of an edit: named by their content, and checked against what they change.


def content_hash(
    kind: str,
    fingerprint: str,
    tensors: Mapping[str, torch.Tensor],
    names: Sequence[str] = (),
) -> str:
    """Hash of an edit's content.

    Args:
        kind: Kind of edit.
        fingerprint: Of the checkpoint it is for.
        tensors: What it consists of, by name.
        names: What else decides what the edit does.
    """
    digest = hashlib.sha256("|".join([kind, fingerprint, *names]).encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"|{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        # flat, because a single number cannot be viewed as bytes
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def check_masks(masks: Mapping[str, torch.Tensor]) -> None:
    """Refuse masks that are not boolean: written and read again they would be another edit.

    Raises:
        TypeError: Names the first.
    """
    for name, mask in masks.items():
        if mask.dtype is not torch.bool:
            raise TypeError(f"masks are boolean, that of {name} is {mask.dtype}")


def parameters_of(
    model: TextToImage, tensors: Mapping[str, torch.Tensor], *, rows: bool = False
) -> dict[str, nn.Parameter]:
    """Parameters of the denoiser that an edit's tensors belong to.

    Args:
        model: Whose denoiser.
        tensors: Parameter name to a tensor of the parameter's shape.
        rows: Whether a tensor may also have one element per output row, (C_out,).

    Raises:
        InputError: The denoiser has no parameter of a name, or one of another shape.
    """
    known = dict(model.denoiser().named_parameters())
    found = {}
    for name, tensor in tensors.items():
        if name not in known:
            raise InputError(f"the edit changes {name}, which {model.name} does not have")
        shape = known[name].shape
        if tensor.shape != shape and not (rows and tensor.shape == shape[:1]):
            raise InputError(
                f"the edit has shape {tuple(tensor.shape)} for {name}, but {model.name} has "
                f"{tuple(shape)} there"
            )
        found[name] = known[name]
    return found


# -------- row_masks
# A linear layer in which every row of the batch has its own pruned weights.


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
    pruned: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Apply a linear layer to a batch whose rows differ in which weights are zero.

    What a row gives depends on its own mask and, on the CPU, not by a bit on the rows beside it.
    Whole output rows are masked after one product for everybody, which is what zero weights give:
    the bias, or zero. Single weights cannot be; there, rows of one owner share a product, or on
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
        left = torch.zeros_like(weight[:, 0]) if bias is None else bias
        return torch.where(zero, left.to(y.dtype), y)
    weights = {
        owner: weight.masked_fill(mask if mask.dim() == 2 else mask[:, None], 0)
        for owner in dict.fromkeys(owners)
        if (mask := pruned.get(owner)) is not None
    }
    parts = [
        F.linear(x[start:stop], weights.get(owners[start], weight), bias)
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


# -------- edits


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


# -------- edit_files
# Edits as safetensors files: nothing in them is executed, and damaged ones are noticed.

LAYOUT = "1"

_LARGEST = 2**31
"""Elements of a mask, at most: a damaged shape must not ask for all memory."""


def write_edit(path: Path, edit: Edit) -> Path:
    """Write an edit; masks are kept as the flat places of what is pruned.

    Args:
        path: Where to, ``.safetensors``.
        edit: A mask, per-pair mask or weight edit.

    Raises:
        TypeError: It is of another kind, which has nothing to write.
    """
    shapes: dict[str, list[int]] = {}
    if isinstance(edit, MaskEdit):
        kind, tensors = "mask", _places(edit.masks, shapes, "")
    elif isinstance(edit, PairMaskEdit):
        kind, tensors = "pair_mask", {}
        for pair, own in edit.masks.items():
            tensors.update(_places(own, shapes, f"{pair}|"))
    elif isinstance(edit, WeightEdit):
        kind = "weights"
        tensors = {name: w.detach().cpu().contiguous() for name, w in edit.weights.items()}
    else:
        raise TypeError(f"{type(edit).__name__} has nothing to write")
    note = {
        "layout": LAYOUT,
        "kind": kind,
        "identity": edit.identity,
        "origin": json.dumps(asdict(edit.origin)),
        "shapes": json.dumps(shapes),
        "pairs": json.dumps(list(edit.masks) if isinstance(edit, PairMaskEdit) else []),
    }
    return write_atomically(path, save(tensors, metadata=note))


def read_edit(path: Path) -> Edit:
    """Read an edit that ``write_edit`` wrote.

    Raises:
        InputError: There is no such file, or it is damaged or of another layout.
    """
    try:
        data = path.read_bytes()  # not mapped: a file cut by another process would kill this one
    except OSError as error:
        raise InputError(f"cannot read the edit {path}: {error.strerror or error}") from error
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        note = header.get("__metadata__", {})
        if "layout" not in note:
            raise ValueError("it holds tensors, but does not say of which edit")
        if note["layout"] != LAYOUT:
            raise ValueError(f"its layout is {note['layout']}, not {LAYOUT}")
        edit = _edit(note, tensors)
        if edit.identity != note["identity"]:
            raise ValueError("its content does not fit the hash in it")
    except (LookupError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{path} is no edit of this program, or damaged: {error}\n"
            f"  fix:   remove it, it will be computed again"
        ) from error
    return edit


def _edit(note: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> Edit:
    origin = Origin(**json.loads(note["origin"]))
    shapes: dict[str, list[int]] = json.loads(note["shapes"])
    if note["kind"] == "weights":
        return WeightEdit(origin, {name: value.clone() for name, value in tensors.items()})
    masks = {}
    for name, places in tensors.items():
        if math.prod(shapes[name]) > _LARGEST:
            raise ValueError(f"a mask of shape {tuple(shapes[name])} is no model's")
        mask = torch.zeros(shapes[name], dtype=torch.bool)
        mask.view(-1)[places.long()] = True
        masks[name] = mask
    if note["kind"] == "mask":
        return MaskEdit(origin, masks)
    if note["kind"] != "pair_mask":
        raise ValueError(f"unknown kind {note['kind']!r}")
    own: dict[str, dict[str, Any]] = {pair: {} for pair in json.loads(note["pairs"])}
    for name, mask in masks.items():
        pair, _, parameter = name.partition("|")
        own[pair][parameter] = mask
    return PairMaskEdit(origin, own)


def _places(
    masks: Mapping[str, torch.Tensor], shapes: dict[str, list[int]], prefix: str
) -> dict[str, torch.Tensor]:
    found = {}
    for name, mask in masks.items():
        shapes[prefix + name] = list(mask.shape)
        found[prefix + name] = mask.flatten().nonzero()[:, 0].to(torch.int32).cpu()
    return found


def is_writable(edit: Edit) -> bool:
    """Whether an edit has something to write; others are cheap to make again."""
    return isinstance(edit, MaskEdit | PairMaskEdit | WeightEdit)


# -------- effect
# Whether an edit does anything: a mask over zero weights leaves a model as it is.

log = logging.getLogger(__name__)


def changed_weights(edit: Edit, model: TextToImage) -> int | None:
    """Count the weights that differ under an edit, and say so in the log.

    Args:
        edit: The edit.
        model: The checkpoint, without the edit.

    Returns:
        Weights that have another value under it, for per-pair edits under any pair's; None where
        it works without changing weights, as a defence at inference does.

    Raises:
        InputError: The edit was made for another checkpoint.
    """
    if isinstance(edit, EmptyEdit):
        return 0
    if isinstance(edit, MaskEdit):
        changed = _pruned(model, [edit.masks])
    elif isinstance(edit, PairMaskEdit):
        changed = _pruned(model, edit.masks.values())
    elif isinstance(edit, WeightEdit):
        parameters = parameters_of(model, edit.weights)
        changed = sum(
            int((parameters[name].detach() != value.to(parameters[name])).sum())
            for name, value in edit.weights.items()
        )
    else:
        return None
    whole = sum(parameter.numel() for parameter in model.parameters())
    say = log.info if changed else log.warning
    say("the edit changes %d of %d weights (%.3g %%)", changed, whole, 100 * changed / whole)
    return changed


def _pruned(model: TextToImage, each: Iterable[Mapping[str, torch.Tensor]]) -> int:
    """Weights that are not zero and that any of several sets of masks prunes."""
    union: dict[str, torch.Tensor] = {}
    for masks in each:
        for name, mask in masks.items():
            union[name] = union[name] | mask if name in union else mask
    parameters = parameters_of(model, union, rows=True)
    return sum(
        int(parameters[name].detach()[mask.to(parameters[name].device)].count_nonzero())
        for name, mask in union.items()
    )
