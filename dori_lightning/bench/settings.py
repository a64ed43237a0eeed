"""What a measurement of speed measures, and at which sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dori_lightning.types import InputError

__all__ = ["FAMILIES", "BenchSettings", "ShapeSettings"]

FAMILIES = (
    "attack",
    "sampling",
    "nemo",
    "wanda",
    "finetuning",
    "audit",
    "startup",
    "scaling",
    "sd14",
)


@dataclass(frozen=True)
class ShapeSettings:
    """The attack on Stable Diffusion 1.4's architecture with random weights.

    Attributes:
        latent: Side of a latent; 64 is the checkpoint's own, 512 pixels.
        pairs: Pairs attacked.
        steps: Steps of the attack.
        noise_batch: Noise samples of a step.
        repeats: Timed rounds.
        dtype: ``bf16``: weights in it. ``fp32``: weights in it, autocast to bf16 where there is a
            GPU, as a loaded checkpoint has them.
        compile: Whether the compiled row is among them: minutes of warm-up on a CPU.
    """

    latent: int = 64
    pairs: int = 8
    steps: int = 1
    noise_batch: int = 8
    repeats: int = 3
    dtype: str = "bf16"
    compile: bool = False

    def __post_init__(self) -> None:
        _at_least_one(self, "task.sd14", "pairs", "steps", "noise_batch", "repeats")
        if self.latent < 8 or self.latent % 8:
            raise InputError(f"task.sd14.latent must be a multiple of 8, got {self.latent}")
        if self.dtype not in ("bf16", "fp32"):
            raise InputError(f"task.sd14.dtype must be bf16 or fp32, got {self.dtype!r}")


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often.

    Attributes:
        rows: Families to measure, in this order.
        repeats: Timed rounds of the families that are short; the others say their own number.
        pairs: Pairs that are attacked.
        steps: Steps of an attack that is timed; its time is the same at every step.
        noise_batch: Noise samples of a step.
        quality_pairs: Of these, how many are attacked once more with each way for
            ``quality_steps`` steps, untimed, and drawn from: loss and memorization rate. 0: none.
        quality_steps: See there.
        threshold: Similarity by the deciding descriptor above which a picture is a copy.
        compile: Whether the compiled rows are among them.
        sampling_pairs: Pairs that pictures are drawn of.
        nemo_pairs: Pairs that NeMo searches neurons for.
        nemo_repeats: Timed rounds of that.
        wanda_pairs: Pairs that Wanda makes masks for.
        finetuning_pairs: Pairs that an epoch of adversarial fine-tuning forgets.
        finetuning_updates: Optimizer steps that are timed; the epoch's time is made from them.
        audit_pairs: Pairs of the whole audit.
        audit_steps: Its attack's steps.
        startup_repeats: Starts of a program that are timed.
        scaling_pairs: Numbers of pairs that are attacked at once.
        scaling_budgets: Numbers of budgets that are read off one attack.
        scaling_steps: Steps of these attacks.
        scaling_repeats: Timed rounds of these.
        sd14: The attack on Stable Diffusion 1.4's architecture.
    """

    rows: tuple[str, ...] = FAMILIES
    repeats: int = 5
    pairs: int = 16
    steps: int = 4
    noise_batch: int = 8
    quality_pairs: int = 8
    quality_steps: int = 50
    threshold: float = 0.62
    compile: bool = True
    sampling_pairs: int = 8
    nemo_pairs: int = 16
    nemo_repeats: int = 3
    wanda_pairs: int = 8
    finetuning_pairs: int = 8
    finetuning_updates: int = 10
    audit_pairs: int = 8
    audit_steps: int = 10
    startup_repeats: int = 3
    scaling_pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    scaling_budgets: tuple[int, ...] = (1, 2, 4, 8)
    scaling_steps: int = 8
    scaling_repeats: int = 3
    sd14: ShapeSettings = field(default_factory=ShapeSettings)

    def __post_init__(self) -> None:
        for name in ("rows", "scaling_pairs", "scaling_budgets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        unknown = [name for name in self.rows if name not in FAMILIES]
        if unknown or not self.rows or len(set(self.rows)) != len(self.rows):
            raise InputError(
                f"task.rows must be different ones of {', '.join(FAMILIES)}, "
                f"got {', '.join(map(str, self.rows)) or 'none'}"
            )
        _at_least_one(
            self, "task", "repeats", "pairs", "steps", "noise_batch", "quality_steps",
            "sampling_pairs", "nemo_pairs", "nemo_repeats", "wanda_pairs", "finetuning_pairs",
            "finetuning_updates", "audit_pairs", "audit_steps", "startup_repeats",
            "scaling_steps", "scaling_repeats",
        )  # fmt: skip
        if not 0 <= self.quality_pairs <= self.pairs:
            raise InputError(
                f"task.quality_pairs must be in 0..task.pairs, got {self.quality_pairs}"
            )
        for name in ("scaling_pairs", "scaling_budgets"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise InputError(f"task.{name} must be numbers >= 1, got {getattr(self, name)}")
        if "scaling" in self.rows and max(self.scaling_budgets) > self.scaling_steps:
            raise InputError(
                f"task.scaling_budgets are snapshots of one attack: at most task.scaling_steps="
                f"{self.scaling_steps} of them, got {max(self.scaling_budgets)}"
            )


def _at_least_one(settings: Any, where: str, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise InputError(f"{where}.{name} must be >= 1, got {getattr(settings, name)}")
