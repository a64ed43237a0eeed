"""Forward passes in which every row has neurons of its own blocked."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dori_lightning import lanes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["BlockedPasses", "Part", "blocked_passes"]


@dataclass(frozen=True)
class Part:
    """Rows of a pass that belong together.

    Attributes:
        pair: Whose rows.
        inputs: What the pass takes, each with S rows.
        blocked: Neurons that are blocked for these rows (D,), bool; None for none.
    """

    pair: str
    inputs: tuple[torch.Tensor, ...]
    blocked: torch.Tensor | None = None


@dataclass
class BlockedPasses:
    """Forward passes in which every row has neurons of its own blocked.

    All passes have the same number of rows; the last ones are filled up with copies whose outcome
    is dropped. Kernels are chosen by shape and work row by row, so on the CPU an answer is bit for
    bit the same in whatever company a question is asked.

    Attributes:
        forward: The model's ``predict_noise`` or ``denoising_loss``, or a whole sampling.
        widths: Layer name to number of its neurons, in order.
        rows: Rows of a pass.
        beside: Passes side by side, see ``lanes``.
    """

    forward: Callable[..., torch.Tensor]
    widths: Mapping[str, int]
    rows: int
    beside: int = 1
    _of_thread: threading.local = field(default_factory=threading.local, init=False)

    @property
    def keep(self) -> dict[str, torch.Tensor] | None:
        """Layer name to what goes through (rows, 1, C), while this thread runs a pass."""
        return getattr(self._of_thread, "keep", None)

    def run(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        """What ``forward`` returns for each part, in as many passes as it takes."""
        full: list[list[Part]] = []
        taken = self.rows
        for part in parts:
            size = len(part.inputs[0])
            if taken + size > self.rows:
                full.append([])
                taken = 0
            full[-1].append(part)
            taken += size
        found = lanes.side_by_side([partial(self._pass, own) for own in full], self.beside)
        return [rows for own in found for rows in own]

    # autograd's mode is each thread's own
    @torch.no_grad()
    def _pass(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        sizes = [len(part.inputs[0]) for part in parts]
        spare = self.rows - sum(sizes)
        if spare < 0:
            raise ValueError(f"{sum(sizes)} rows do not fit into a pass of {self.rows}")
        owners = [part.pair for part, size in zip(parts, sizes, strict=True) for _ in range(size)]
        inputs = [
            torch.cat([*columns, columns[0][:1].expand(spare, *columns[0].shape[1:])])
            for columns in zip(*(part.inputs for part in parts), strict=True)
        ]
        free = torch.zeros(sum(self.widths.values()), dtype=torch.bool)
        masks = torch.stack([free if p.blocked is None else p.blocked for p in parts] + [free])
        keep = ~masks.repeat_interleave(torch.tensor([*sizes, spare]), 0).to(inputs[0].device)
        layers = torch.split(keep[:, None], list(self.widths.values()), dim=2)
        self._of_thread.keep = dict(zip(self.widths, layers, strict=True))
        try:
            output = self.forward(*inputs, pair_ids=[*owners, *[owners[0]] * spare])
        finally:
            self._of_thread.keep = None
        return list(torch.split(output[: sum(sizes)], sizes))


@contextmanager
def blocked_passes(
    layers: Mapping[str, nn.Module],
    forward: Callable[..., torch.Tensor],
    *,
    rows: int,
    beside: int = 1,
) -> Iterator[BlockedPasses]:
    """Passes with hooks on ``layers`` while open: what an edit does, row by row.

    Args:
        layers: Linear layers by name, in the order of a set's neurons.
        forward: The model's ``predict_noise`` or ``denoising_loss``, or a whole sampling.
        rows: Rows of a pass.
        beside: Passes side by side.
    """
    linear: dict[str, nn.Linear] = {}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"only linear layers can be blocked, {name} is no such")
        linear[name] = layer
    widths = {name: x.out_features for name, x in linear.items()}
    passes = BlockedPasses(forward, widths, rows, beside)
    handles = []
    try:
        for name, layer in linear.items():
            handles.append(layer.register_forward_hook(_hook(passes, name)))
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def _hook(passes: BlockedPasses, name: str) -> Any:
    def hook(module: nn.Linear, _: Any, output: torch.Tensor) -> torch.Tensor | None:
        if (kept := passes.keep) is None:
            return None
        # a neuron without its weights still gives its bias, as under an edit
        rest = output.new_zeros(()) if module.bias is None else module.bias.to(output.dtype)
        keep = kept[name]
        # guided sampling runs all rows without and with their prompts, one set after the other
        keep = keep.repeat(len(output) // len(keep), 1, 1)
        return torch.where(keep, output, rest)

    return hook
