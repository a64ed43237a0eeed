"""Quantization: weights are rounded, and the prompts drawn from.

A mitigation that moved weights by little may be rounded away, without anybody meaning to: fewer
bits are how checkpoints are passed on. Reference: *Catastrophic Failure of LLM Unlearning via
Quantization* (2410.16454).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from dori_lightning.certify.base import Afterwards, AttackBase, Attempt, Holds, Plan, Subject
from dori_lightning.certify.prompts import Prompts
from dori_lightning.mitigations.edits import LayeredEdit, Origin, WeightEdit
from dori_lightning.models.protocol import TextToImage
from dori_lightning.types import InputError, Pair

FORMATS = re.compile(r"fp16|int[2-8]")


@dataclass(frozen=True)
class Quantization(AttackBase):
    """Round the weights of all linear and convolution layers, and draw from the prompts.

    Attributes:
        formats: ``fp16`` and ``int2`` to ``int8``, from the finest to the coarsest.
        group: Weights of an output channel that share a scale in formats below eight bits; in
            ``int8`` all of it share one.
    """

    name: str = "quantization"
    formats: tuple[str, ...] = ("fp16", "int8", "int4")
    group: int = 64
    holds: Holds = field(default="weights", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", tuple(self.formats))
        where = f"certify.attacks.{self.name}"
        unknown = [form for form in self.formats if not FORMATS.fullmatch(form)]
        if unknown or not self.formats or len(set(self.formats)) < len(self.formats):
            raise InputError(
                f"formats of {self.name} are fp16 and int2 to int8, each once, got "
                f"{list(self.formats)}",
                where=f"{where}.formats",
                fix="such as [fp16,int8,int4]",
            )
        if self.group < 1:
            raise InputError(
                f"group of {self.name} must be >= 1, got {self.group}", where=f"{where}.group"
            )

    def rows(self, plan: Plan) -> int:
        """K images in each format."""
        return len(self.formats) * plan.drawing

    def run(self, subject: Subject, pairs: Sequence[Pair], attempt: Attempt) -> None:
        """Round, and draw."""
        for form in self.formats:
            after = Afterwards(attempt, f"rounded to {form}")
            if not after.left(Prompts.LEVEL):
                continue
            with subject.carried():
                rounded = round_weights(subject.model, form, group=self.group)
            edit = LayeredEdit.over(subject.edit, rounded)
            Prompts().run(subject.with_edit(edit), pairs, after)


def round_weights(model: TextToImage, form: str, *, group: int) -> WeightEdit:
    """The weights of all linear and convolution layers, as they are now, in fewer bits.

    Args:
        model: The model.
        form: Name of a format.
        group: Weights that share a scale; see `Quantization`.
    """
    weights = {
        f"{name}.weight": rounded(layer.weight.detach(), form, group=group).cpu()
        for name, layer in model.denoiser().named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    return WeightEdit(Origin(model.fingerprint), weights)


def rounded(weight: torch.Tensor, form: str, *, group: int) -> torch.Tensor:
    """A weight (C_out, ...) in fewer bits, in its own dtype.

    Integers are symmetric around zero, which stays zero, and each scale is the largest weight's.

    Args:
        weight: The weight.
        form: Name of a format.
        group: Weights of an output channel that share a scale below eight bits.
    """
    if form == "fp16":
        return weight.half().to(weight.dtype)
    bits, flat = int(form.removeprefix("int")), weight.float().flatten(1)
    width = flat.shape[1] if bits == 8 else min(group, flat.shape[1])
    filled = nn.functional.pad(flat, (0, -flat.shape[1] % width))
    grouped = filled.reshape(len(filled), -1, width)
    step = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    grouped = (grouped / step.where(step > 0, 1.0)).round() * step
    found: torch.Tensor = grouped.flatten(1)[:, : flat.shape[1]].reshape(weight.shape)
    return found.to(weight.dtype)
