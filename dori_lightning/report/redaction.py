"""Take secrets out of a configuration before it is written anywhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["REDACTED", "redact"]

REDACTED = "<redacted>"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_ALWAYS = {
    "secret",
    "secrets",
    "password",
    "passwords",
    "passwd",
    "credential",
    "credentials",
    "apikey",
}
_USUALLY = {"key", "keys", "token"}
# A text encoder is full of tokens that are no secret: these words after "token" or "key" make the
# name harmless.
_HARMLESS_NEXT = {"mask", "count", "length", "limit", "dim", "size", "index", "type", "embedding"}

# One slash too: that is what remains of a URL that was taken for a path.
_USER_INFO = re.compile(r"\b([a-z][a-z0-9+.\-]+://?)[^\s/?#]*@", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"([A-Za-z_][\w.\-]*)=([^\s&,;]+)")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")


def _sensitive(name: str) -> bool:
    words = [word.lower() for word in _WORDS.findall(name)]
    if _ALWAYS.intersection(words):
        return True
    following = [*words[1:], ""]
    return any(
        w in _USUALLY and n not in _HARMLESS_NEXT for w, n in zip(words, following, strict=True)
    )


def _clean_text(text: str) -> str:
    text = _USER_INFO.sub(r"\1", text)
    text = _HUB_TOKEN.sub(REDACTED, text)
    # Command-line overrides and URL queries carry "name=value" inside one string.
    return _ASSIGNMENT.sub(
        lambda found: f"{found[1]}={REDACTED}" if _sensitive(found[1]) else found[0], text
    )


def redact(config: Any) -> Any:
    """Copy a configuration without its secrets.

    A value goes when a word of its key is ``key``, ``token``, ``secret``, ``password`` or
    ``credential`` (``num_tokens``, ``max_tokens`` and ``token_mask`` stay). Strings lose the
    user-info of URLs and the value of ``name=value`` parts whose name is such a key. None and
    booleans stay, since they reveal nothing.

    Args:
        config: Nested mappings, lists and scalars.

    Returns:
        A new structure; redacting it again changes nothing.
    """
    if isinstance(config, Mapping):
        return {
            name: REDACTED
            if _sensitive(str(name)) and value is not None and not isinstance(value, bool)
            else redact(value)
            for name, value in config.items()
        }
    if isinstance(config, list | tuple):
        return [redact(value) for value in config]
    return _clean_text(config) if isinstance(config, str) else config
