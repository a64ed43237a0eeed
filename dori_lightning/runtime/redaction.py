"""Take secrets out of everything that is written: one rule for files, logs and loggers."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

REDACTED = "<redacted>"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_ALWAYS = re.compile(r"secrets?|passwords?|passwd|passphrase|credentials?|apikey")
_USUALLY = re.compile(r"keys?|token")
# A text encoder is full of tokens that are no secret: these words after "token" or "key" make the
# name harmless. So do "file" and "path": where a secret lies is none.
_HARMLESS_NEXT = re.compile(r"count|dim|embedding|file|index|length|limit|mask|path|size|type")

# One slash too: that is what remains of a URL that was taken for a path.
_USER_INFO = re.compile(r"\b([a-z][a-z0-9+.\-]+://?)[^\s/?#]*@", re.IGNORECASE)
_NAMED_VALUES = (
    # Command-line overrides and URL queries carry "name=value" inside one string.
    re.compile(r"(?P<name>[A-Za-z_][\w.\-]*)=(?P<value>\"[^\"]*\"|'[^']*'|[^\s&,;]+)"),
    # A dictionary on the command line, and one in a message.
    re.compile(r"[{,]\s*(?P<name>[A-Za-z_][\w.\-]*):\s*(?P<value>[^\s,{}\[\]]+)"),
    re.compile(r"([\"'])(?P<name>[\w.\-]+)\1: (?P<quote>[\"'])(?P<value>(?s:.*?))(?P=quote)"),
)
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}"
    r"|wandb_v\d+_\w{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w\-]{16,}"
    r"|AKIA[0-9A-Z]{16}"
    r"|(?<=[Bb]earer )[\w.\-~+/=]{12,})"
)

_SHORTEST = 8
"""Characters of an environment variable's value below which it is not looked for in text: a word
like ``test`` would take innocent text with it."""


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether what has this name is a secret: a key of a config, an environment variable."""
    words = [word.lower() for word in _WORDS.findall(name)]
    return any(
        _ALWAYS.fullmatch(word)
        or (_USUALLY.fullmatch(word) and not _HARMLESS_NEXT.fullmatch(following))
        for word, following in pairwise([*words, ""])
    )


def redact(config: Any) -> Any:
    """Copy a configuration, or a text, without its secrets.

    A value goes when a word of its key is ``key``, ``token``, ``secret``, ``password`` or
    ``credential`` (``num_tokens``, ``max_tokens`` and ``token_mask`` stay). Strings lose the
    user-info of URLs, the value of ``name=value`` parts whose name is such a key, tokens of known
    form, and the values of environment variables with such a name, wherever they came from. None,
    booleans and empty values stay, since they reveal nothing.

    Args:
        config: Nested mappings, lists and scalars.

    Returns:
        A new structure; redacting it again changes nothing.
    """
    if isinstance(config, Mapping):
        return {
            name: REDACTED if _is_secret(name, value) else redact(value)
            for name, value in config.items()
        }
    if isinstance(config, list | tuple):
        return [redact(value) for value in config]
    return _clean_text(config) if isinstance(config, str) else config


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Places and values of plain containers and of all that is in them, outer ones first."""
    yield path, node
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from walk(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from walk(value, f"{path}[{index}]")


def secrets_in(config: Any) -> Iterator[str]:
    """Places of a plain configuration that ``redact`` would change, as dotted keys."""
    for place, value in walk(config):
        if isinstance(value, Mapping):
            secret = [name for name, item in value.items() if _is_secret(name, item)]
            yield from (f"{place}.{name}" if place else str(name) for name in secret)
        elif isinstance(value, str) and _clean_text(value) != value:
            yield place


class RedactingFormatter(logging.Formatter):
    """Log lines, and the tracebacks below them, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Format as usual, then redact."""
        return _clean_text(super().format(record))


def _is_secret(name: Any, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return False
    left_open = isinstance(value, str) and value in ("", "???")
    return not left_open and is_secret_name(str(name))


def _clean_text(text: str) -> str:
    text = _USER_INFO.sub(r"\1", text)
    text = _SHAPES.sub(REDACTED, text)
    for value in _secrets_of_the_environment():
        text = text.replace(value, REDACTED)
    for pattern in _NAMED_VALUES:
        text = pattern.sub(_without_value, text)
    return text


def _without_value(found: re.Match[str]) -> str:
    """What a pattern of `_NAMED_VALUES` has found, its value redacted where the name says so."""
    if not is_secret_name(found["name"]):
        return found[0]
    start, end = (place - found.start() for place in found.span("value"))
    return f"{found[0][:start]}{REDACTED}{found[0][end:]}"


def _secrets_of_the_environment() -> list[str]:
    """Values to look for, the longest first: one may be part of another."""
    return sorted(
        (
            value
            for name, value in os.environ.items()
            if len(value) >= _SHORTEST and not value.startswith("/") and is_secret_name(name)
        ),
        key=len,
        reverse=True,
    )
