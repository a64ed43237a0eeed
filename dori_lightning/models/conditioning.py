"""Everything that conditions a denoiser, in one matrix with named parts.

Families condition on one sequence of tokens, on several, on pooled vectors beside them, on sizes
and masks. All of it is laid, row below row, into one matrix (T, D), so that searches, caches and
files know a single tensor; the denoiser's adapter takes it apart again. Cells outside of every
part are zero and stay so.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dori_lightning.types import InputError

ORDINARY_PROMPTS: tuple[str, ...] = tuple(
    f"{kind} of {subject} {place}"
    for kind in ("a photograph", "a painting")
    for subject in (
        "a dog", "two children", "an old man", "a red car", "a wooden boat", "a bowl of fruit",
        "a small house", "a woman with a hat", "a flock of birds", "a bicycle",
    )
    for place in (
        "on a beach", "in a city street", "at night", "in the snow", "near a river",
        "in front of mountains", "in a garden", "under a bridge", "at a market", "indoors",
    )
)  # fmt: skip
"""200 captions that the usual values of a checkpoint's conditioning are measured on: always the
same, so that they belong to the checkpoint and to no corpus."""


@dataclass(frozen=True)
class Part:
    """A conditioning input within the matrix.

    Attributes:
        name: Such as ``sequence`` or ``pooled``.
        rows: Its rows of the matrix.
        columns: Its columns.
        free: Whether a search may move it; the others travel with the embedding.
    """

    name: str
    rows: slice
    columns: slice
    free: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """This part (..., rows, columns) of matrices (..., T, D); differentiable."""
        return matrix[..., self.rows, self.columns]


def stacked(*parts: tuple[str, int, int], fixed: Sequence[str] = ()) -> tuple[Part, ...]:
    """Parts below each other, from the first column on.

    Args:
        parts: Name, rows and columns of each.
        fixed: Names of those that no search may move.
    """
    found, row = [], 0
    for name, rows, columns in parts:
        free = name not in fixed
        found.append(Part(name, slice(row, row + rows), slice(0, columns), free))
        row += rows
    return tuple(found)


def matrix_shape(parts: Sequence[Part]) -> tuple[int, int]:
    """Shape (T, D) of the smallest matrix that holds all parts."""
    return max(part.rows.stop for part in parts), max(part.columns.stop for part in parts)


def pack(parts: Sequence[Part], values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Lay the values of all parts into matrices (N, T, D), fp32.

    Args:
        parts: Where each belongs.
        values: Part name to values (N, rows, columns).
    """
    if len(parts) == 1:
        return values[parts[0].name].float()
    first = values[parts[0].name]
    matrix = first.new_zeros((len(first), *matrix_shape(parts)), dtype=torch.float32)
    for part in parts:
        part.of(matrix).copy_(values[part.name])
    return matrix


def unpack(parts: Sequence[Part], matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values (N, rows, columns) of all parts out of matrices (N, T, D); differentiable."""
    if len(parts) == 1:
        return {parts[0].name: matrix}
    return {part.name: part.of(matrix) for part in parts}


def free_names(parts: Sequence[Part]) -> list[str]:
    """Names of the parts that a search may move."""
    return [part.name for part in parts if part.free]


def free_cells(parts: Sequence[Part], which: Sequence[str] | None = None) -> torch.Tensor:
    """Cells (T, D) that a search may move, bool.

    Args:
        parts: All parts.
        which: Names of those to search; None for every free one.

    Raises:
        InputError: There is no free part of a name, or none is named.
    """
    known = free_names(parts)
    strangers = [name for name in which or () if name not in known]
    if strangers or (which is not None and not which):
        raise InputError(
            f"no search can move {', '.join(strangers) or 'nothing'}: this checkpoint's free "
            f"parts are {', '.join(known)}",
            where="attack.parts",
            fix=f"attack.parts=[{','.join(known)}], or null for all of them",
        )
    cells = torch.zeros(matrix_shape(parts), dtype=torch.bool)
    for part in parts:
        if part.name in (known if which is None else which):
            part.of(cells).fill_(True)
    return cells


@dataclass(frozen=True)
class Spread:
    """Usual values of a checkpoint's conditioning: where random starts lie, and how far a step is.

    Attributes:
        parts: The free parts.
        mean: Mean over ordinary prompts (T, D), fp32 on the CPU.
        std: Standard deviation over ordinary prompts (T, D), one number for each free part; zero
            outside of them.
        distances: Norm, ``l2`` or ``linf``, to the median distance of two ordinary prompts in
            each free part, in standard deviations.
        absolute: Whether these are no measurement but the numbers of the published attack: mean
            0 and standard deviation 1.
    """

    parts: tuple[Part, ...]
    mean: torch.Tensor
    std: torch.Tensor
    distances: Mapping[str, tuple[float, ...]]
    absolute: bool = False

    @classmethod
    def published(cls, parts: Sequence[Part]) -> "Spread":
        """Standard normal, in the embedding's own numbers (Finding DoRI, 2507.16880)."""
        cells = free_cells(parts).float()
        free = tuple(part for part in parts if part.free)
        return cls(free, torch.zeros_like(cells), cells, {}, absolute=True)

    @classmethod
    def measured(cls, parts: Sequence[Part], embeddings: Iterable[torch.Tensor]) -> "Spread":
        """Mean of each cell, spread of each free part around it, and usual distances.

        Args:
            parts: All parts.
            embeddings: Those of ordinary prompts, (T, D) each, two or more; one is in memory at a
                time, and the first of them for the distances.
        """
        free = tuple(part for part in parts if part.free)
        total = torch.zeros(matrix_shape(parts), dtype=torch.float64)
        squares, count, first = dict.fromkeys(free_names(parts), 0.0), 0, list[torch.Tensor]()
        for embedding in embeddings:
            wide = embedding.detach().cpu().double()
            total, count = total + wide, count + 1
            for part in free:
                squares[part.name] += float(part.of(wide).square().sum())
            if len(first) < _COMPARED:
                first.append(embedding.detach().cpu().float())
        mean, std = total / count, torch.zeros_like(total)
        distances: dict[str, list[float]] = {"l2": [], "linf": []}
        for part in free:
            cells = part.shape[0] * part.shape[1]
            left = squares[part.name] / (count * cells) - part.of(mean).square().mean()
            unit = math.sqrt(max(float(left), 0.0))
            part.of(std).fill_(unit)
            rows = torch.stack([part.of(one).flatten() for one in first])
            for norm, p in (("l2", 2.0), ("linf", math.inf)):
                apart = torch.pdist(rows, p)
                distances[norm].append(float(apart.median()) / unit if unit else 0.0)
        return cls(
            free,
            torch.where(free_cells(parts), mean, 0).float(),
            std.float(),
            {norm: tuple(each) for norm, each in distances.items()},
        )

    def start(self, normal: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Random values (..., T, D) of the free parts, zero elsewhere.

        Args:
            normal: Standard normal numbers (..., T, D).
            scale: Factor of the spread.
        """
        if self.absolute:
            return normal * scale
        device = normal.device
        return self.mean.to(device) + scale * self.std.to(device) * normal


_COMPARED = 20
"""Ordinary prompts that are compared with each other."""
