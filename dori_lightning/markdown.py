"""Other people's text in Markdown, shown as it is."""

from __future__ import annotations

import re

__all__ = ["escape", "one_line"]

_SPECIAL = re.compile(
    r"[&<>\[\]|\\*`~@#$]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # inside of words an underscore is one
    r"|:(?=//|[a-z+-])|\bwww\."  # links and emoji
    r"|^[-+=]|^\d+(?=[.)](?:\s|$))",  # lists and headings
    re.IGNORECASE,
)


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, link, table cell or HTML."""
    line = " ".join(text.split())
    return _SPECIAL.sub(lambda found: "".join(f"&#{ord(c)};" for c in found[0]), line)


def one_line(text: str) -> str:
    """Text for a code block: nothing in it can end the block."""
    return " ".join(text.split()).replace("`", "")
