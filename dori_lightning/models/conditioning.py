"""Everything that conditions a denoiser, in one matrix with named parts.

Families condition on one sequence of tokens, on several, on pooled vectors beside them, on sizes
and masks. All of it is laid, row below row, into one matrix (T, D), so that searches, caches and
files know a single tensor; the denoiser's adapter takes it apart again. Cells outside of every
part are zero and stay so.
"""

from collections.abc import Mapping, Sequence
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


def free_cells(parts: Sequence[Part], which: Sequence[str] | None = None) -> torch.Tensor:
    """Cells (T, D) that a search may move, bool.

    Args:
        parts: All parts.
        which: Names of those to search; None for every free one.

    Raises:
        InputError: There is no free part of a name, or none is named.
    """
    known = [part.name for part in parts if part.free]
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
        mean: Mean over ordinary prompts (T, D), fp32 on the CPU.
        std: Standard deviation over ordinary prompts (T, D), one number for each free part; zero
            outside of them.
        absolute: Whether these are no measurement but the numbers of the published attack: mean
            0 and standard deviation 1.
    """

    mean: torch.Tensor
    std: torch.Tensor
    absolute: bool = False

    @classmethod
    def published(cls, parts: Sequence[Part]) -> "Spread":
        """Standard normal, in the embedding's own numbers (Finding DoRI, 2507.16880)."""
        cells = free_cells(parts).float()
        return cls(torch.zeros_like(cells), cells, absolute=True)

    @classmethod
    def measured(cls, parts: Sequence[Part], embeddings: torch.Tensor) -> "Spread":
        """Mean of each cell, and spread of each free part around its mean.

        Args:
            parts: All parts.
            embeddings: Of ordinary prompts (M, T, D), M >= 2.
        """
        embeddings = embeddings.double().cpu()
        mean, cells = embeddings.mean(0), free_cells(parts)
        std = torch.zeros_like(mean)
        for part in parts:
            if part.free:
                away = part.of(embeddings) - part.of(mean)
                part.of(std).fill_(away.square().mean().sqrt())
        return cls(torch.where(cells, mean, 0).float(), std.float())
