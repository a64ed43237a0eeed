"""Make prompts that lie near a caption by fixed rules, without a language model.

Concept Ablation asks a language model for paraphrases of a memorized caption, and the cost of a
mitigation is measured on prompts near what was removed. A language model would make both depend
on a download that changes; rules give the same prompts everywhere.

Reference: Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., 2023), section on
memorized images. The DoRI paper calls what happens to the pictures of such prompts concept damage.
"""

from __future__ import annotations

import hashlib
import random
from itertools import combinations, zip_longest
from typing import TYPE_CHECKING

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from dori_lightning.pairs.corpus import Split
    from dori_lightning.types import Pair

__all__ = ["neighbour_prompts"]

STYLES = ("", "dark", "bright", "close", "wide", "mirrored", "grey", "vivid", "plain")
"""How a generic caption describes its picture; the words that the embedded benchmark knows."""

SMALL_WORDS = frozenset(
    (
        "a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "into", "is", "its", "of",
        "on", "or", "over", "that", "the", "to", "under", "with",
    )
)  # fmt: skip
"""Words that name nothing; a generic caption of two such words would be near no picture."""

LONGEST = 40
"""Words of a caption that are recombined; more do not fit a text encoder."""


def neighbour_prompts(
    pair: Pair, count: int, *, seed: int = 0, split: Split | None = None
) -> tuple[str, ...]:
    """Prompts near a pair's own, nearest in wording and generic ones in turn.

    Four rules take turns, each in an order that the seed decides: a generic caption of the pair's
    subject where it has one ("a dark photo of SUBJECT"), one word dropped, words in another order,
    a generic caption of two of the prompt's words.

    Args:
        pair: Its prompt and subject are used, its picture is not.
        count: How many; fewer are the first of more.
        seed: Decides the order.
        split: Only those of a split: mitigations train on ``calibration`` neighbours, their cost
            is measured on the quarter for ``evaluation``. None gives all.

    Returns:
        ``count`` prompts, all different and none the pair's own (up to case and white space).

    Raises:
        InputError: The rules give fewer.
    """
    words = pair.prompt.split()
    rng = random.Random(f"neighbours-{seed}-{pair.id}-{pair.prompt}")
    rules = [
        _generic(pair.subject.split()) if pair.subject else [],
        _one_dropped(words),
        _reordered(words),
        _two_words(words),
    ]
    for found in rules:
        rng.shuffle(found)
    if len(words) == 1:
        rules.append(_generic(words))
    chosen: dict[str, str] = {}
    for turn in zip_longest(*rules):
        for prompt in turn:
            known = prompt and _plain(prompt) == _plain(pair.prompt)
            if prompt and not known and split in (None, _split(prompt)):
                chosen.setdefault(_plain(prompt), prompt)
    if len(chosen) < count:
        raise InputError(
            f"the prompt of pair {pair.id} ({pair.prompt!r}) has {len(chosen)} neighbours by "
            f"rule, but {count} are asked for\n"
            f"  where: pairs\n"
            f"  mend:  ask for fewer, or give the pair a subject (what generic captions call it)"
        )
    return tuple(chosen.values())[:count]


def _plain(prompt: str) -> str:
    """What counts as the same prompt: text encoders read lower case and single spaces."""
    return " ".join(prompt.lower().split())


def _split(prompt: str) -> Split:
    """Which split a prompt belongs to, whatever pair it lies near."""
    digest = hashlib.sha256(_plain(prompt).encode()).digest()
    return "evaluation" if digest[0] % 4 == 0 else "calibration"


def _generic(subject: list[str]) -> list[str]:
    """Ordinary photographs of a subject."""
    return [" ".join(["a", *style.split(), "photo", "of", *subject]) for style in STYLES]


def _one_dropped(words: list[str]) -> list[str]:
    """The caption without one of its words; nothing where only small words would be left."""
    shorter = [words[:k] + words[k + 1 :] for k in range(min(len(words), LONGEST))]
    return [" ".join(rest) for rest in shorter if _naming(rest)]


def _reordered(words: list[str]) -> list[str]:
    """The caption begun at another word, or with two neighbours exchanged."""
    size = min(len(words), LONGEST)
    turned = [words[k:] + words[:k] for k in range(1, size)]
    exchanged = [[*words[:k], words[k + 1], words[k], *words[k + 2 :]] for k in range(size - 1)]
    return [" ".join(order) for order in (*turned, *exchanged)]


def _two_words(words: list[str]) -> list[str]:
    """Ordinary photographs of what two words name, in the caption's order."""
    naming = _naming(words)[:LONGEST]
    return [prompt for two in combinations(naming, 2) for prompt in _generic(list(two))[:1]]


def _naming(words: list[str]) -> list[str]:
    """Words that name something."""
    return [word for word in words if word.lower().strip(".,;:!?\"'()") not in SMALL_WORDS]
