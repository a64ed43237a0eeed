"""What the texts on locality share: an answer, and numbers as words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dori_lightning.report.summary import interval_words, percent_words

if TYPE_CHECKING:
    from dori_lightning.locality.estimates import Estimate, Rate

__all__ = [
    "METHOD_WORDS",
    "START_WORDS",
    "Answer",
    "estimate_words",
    "no_answer",
    "rate_words",
]

METHOD_WORDS = {"nemo": "NeMo", "wanda": "Wanda"}
START_WORDS = {
    "random": "random embeddings",
    "prompt": "the image's own prompt",
    "control_prompt": "unrelated prompts",
    "prompt_itself": "the prompt itself, not attacked",
}


@dataclass(frozen=True)
class Answer:
    """One question with its answer.

    Attributes:
        name: Stable name, also of its figure.
        question: The question.
        text: The answer in numbers, with its control.
        caption: How to read the figure.
    """

    name: str
    question: str
    text: str
    caption: str

    @property
    def label(self) -> str:
        """A word or two for the page's menu."""
        return _LABELS[self.name]


_LABELS = {
    "budget": "Budget",
    "spread": "Distances",
    "map": "Map",
    "activations": "Activations",
    "weights": "Weights",
    "methods": "NeMo and Wanda",
    "lines": "Lines",
    "transfer": "Transfer",
}


def estimate_words(estimate: Estimate, digits: int = 2) -> str:
    """Write a mean with its interval: ``1.23 [1.10, 1.31]``; ``n/a`` for NaN."""
    if math.isnan(estimate.value):
        return "n/a"
    if math.isnan(estimate.low):
        return f"{estimate.value:.{digits}f}"
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def rate_words(rate: Rate) -> str:
    """Write a rate: ``5 of 6 (83 %, interval 44 to 97 %)``."""
    if not rate.n:
        return "none asked"
    return (
        f"{rate.hits} of {rate.n} ({percent_words(rate.rate)}, interval "
        f"{interval_words(rate.ci95)})"
    )


def no_answer(name: str, question: str) -> Answer:
    """Say that nothing can be said."""
    return Answer(name, question, "Too few triggers worked to say.", "Nothing to show.")
