"""The numbers of *Finding DoRI* (ICML 2026, arXiv 2507.16880) that a table is shown beside.

They were measured on Stable Diffusion 1.4 and 2.x, on verbatim memorized LAION images, by SSCD
above 0.7: another model, list and descriptor than the embedded benchmark's. They show in which
direction to look, they are no target. Where nothing was published there is no number here.

Each number carries where it was read: ``C`` the authors' own page, ``S`` notes or reviews of the
paper that others wrote, ``F`` a figure, approximately.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["SOURCES", "Figure", "Published", "published_for"]

Source = Literal["C", "S", "F"]

SOURCES: dict[Source, str] = {
    "C": "the authors' page",
    "S": "notes or reviews of the paper, written by others",
    "F": "read off a figure, approximate",
}


@dataclass(frozen=True)
class Figure:
    """One published number.

    Attributes:
        rate: Memorization rate in [0, 1].
        source: Where it was read, a key of `SOURCES`.
        similarity: SSCD with the original, None where not given.
        spread: What the paper writes after the plus-minus sign.
    """

    rate: float
    source: Source
    similarity: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Published:
    """What the paper gives for one row; None where it gives nothing.

    Attributes:
        row: What the paper calls the row.
        model: On which model.
        prompt: Verbatim memorized images, from their prompts.
        attacked: The same, by the attack.
        control_prompt: Images that are not memorized, from their prompts.
        control_attacked: The same, by the attack.
    """

    row: str
    model: str
    prompt: Figure | None = None
    attacked: Figure | None = None
    control_prompt: Figure | None = None
    control_attacked: Figure | None = None


_SD1 = "SD 1.4"
_SD2 = "SD 2"

# Variants of these are not the paper's, or it gives no rate for them.
_EXACT = ("none", "adversarial_finetuning")

# By the beginning of a mitigation's name, up to an underscore; the longest that fits decides.
_ON_SD1: dict[str, Published] = {
    "none": Published(
        "no mitigation",
        _SD1,
        prompt=Figure(0.98, "C", 0.90, 0.04),
        control_prompt=Figure(0.00, "C", 0.17, 0.05),
        control_attacked=Figure(0.00, "C", 0.48, 0.06),
    ),
    "nemo": Published(
        "NeMo",
        _SD1,
        prompt=Figure(0.20, "C", 0.33, 0.18),
        attacked=Figure(0.99, "C", 0.91, 0.03),
    ),
    "wanda": Published(
        "Wanda",
        _SD1,
        prompt=Figure(0.00, "C", 0.20, 0.08),
        attacked=Figure(0.72, "C", 0.76, 0.05),
    ),
    "wanda_10": Published("Wanda, 10 %", _SD1, attacked=Figure(0.01, "C", 0.40, 0.13)),
    "esd": Published("ESD", _SD1, attacked=Figure(0.98, "C", 0.90, 0.04)),
    "concept_ablation": Published(
        "Concept Ablation", _SD1, attacked=Figure(0.97, "C", 0.91, 0.04)
    ),
    "siss": Published("SISS", _SD1, attacked=Figure(0.39, "S", 0.60, 0.22)),
    "adversarial_finetuning": Published(
        "adversarial fine-tuning, 5 epochs", _SD1, attacked=Figure(0.02, "C", 0.36, 0.14)
    ),
}
_ON_SD2: dict[str, Published] = {
    "nemo": Published(
        "NeMo", _SD2, prompt=Figure(0.06, "S"), attacked=Figure(1.00, "C", 0.87, 0.02)
    ),
    "adversarial_finetuning": Published(
        "adversarial fine-tuning", _SD2, attacked=Figure(0.06, "C", 0.14, 0.06)
    ),
}


def published_for(mitigation: str, *, checkpoint: str) -> Published | None:
    """Find what the paper gives for a row, by the beginning of the mitigation's name.

    Args:
        mitigation: Name of the mitigation, such as ``nemo`` or ``wanda_10``.
        checkpoint: Name of the checkpoint; names that begin with ``sd2`` get the numbers of
            Stable Diffusion 2, all others those of 1.4.

    Returns:
        The paper's row, None where it has none.
    """
    rows = _ON_SD2 if checkpoint.startswith("sd2") else _ON_SD1
    fitting = [
        name
        for name in rows
        if mitigation == name or (name not in _EXACT and mitigation.startswith(f"{name}_"))
    ]
    return rows[max(fitting, key=len)] if fitting else None
