"""Keep one verified file per finished piece of work.

So a killed run redoes only what was in flight.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dori_lightning.attacks.solver import AttackResult, OptimizerState
from dori_lightning.runtime.artifacts import write_atomically

log = logging.getLogger(__name__)

_STATE = tuple(field.name for field in fields(OptimizerState))


@dataclass(frozen=True)
class AttackStore:
    """Attack results on disk, valid for one set of settings.

    There is one safetensors file per (pair, init, restart).

    Attributes:
        folder: Where the files are.
        identity: What a result depends on besides the pair (checkpoint, edit, attack settings,
            seed); a file with another identity does not count as done.
    """

    folder: Path
    identity: Mapping[str, str]

    def path(self, pair_id: str, init: str, restart: int) -> Path:
        """Where a result lies."""
        return self.folder / init / f"{pair_id}.r{restart}.safetensors"

    def write(self, result: AttackResult, init: str, inputs: Mapping[str, str]) -> None:
        """Store every row of a result.

        Args:
            result: Rows to store.
            init: Initial point.
            inputs: Pair id to a hash of what went in for that pair (picture, prompt, initial
                embedding).
        """
        for row, pair_id in enumerate(result.ids):
            metadata = {
                **self.identity,
                "format": "pt",
                "pair": pair_id,
                "init": init,
                "inputs": inputs[pair_id],
                "restart": str(result.restart),
                "snapshots": json.dumps(result.snapshots),
                "diverged": str(bool(result.diverged[row])),
                "no_gradient": str(bool(result.no_gradient[row])),
            }
            tensors = {
                "embeddings": result.embeddings[row].contiguous(),
                "losses": result.losses[row].contiguous(),
            }
            if result.state is not None:
                tensors |= {n: t[row].contiguous() for n, t in vars(result.state).items()}
            write_atomically(self.path(pair_id, init, result.restart), save(tensors, metadata))

    def read(self, pair_id: str, init: str, restart: int, inputs: str) -> AttackResult | None:
        """A stored result, or None where none is undamaged and belongs to these settings.

        Its search may have stopped on its way: ``steps`` says how far it came, and with its state
        it goes on to the bits that it would have come to at once. So runs that stop early and
        runs that do not can use each other's results.
        """
        path = self.path(pair_id, init, restart)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                embeddings, losses = file.get_tensor("embeddings"), file.get_tensor("losses")
                held = [name for name in _STATE if name in file.keys()]  # noqa: SIM118
                state = {name: file.get_tensor(name)[None] for name in held}
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged and is computed anew: %s", path, error)
            return None
        differing = [
            k for k, v in {**self.identity, "inputs": inputs}.items() if metadata.get(k) != v
        ]
        if differing:
            log.warning(
                "%s was made with another %s and is computed anew", path, ", ".join(differing)
            )
            return None
        try:
            return AttackResult(
                ids=(pair_id,),
                restart=restart,
                embeddings=embeddings[None],
                snapshots=tuple(int(step) for step in json.loads(metadata["snapshots"])),
                losses=losses[None],
                diverged=torch.tensor([metadata["diverged"] == "True"]),
                # earlier versions ended where there was none
                no_gradient=torch.tensor([metadata.get("no_gradient") == "True"]),
                state=OptimizerState(**state) if state else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            log.warning("%s is damaged and is computed anew: %r", path, error)
            return None
