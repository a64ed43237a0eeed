"""Ordinary prompts with images, which a checkpoint is not suspected of having memorized.

Mitigations calibrate on them (activation statistics, the loss that keeps a model's abilities) and
the cost of a mitigation is measured on them; never on the same ones.

Neighbour prompts are made from a caption by fixed rules. Concept Ablation (Kumari et al., 2023,
section on memorized images) asks a language model for paraphrases instead; that would make results
depend on a download that changes, rules give the same prompts everywhere. The DoRI paper calls
what happens to the images of such prompts concept damage.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Literal, NoReturn, Protocol, TypeVar

import torch

from dori_lightning.pairs.readers import FolderPairs, read_table
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.runtime.artifacts import content_hash
from dori_lightning.types import InputError, Pair, first_line

Split = Literal["calibration", "evaluation"]
EVALUATION_SHARE = 0.25
_T = TypeVar("_T")

log = logging.getLogger(__name__)

STYLES = ("", "dark", "bright", "close", "wide", "mirrored", "grey", "vivid", "plain")
"""How a generic caption describes its image; the words that the embedded benchmark knows."""

SMALL_WORDS = frozenset(
    (
        "a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "into", "is", "its", "of",
        "on", "or", "over", "that", "the", "to", "under", "with",
    )
)  # fmt: skip
"""Words that name nothing; a generic caption of two such words would be near no image."""

LONGEST = 40
"""Words of a caption that are recombined; more do not fit a text encoder."""


@dataclass(frozen=True)
class Examples:
    """Prompts with their images.

    Attributes:
        prompts: N captions.
        images: Their images (N, 3, H, W) in [0, 1].
    """

    prompts: tuple[str, ...]
    images: torch.Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[str], images: Sequence[torch.Tensor], resolution: int
    ) -> Examples:
        """Captions and as many images (3, H, W), which may be none."""
        none = torch.empty(0, 3, resolution, resolution)
        return cls(tuple(prompts), torch.stack(list(images)) if images else none)


class Corpus(Protocol):
    """Where ordinary prompts and images come from; the two splits share nothing."""

    @property
    def identity(self) -> str:
        """Hash of what the corpus holds."""
        ...

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        """First ``count`` captions of a split.

        Raises:
            InputError: It has fewer.
        """
        ...

    def examples(
        self, split: Split, count: int, resolution: int, *, only: Sequence[int] | None = None
    ) -> Examples:
        """First ``count`` captions of a split with their images, square.

        Args:
            split: Which split.
            count: How many elements there have to be.
            resolution: Side of the images in pixels.
            only: Places of those that are wanted, from 0; None for all.

        Raises:
            InputError: It has fewer, or no images.
        """
        ...


@dataclass(frozen=True)
class FolderCorpus:
    """A folder of images with a ``metadata.csv`` or ``metadata.jsonl``, as for pairs.

    A quarter of it, chosen by a hash of each id, is kept for evaluation.

    Attributes:
        path: The folder.
        delimiter: What separates a CSV's columns.
    """

    path: Path | str
    delimiter: str = ","

    @property
    def identity(self) -> str:
        """Hash of ids, captions and images."""
        rows = sorted((p.id, p.prompt, p.sha256) for p in self._pairs)
        return content_hash(["folder", rows])[:16]

    @cached_property
    def _pairs(self) -> Sequence[Pair]:
        return FolderPairs(path=self.path, kind="control", delimiter=self.delimiter).read()

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        """First ``count`` captions of a split."""
        return tuple(p.prompt for p in self._chosen(split, count))

    def examples(
        self, split: Split, count: int, resolution: int, *, only: Sequence[int] | None = None
    ) -> Examples:
        """First ``count`` captions of a split with their images, or ``only`` some of these."""
        rows = self._chosen(split, count)
        wanted = rows if only is None else [rows[place] for place in only]
        images = [image_tensor(square_image(p.image), resolution) for p in wanted]
        return Examples.of([p.prompt for p in wanted], images, resolution)

    def _chosen(self, split: Split, count: int) -> list[Pair]:
        rows = [p for p in self._pairs if _in_split(p.id, split)]
        return _enough(rows, count, split, self.path)


@dataclass(frozen=True)
class CaptionCorpus:
    """Captions without images: enough for activation statistics and for utility by images.

    Attributes:
        path: A ``.csv`` or ``.jsonl`` with a column of captions, or a ``.txt`` with one a line.
        column: The column.
        delimiter: What separates a CSV's columns.
    """

    path: Path | str
    column: str = "caption"
    delimiter: str = ","

    @property
    def identity(self) -> str:
        """Hash of the captions."""
        return content_hash(["captions", self._rows()])[:16]

    def _rows(self) -> list[str]:
        path = Path(self.path)
        if not path.is_file():
            raise InputError(f"no such file: {path}\n  where: corpus.path")
        if path.suffix == ".txt":
            text = path.read_text("utf-8").splitlines()
            return [line.strip() for line in text if line.strip()]
        _, lines = read_table(path, delimiter=self.delimiter, required=[[self.column]])
        broken = [problem for line in lines for problem in line.problems]
        if broken:
            raise InputError(f"{path}: {len(broken)} broken lines, the first: {broken[0]}")
        return [str(line.values.get(self.column, "")).strip() for line in lines]

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        """First ``count`` captions of a split."""
        rows = [text for text in self._rows() if text and _in_split(text, split)]
        return tuple(_enough(rows, count, split, self.path))

    def examples(
        self, split: Split, count: int, resolution: int, *, only: Sequence[int] | None = None
    ) -> Examples:
        """Refuse: there are no images.

        Raises:
            InputError: Always.
        """
        del split, count, resolution, only
        raise InputError(
            f"{self.path} has captions only, and this needs images with captions\n"
            f"  where: corpus\n"
            f"  fix:   corpus=folder corpus.path=FOLDER (images with a metadata.csv)"
        )


@dataclass(frozen=True)
class NoCorpus:
    """Nothing, for audits that need no ordinary prompts."""

    identity: str = "none"

    def prompts(self, split: Split, count: int) -> NoReturn:
        """Refuse.

        Raises:
            InputError: Says how to give a corpus.
        """
        raise InputError(
            f"this needs {count} ordinary prompts for {split}, and corpus is none\n"
            f"  where: corpus\n"
            f"  fix:   corpus=folder corpus.path=FOLDER (images with a metadata.csv), or "
            f"corpus=captions corpus.path=FILE where captions are enough"
        )

    def examples(
        self, split: Split, count: int, resolution: int, *, only: Sequence[int] | None = None
    ) -> NoReturn:
        """Refuse.

        Raises:
            InputError: Says how to give a corpus.
        """
        del resolution, only
        self.prompts(split, count)


ORDINARY_PROMPTS = 20
"""Ordinary prompts whose images say how similar to an original any image is."""

ORDINARY_CAPTIONS = (
    "a wooden chair beside an open window",
    "two sailing boats on a calm lake",
    "a bowl of fruit on a kitchen table",
    "a mountain village covered in snow",
    "a street with parked cars in the rain",
    "an old stone bridge over a river",
    "a child flying a kite on the beach",
    "a black dog sleeping on a sofa",
    "a field of sunflowers under a blue sky",
    "a bookshelf full of old books",
    "a red bicycle leaning against a brick wall",
    "a cup of tea with a slice of cake",
    "a crowded market in the morning",
    "a lighthouse on a rocky coast at dusk",
    "a portrait of a smiling woman with a hat",
    "a herd of horses running through grass",
    "a modern office with large windows",
    "a plate of pasta with tomato sauce",
    "a forest path in autumn",
    "a train arriving at a small station",
)
"""Captions of nothing in particular, for audits without a corpus."""


def ordinary_prompts(corpus: Corpus, count: int) -> tuple[str, ...]:
    """Captions that no audited image has: the corpus's own, or a few that go with any model.

    Args:
        corpus: Where they come from, its part for calibration.
        count: How many, at most 20.
    """
    try:
        return corpus.prompts("calibration", count)
    except InputError as error:
        log.info("ordinary prompts: captions of our own, since %s", first_line(error))
        return ORDINARY_CAPTIONS[:count]


def _in_split(name: str, split: Split) -> bool:
    """Whether an element belongs to a split; depends on its name alone, so lists may grow."""
    value = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") / 2**32
    return (value < EVALUATION_SHARE) == (split == "evaluation")


def _enough(rows: list[_T], count: int, split: Split, path: Path | str) -> list[_T]:
    if len(rows) < count:
        raise InputError(
            f"{path} has {len(rows)} elements for {split}, but {count} are needed\n"
            f"  where: corpus\n"
            f"  fix:   give a longer list, or ask for fewer"
        )
    return rows[:count]


def neighbour_prompts(
    pair: Pair, count: int, *, seed: int = 0, split: Split | None = None
) -> tuple[str, ...]:
    """Prompts near a pair's own, nearest in wording and generic ones in turn.

    Four rules take turns, each in an order that the seed decides: a generic caption of the pair's
    subject where it has one ("a dark photo of SUBJECT"), one word dropped, words in another order,
    a generic caption of two of the prompt's words.

    Args:
        pair: Its prompt and subject are used, its image is not.
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
            f"  fix:   ask for fewer, or give the pair a subject (what generic captions call it)"
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
