"""The embedding attack as a LightningModule: batches of pairs in, adversarial embeddings out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch

from dori_lightning.attacks.draws import keyed_generator, random_embedding
from dori_lightning.attacks.memory import fit_cpu_passes
from dori_lightning.attacks.results import AttackProblem, AttackResult, joined
from dori_lightning.attacks.solver import solve
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dori_lightning.attacks.ledger import AttackLedger
    from dori_lightning.attacks.settings import AttackSettings
    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.pairs.datamodule import Encoded, PairBatch
    from dori_lightning.types import Budget, Init, Pair

__all__ = ["ControlPrompts", "EmbeddingAttack", "input_hash"]


@dataclass(frozen=True)
class ControlPrompts:
    """Prompts that an attack may start from.

    Attributes:
        ids: Pair ids, length M.
        embeddings: Their embeddings (M, T, D), None where there are none.
    """

    ids: tuple[str, ...]
    embeddings: torch.Tensor | None

    def pick(self, seed: int, pair_id: str, restart: int) -> torch.Tensor:
        """Embedding (T, D) of a control prompt other than the pair's own, drawn by key.

        Raises:
            InputError: There is no other control prompt.
        """
        others = [k for k, name in enumerate(self.ids) if name != pair_id]
        if not others or self.embeddings is None:
            raise InputError(
                "attack.inits has control_prompt, which needs a control pair besides the attacked "
                "one; add pairs of kind control or drop it from attack.inits"
            )
        generator = keyed_generator("control_prompt", seed, pair_id, restart)
        return self.embeddings[others[int(torch.randint(len(others), (1,), generator=generator))]]


def input_hash(pair: Pair, latent: torch.Tensor, initial: torch.Tensor) -> str:
    """Hash of everything that a result depends on and that belongs to the pair."""
    digest = hashlib.sha256(f"{pair.id}\0{pair.prompt}\0{pair.sha256}\0".encode())
    for tensor in (latent, initial):
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()[:16]


class EmbeddingAttack(L.LightningModule):
    """Attack batches of pairs in ``predict``: each process solves its own, nothing is averaged.

    Prediction rather than fitting, because no parameter of a module is trained: DDP would average
    the embeddings' gradients over processes, which weakens the attack and makes a mitigation look
    better than it is. Run it with a Trainer that has ``inference_mode=False``.
    """

    def __init__(
        self,
        model: TextToImage,
        *,
        settings: AttackSettings,
        budget: Budget,
        init: Init,
        restart: int,
        controls: ControlPrompts,
        ledger: AttackLedger,
        seed: int,
    ) -> None:
        """Prepare the attack from one initial point.

        Args:
            model: Model under attack; kept out of the module's parameters and state.
            settings: Attack settings.
            budget: Resolved budget.
            init: Initial point.
            restart: Which restart.
            controls: Where ``control_prompt`` starts from.
            ledger: Finished pairs are read from it and new ones written to it.
            seed: Run seed.
        """
        super().__init__()
        # a list hides the module, so that its weights stay out of this one's state
        self._held = [model]
        self.settings, self.budget, self.init_point, self.restart = settings, budget, init, restart
        self.controls, self.ledger, self.seed = controls, ledger, seed
        # of the stretch that is taken next: the step to stop at, and who is told of every step
        self.until = budget.steps
        self.on_step: Callable[[int], None] | None = None

    @property
    def model(self) -> TextToImage:
        """Model under attack."""
        return self._held[0]

    def initial(self, pairs: Sequence[Pair], embeddings: torch.Tensor) -> torch.Tensor:
        """Initial embeddings (N, T, D) of pairs.

        Args:
            pairs: N pairs.
            embeddings: Embeddings (N, T, D) of their prompts.
        """
        if self.init_point == "prompt":
            return embeddings
        shape = (int(embeddings.shape[1]), int(embeddings.shape[2]))
        if self.init_point == "random":
            return torch.stack(
                [random_embedding(self.seed, p.id, self.restart, shape) for p in pairs]
            )
        return torch.stack([self.controls.pick(self.seed, p.id, self.restart) for p in pairs])

    def begin(self, pair: Pair, encoded: Encoded) -> tuple[torch.Tensor, str]:
        """Where the search for one pair begins (T, D), and the hash of its inputs."""
        initial = self.initial([pair], encoded.embedding[None]).cpu()[0]
        return initial, input_hash(pair, encoded.latent, initial)

    def search(
        self,
        problem: AttackProblem,
        *,
        so_far: AttackResult | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> AttackResult:
        """Solve a problem with this attack's settings, from where it stands; nothing is kept."""
        fit_cpu_passes(
            self.model,
            noise_batch=self.settings.noise_batch,
            wanted=self.settings.pairs_per_forward,
            pair_id=problem.ids[0],
        )
        return solve(
            self.model,
            problem,
            budget=self.budget,
            lr=self.settings.lr,
            noise_batch=self.settings.noise_batch,
            seed=self.seed,
            snapshots=self.settings.snapshots,
            keep_first_token=self.settings.keep_first_token,
            so_far=so_far,
            until=self.until,
            on_step=on_step,
        )

    def stored(self, pair_id: str, inputs: str) -> AttackResult | None:
        """What the ledger holds of a pair's attack, as far as it came."""
        return self.ledger.read(pair_id, self.init_point, self.restart, inputs)

    def reached(self, result: AttackResult | None) -> bool:
        """Whether a stored attack came as far as this one is to go."""
        return result is not None and result.steps >= self.until

    def predict_step(self, batch: PairBatch, *_: Any) -> list[AttackResult]:
        """Solve the pairs of a batch as far as the ledger does not hold them yet.

        Returns:
            One result per pair of the batch, in its order.
        """
        initial = self.initial(batch.pairs, batch.embeddings).cpu()
        hashes = {
            p.id: input_hash(p, batch.latents[k], initial[k]) for k, p in enumerate(batch.pairs)
        }
        groups: dict[int, list[tuple[int, AttackResult | None]]] = {}
        for k, pair in enumerate(batch.pairs):
            stored = self.stored(pair.id, hashes[pair.id])
            if not self.reached(stored):
                begun = stored if stored is not None and stored.state is not None else None
                groups.setdefault(begun.steps if begun else 0, []).append((k, begun))
        for group in groups.values():
            rows = [k for k, _ in group]
            begun_rows = [begun for _, begun in group if begun is not None]
            problem = AttackProblem(
                tuple(batch.pairs[k].id for k in rows),
                self.restart,
                batch.latents[rows],
                initial[rows],
            )
            result = self.search(
                problem, so_far=joined(begun_rows) if begun_rows else None, on_step=self.on_step
            )
            self.ledger.write(result, self.init_point, hashes)
        found = [self.stored(p.id, hashes[p.id]) for p in batch.pairs]
        return [r for r in found if r is not None]
