"""Everything that conditions a denoiser, in one matrix with named parts.

Families condition on one sequence of tokens, on several, on pooled vectors beside them, on sizes
and masks. All of it is laid, row below row, into one matrix (T, D), so that searches, caches and
files know a single tensor; the denoiser's adapter takes it apart again. Cells outside of every
part are zero and stay so.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

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
        masks: Name of the part whose rows it tells apart, in one number for each row: 1 where the
            denoiser reads it, 0 where it is padding. None for whatever is no mask.
    """

    name: str
    rows: slice
    columns: slice
    free: bool = True
    masks: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """This part (..., rows, columns) of matrices (..., T, D); differentiable."""
        return matrix[..., self.rows, self.columns]


def stacked(
    *parts: tuple[str, int, int],
    fixed: Sequence[str] = (),
    masks: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Part, ...]:
    """Parts below each other, from the first column on.

    Args:
        parts: Name, rows and columns of each.
        fixed: Names of those that no search may move.
        masks: Names of masks, which no search may move either, to those of what they mask.
    """
    found, row = [], 0
    for name, rows, columns in parts:
        free = name not in fixed and name not in masks
        place = slice(row, row + rows), slice(0, columns)
        found.append(Part(name, *place, free, masks.get(name)))
        row += rows
    return tuple(found)


def matrix_shape(parts: Sequence[Part]) -> tuple[int, int]:
    """Shape (T, D) of the smallest matrix that holds all parts."""
    return max(part.rows.stop for part in parts), max(part.columns.stop for part in parts)


def pack(parts: Sequence[Part], values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Lay the values of all parts into matrices (N, T, D), fp32; padding is zero.

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
    return without_padding(parts, matrix)


def unpack(parts: Sequence[Part], matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """Values (N, rows, columns) of all parts out of matrices (N, T, D); differentiable."""
    if len(parts) == 1:
        return {parts[0].name: matrix}
    return {part.name: part.of(matrix) for part in parts}


def read_rows(parts: Sequence[Part], matrix: torch.Tensor) -> torch.Tensor:
    """Rows (..., T) of matrices (..., T, D) that a denoiser reads, bool: all but padding."""
    read = torch.ones(matrix.shape[:-1], dtype=torch.bool, device=matrix.device)
    for part in parts:
        if part.masks is not None:
            masked = next(other for other in parts if other.name == part.masks)
            # between two masks, as on a line from one embedding to another, the nearer one
            read[..., masked.rows] = part.of(matrix)[..., 0, :] > 0.5
    return read


def without_padding(parts: Sequence[Part], matrix: torch.Tensor) -> torch.Tensor:
    """Matrices (..., T, D) with zeros in the rows that no denoiser reads."""
    if not any(part.masks for part in parts):
        return matrix
    return matrix * read_rows(parts, matrix)[..., None]


def free_names(parts: Sequence[Part]) -> list[str]:
    """Names of the parts that a search may move."""
    return [part.name for part in parts if part.free]


def free_cells(
    parts: Sequence[Part], which: Sequence[str] | None = None, *, with_masks: bool = False
) -> torch.Tensor:
    """Cells (T, D) that a search may move, bool.

    Args:
        parts: All parts.
        which: Names of those to search; None for every free one.
        with_masks: Also the masks of these parts, which no search moves but which go with them.

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
    searched = known if which is None else which
    for part in parts:
        if part.name in searched or (with_masks and part.masks in searched):
            part.of(cells).fill_(True)
    return cells


@dataclass(frozen=True)
class Spread:
    """Usual values of a checkpoint's conditioning: where random starts lie, and how far a step is.

    Attributes:
        parts: The free parts.
        mean: Mean over ordinary prompts (T, D), fp32 on the CPU; of rows with a mask over those
            that have them, and of the mask itself 1 where half of the prompts or more do.
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
        reading = torch.zeros(len(total), dtype=torch.float64)
        squares, count, first = dict.fromkeys(free_names(parts), 0.0), 0, list[torch.Tensor]()
        for embedding in embeddings:
            wide = embedding.detach().cpu().double()
            total, count = total + wide, count + 1
            reading += read_rows(parts, wide)
            for part in free:
                squares[part.name] += float(part.of(wide).square().sum())
            if len(first) < _COMPARED:
                first.append(embedding.detach().cpu().float())
        mean, std = total / reading.clamp_min(1)[:, None], torch.zeros_like(total)
        distances: dict[str, list[float]] = {"l2": [], "linf": []}
        for part in free:
            share = (reading[part.rows] / count)[:, None]
            cells = float(share.sum()) * part.shape[1]
            of_means = (share * part.of(mean).square()).mean() / share.mean()
            left = squares[part.name] / (count * cells) - of_means
            unit = math.sqrt(max(float(left), 0.0))
            part.of(std).fill_(unit)
            rows = torch.stack([part.of(one).flatten() for one in first])
            for norm, p in (("l2", 2.0), ("linf", math.inf)):
                apart = torch.pdist(rows, p)
                distances[norm].append(float(apart.median()) / unit if unit else 0.0)
        for part in parts:
            if part.masks is not None:
                part.of(mean).copy_(part.of(mean) >= 0.5)
        return cls(
            free,
            torch.where(free_cells(parts, with_masks=True), mean, 0).float(),
            std.float(),
            {norm: tuple(each) for norm, each in distances.items()},
        )

    def start(self, normal: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Random values (..., T, D) of the free parts and usual masks, zero elsewhere.

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
