"""Words that a text encoder knows, each one token, and what it takes them as.

A token that is a piece of a word joins its neighbours when a prompt is typed, and other tokens
come of it. So the vocabulary holds those that come back as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dori_lightning.types import InputError


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Words of a checkpoint, by their places.

    Attributes:
        words: The words as somebody types them, V of them.
        ids: Their tokens, V, rising.
        inputs: Their rows of the text encoders' input embeddings (V, W), fp32 on the model's
            device; those of several encoders side by side.
        limit: Words that a prompt has room for, besides its start and end token.
        tokenizers: Of the text encoders whose inputs these are.
    """

    words: tuple[str, ...]
    ids: tuple[int, ...]
    inputs: torch.Tensor
    limit: int
    tokenizers: tuple[Any, ...]

    @classmethod
    def of(
        cls, encoders: Mapping[str, tuple[Any, Any]], *, limit: int, device: torch.device
    ) -> Vocabulary:
        """Read the vocabulary of text encoders that share it.

        Args:
            encoders: Names to text encoders, each with its tokenizer.
            limit: Words that a prompt has room for.
            device: The model's.

        Raises:
            InputError: Their tokenizers differ, or no token is a word.
        """
        tokenizers = tuple(tokenizer for _, tokenizer in encoders.values())
        first = tokenizers[0]
        if any(other.get_vocab() != first.get_vocab() for other in tokenizers):
            raise InputError(
                f"the tokenizers of {' and '.join(encoders)} number their tokens differently, so "
                f"no word has one token in both",
                where="certify.paths",
                fix="leave words out of certify.paths",
            )
        special = set(first.all_special_ids)
        tokens = [token for token in range(len(first)) if token not in special]
        typed = [word.strip() for word in first.batch_decode([[token] for token in tokens])]
        back = first(typed, add_special_tokens=False).input_ids
        known = [
            (word, token)
            for word, token, again in zip(typed, tokens, back, strict=True)
            if word and again == [token]
        ]
        if not known:
            raise InputError(
                "no token is a word that comes back when it is typed",
                where="tokenizer",
                fix="give the checkpoint its own tokenizer, or leave words out of certify.paths",
            )
        ids = tuple(token for _, token in known)
        tables = [encoder.get_input_embeddings().weight for encoder, _ in encoders.values()]
        inputs = torch.cat([table.detach()[list(ids)].float() for table in tables], 1).to(device)
        return cls(tuple(word for word, _ in known), ids, inputs, limit, tokenizers)

    def prompt(self, places: Sequence[int]) -> str:
        """Words at some places as one prompt."""
        return " ".join(self.words[place] for place in places)

    def places(self, prompt: str) -> list[int]:
        """Places of a prompt's words; pieces of words and what is cut off are left out."""
        place_of = {token: place for place, token in enumerate(self.ids)}
        tokens = self._tokens(self.tokenizers[0], prompt)
        return [place_of[token] for token in tokens if token in place_of][: self.limit]

    def survives(self, places: Sequence[int]) -> bool:
        """Whether words, typed as a prompt, become their own tokens again."""
        wanted, prompt = [self.ids[place] for place in places], self.prompt(places)
        return all(self._tokens(each, prompt) == wanted for each in self.tokenizers)

    def allowed(self, forbidden: Collection[int] = ()) -> torch.Tensor:
        """Which words (V,) may be used, bool.

        Args:
            forbidden: Places of those that may not.
        """
        mask = torch.ones(len(self.ids), dtype=torch.bool, device=self.inputs.device)
        mask[list(forbidden)] = False
        return mask

    @staticmethod
    def _tokens(tokenizer: Any, prompt: str) -> list[int]:
        ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return ids
