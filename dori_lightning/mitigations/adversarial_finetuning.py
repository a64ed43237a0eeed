"""Train the whole denoiser to show surrogates wherever an attack finds a memorized picture.

Reference: Finding DoRI (2507.16880), section "adversarial fine-tuning": surrogates from a pruned
model, L = L_DM + L_Adv, fresh 50-step attacks as inner loop, all weights of the UNet, five epochs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dori_lightning import processes
from dori_lightning.attacks.draws import keyed_generator
from dori_lightning.mitigations.base import check_calibrated, edit_key
from dori_lightning.mitigations.finetuning import (
    FinetuneSettings,
    Finetuning,
    check_disk,
    finetune,
)
from dori_lightning.mitigations.low_rank import LowRank
from dori_lightning.mitigations.surrogates import SurrogateSettings, find_surrogates
from dori_lightning.mitigations.trigger_pool import PoolSettings, TriggerPool
from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dori_lightning.mitigations.base import Encodings, Workshop
    from dori_lightning.mitigations.edits import WeightEdit
    from dori_lightning.models.protocol import TextToImage
    from dori_lightning.types import Pair

__all__ = ["AdversarialFinetuning", "AdversarialTraining", "redirect_loss"]


@dataclass(frozen=True)
class AdversarialFinetuning:
    """Adversarial fine-tuning: the mitigation of Finding DoRI.

    The paper leaves open the optimizer, the learning rate, what an epoch is, how many triggers a
    picture gets and where their searches begin. Here an epoch searches triggers for every pair
    once and then takes ``updates`` optimizer steps against them.

    Attributes:
        name: How reports call it.
        surrogates: What to show instead.
        pool: How triggers are searched and kept.
        finetune: Optimizer settings.
        epochs: Rounds of search and training; the paper takes five.
        updates: Optimizer steps of a round.
        adversarial_batch: Triggers of a step, each with a surrogate of its pair (L_Adv).
        ordinary_batch: Ordinary pictures of a step (L_DM).
        adversarial_weight: Weight of L_Adv against L_DM; 1 in the paper.
        redirect: Share of a step's triggers that are trained on the memorized picture's own noised
            latent instead of the surrogate's, towards the surrogate. The paper has none: L_Adv
            sees noised surrogates alone, which leaves the model able to denoise the picture
            itself once an attack has found the way to it. See ``redirect_loss``.
        ordinary_examples: Ordinary pictures that are encoded and drawn from.
        low_rank: Rank of a low-rank update (LoRA) of all linear layers instead of training all
            weights, which the paper reports as failing; None trains all.
    """

    name: str
    surrogates: SurrogateSettings
    pool: PoolSettings = field(default_factory=PoolSettings)
    finetune: FinetuneSettings = field(default_factory=FinetuneSettings)
    epochs: int = 5
    updates: int = 50
    adversarial_batch: int = 8
    ordinary_batch: int = 8
    adversarial_weight: float = 1.0
    redirect: float = 0.0
    ordinary_examples: int = 2000
    low_rank: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "epochs", "updates", "adversarial_batch", "ordinary_batch", "ordinary_examples",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"mitigation.{name} must be >= 1, got {getattr(self, name)}")
        if self.adversarial_weight <= 0:
            raise InputError(
                f"mitigation.adversarial_weight must be > 0, got {self.adversarial_weight}"
            )
        if not 0 <= self.redirect <= 1:
            raise InputError(f"mitigation.redirect must be in [0, 1], got {self.redirect}")
        if self.low_rank is not None and self.low_rank < 1:
            raise InputError(f"mitigation.low_rank must be >= 1 or null, got {self.low_rank}")

    def apply(self, model: TextToImage, pairs: Sequence[Pair], workshop: Workshop) -> WeightEdit:
        """Find surrogates, then alternate between searching triggers and training."""
        check_calibrated(pairs, self.name)
        key = edit_key(self, model, pairs, workshop)
        if self.low_rank is None:
            check_disk(model, self.finetune, workshop, key=key)
        else:
            added = LowRank.count(model.denoiser(), self.low_rank)
            check_disk(
                model, self.finetune, workshop, key=key, trained=lambda _: False, added=added
            )
        surrogates = find_surrogates(model, pairs, workshop, self.surrogates)
        ordinary = workshop.encodings(model, "calibration", self.ordinary_examples)

        def make() -> AdversarialTraining:
            return AdversarialTraining(
                model, self, pairs, workshop, surrogates=surrogates.latents, ordinary=ordinary
            )

        return finetune(
            make,
            model,
            workshop,
            steps=self.epochs * self.updates,
            key=key,
            title=self.name,
            notes={"surrogates": surrogates.notes},
        )


class AdversarialTraining(Finetuning):
    """The training of ``AdversarialFinetuning``; every first step of a round searches triggers."""

    def __init__(
        self,
        model: TextToImage,
        method: AdversarialFinetuning,
        pairs: Sequence[Pair],
        workshop: Workshop,
        *,
        surrogates: dict[str, torch.Tensor],
        ordinary: Encodings,
    ) -> None:
        """Prepare the training.

        Args:
            model: Its denoiser is trained.
            method: Settings.
            pairs: N pairs to forget.
            workshop: Gives the seed, encoded pairs and ordinary prompts.
            surrogates: Pair id to latents (S, C, h, w).
            ordinary: Ordinary prompts and pictures.
        """
        low_rank = None
        if method.low_rank is not None:
            low_rank = LowRank(model.denoiser(), method.low_rank, seed=workshop.seed)
        trained = low_rank.trains if low_rank is not None else lambda _: True
        super().__init__(model, method.finetune, trained=trained)
        self.low_rank = low_rank
        self.method, self.seed = method, workshop.seed
        self.surrogates, self.ordinary = surrogates, ordinary
        self.pool = TriggerPool(
            model,
            [workshop.data.batch([pair]) for pair in pairs],
            method.pool,
            ordinary=ordinary.embeddings,
            seed=workshop.seed,
        )

    def work(self, steps: int) -> int:
        """Rows through the denoiser up to an optimizer step, with no pair left out."""
        method = self.method
        rounds = -(-steps // method.updates)
        rows = method.adversarial_batch + method.ordinary_batch
        return rounds * self.pool.rows_of_search + steps * rows

    @property
    def notes(self) -> dict[str, Any]:
        """What the pool has to say: attack losses by round, pairs skipped."""
        return {"rounds": self.pool.rounds}

    def training_step(self, *_: Any) -> torch.Tensor:
        """L_DM on ordinary pictures plus the weighted L_Adv on triggers and surrogates."""
        method, step, device = self.method, self.global_step, self.model.device
        if step % method.updates == 0:
            # attacks run in full precision whatever the training's, as those of an audit do
            with torch.autocast(device.type, enabled=False):
                self.pool.worked = self.worked
                self.pool.search(step // method.updates)
        generator = keyed_generator("adversarial_finetuning", self.seed, step)
        ids, triggers = self.pool.draw(method.adversarial_batch, generator)
        targets = []
        for name in ids:
            own = self.surrogates[name]
            targets.append(own[int(torch.randint(len(own), (1,), generator=generator))])
        surrogates = torch.stack(targets)
        count = len(self.ordinary.latents)
        rows = torch.randint(count, (method.ordinary_batch,), generator=generator)
        every = len(ids) + len(rows)
        noise = torch.randn((every, *surrogates.shape[1:]), generator=generator)
        timesteps = torch.randint(self.model.num_train_timesteps, (every,), generator=generator)
        # everything was drawn by every process, each trains on its share of it
        ours, others = processes.share(len(ids)), processes.share(len(rows))
        turned = len(range(round(method.redirect * len(ids)))[ours.rows])
        names, triggers, surrogates = ids[ours.rows], triggers[ours.rows], surrogates[ours.rows]
        latents = torch.cat([surrogates, self.ordinary.latents[rows[others.rows]]]).to(device)
        embeddings = torch.cat([triggers, self.ordinary.embeddings[rows[others.rows]]]).to(device)
        places = torch.arange(every)
        places = torch.cat([places[: len(ids)][ours.rows], places[len(ids) :][others.rows]])
        noise, timesteps = noise[places].to(device), timesteps[places].to(device)
        plain = self.model.denoising_loss(
            latents[turned:], noise[turned:], timesteps[turned:], embeddings[turned:]
        )
        adversarial = plain[: len(names) - turned]
        if turned:
            memorized = torch.stack([self.pool.latents[name] for name in names[:turned]])
            redirected = redirect_loss(
                self.model,
                memorized.to(device),
                latents[:turned],
                noise[:turned],
                timesteps[:turned],
                embeddings[:turned],
            )
            adversarial = torch.cat([redirected, adversarial])
        ordinary = others.weight * plain[len(names) - turned :].mean()
        forgetting = ours.weight * adversarial.mean()
        self.log("finetune/adversarial_loss", forgetting)
        self.log("finetune/ordinary_loss", ordinary)
        return ordinary + method.adversarial_weight * forgetting

    def finish(self) -> None:
        """Merge the low-rank update into the weights."""
        if self.low_rank is not None:
            self.low_rank.merge()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the triggers, which took most of the time."""
        checkpoint["trigger_pool"] = self.pool.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the triggers back."""
        self.pool.restore(checkpoint["trigger_pool"])


def redirect_loss(
    model: TextToImage,
    memorized: torch.Tensor,
    surrogates: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    embeddings: torch.Tensor,
) -> torch.Tensor:
    """How far the model is from seeing the surrogate in the noised memorized picture, (N,).

    Mean squared error between the clean latent that the model's noise prediction implies and the
    surrogate's, times min(SNR, 1): at low noise the picture is plain to see and nothing can be
    redirected, so that the weight bounds what is asked for. The attack's objective, denoising the
    memorized picture, is thereby trained against directly.

    Args:
        model: Model in training.
        memorized: Latents of the memorized pictures (N, C, h, w).
        surrogates: Latents to see instead (N, C, h, w).
        noise: Standard normal noise (N, C, h, w).
        timesteps: Timesteps (N,).
        embeddings: Triggers (N, T, D).
    """
    alpha = model.alphas_cumprod[timesteps][:, None, None, None]
    noised = model.noised(memorized, noise, timesteps)
    predicted = model.predict_noise(noised, timesteps, embeddings)
    # the noise that leads from here to the surrogate; its error is SNR times the latent's
    wanted = (noised - alpha.sqrt() * surrogates) / (1 - alpha).sqrt()
    weight = ((1 - alpha) / alpha).clamp(max=1.0)
    return (weight * (predicted - wanted).square()).flatten(1).mean(1)
