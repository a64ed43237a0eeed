"""How the result of one attack becomes a file."""

from __future__ import annotations

from dataclasses import fields

import torch

from dori_lightning.attacks.solver import AttackResult, OptimizerState
from dori_lightning.runtime.cache import TENSORS, Codec, Tensors

_STATE = tuple(field.name for field in fields(OptimizerState))


def _encode(result: AttackResult) -> Tensors:
    tensors = {
        "embeddings": result.embeddings[0],
        "snapshots": torch.tensor(result.snapshots, dtype=torch.int64),
        "losses": result.losses[0],
        "diverged": result.diverged,
        "no_gradient": result.no_gradient,
    }
    if result.state is not None:
        tensors |= {name: getattr(result.state, name)[0] for name in _STATE}
    return tensors


def _decode(tensors: Tensors) -> AttackResult:
    state = {name: tensors[name][None] for name in _STATE if name in tensors}
    return AttackResult(
        ids=("",),
        embeddings=tensors["embeddings"][None],
        snapshots=tuple(tensors["snapshots"].tolist()),
        losses=tensors["losses"][None],
        diverged=tensors["diverged"],
        no_gradient=tensors["no_gradient"],
        state=OptimizerState(**state) if state else None,
    )


RESULT: Codec[AttackResult] = TENSORS.mapped(_encode, _decode)
"""A result of one row. The file does not hold the pair's id: its name does."""
