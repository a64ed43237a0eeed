"""Build a planted checkpoint's tokenizer and text encoder out of the words of its captions."""

from __future__ import annotations

import string
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["build_text_encoder", "build_tokenizer", "learn_merges"]

_START, _END, _SUFFIX = "<|startoftext|>", "<|endoftext|>", "</w>"
_ALPHABET = string.ascii_lowercase + string.digits + "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Learn byte-pair merges until every word is one symbol.

    Reference: Sennrich et al. (2016), https://arxiv.org/abs/1508.07909, without a frequency table.
    """
    spelled = {word: [*word[:-1], word[-1] + _SUFFIX] for word in words if word}
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for symbols in spelled.values() for pair in pairwise(symbols))
        if not counts:
            return merges
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for symbols in spelled.values():
            k = 0
            while k < len(symbols) - 1:
                if (symbols[k], symbols[k + 1]) == best:
                    symbols[k : k + 2] = ["".join(best)]
                k += 1


def build_tokenizer(words: Sequence[str], *, max_length: int) -> CLIPTokenizer:
    """Make a ``CLIPTokenizer`` in which each given word is one token.

    Other words fall apart into letters.

    Args:
        words: Lower-case words without spaces.
        max_length: Tokens of a padded prompt, start and end token included.
    """
    plain = sorted({word for word in words if word and all(c in _ALPHABET for c in word)})
    merges = learn_merges(plain)
    symbols = [*_ALPHABET, *(c + _SUFFIX for c in _ALPHABET), *("".join(pair) for pair in merges)]
    vocabulary = {symbol: k for k, symbol in enumerate(dict.fromkeys(symbols))}
    vocabulary[_START] = len(vocabulary)
    vocabulary[_END] = len(vocabulary)
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type] # passed on to tokenizers, which takes pairs
        model_max_length=max_length,
        pad_token=_END,
    )


def build_text_encoder(
    tokenizer: CLIPTokenizer, *, width: int, layers: int, heads: int
) -> CLIPTextModel:
    """Make a randomly initialised CLIP text encoder for a tokenizer.

    Args:
        tokenizer: Gives vocabulary size, length and special tokens.
        width: D, the width of the text embedding.
        layers: Transformer layers.
        heads: Attention heads.
    """
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)
