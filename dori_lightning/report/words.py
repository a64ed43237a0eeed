"""What verdict, tables, figures and page share: per-pair results, headline attack, wording."""

from __future__ import annotations

import math
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dori_lightning.types import (
    Budget,
    Condition,
    Init,
    Kind,
)

METHOD_WORDS = {"nemo": "NeMo", "wanda": "Wanda"}


START_WORDS = {
    "random": "random embeddings",
    "prompt": "the image's own prompt",
    "control_prompt": "unrelated prompts",
    "prompt_itself": "the prompt itself, not attacked",
}


# -------- markdown
# Other people's text in Markdown, shown as it is.

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


# -------- summary

KIND_WORDS: dict[Kind, str] = {
    "vm": "suspected image",
    "tm": "suspected template copy",
    "control": "control image",
}

INIT_NAMES: dict[Init, str] = {
    "prompt": "the own prompt",
    "random": "a random embedding",
    "control_prompt": "an unrelated prompt",
}
"""What an attack starts from, for one pair."""

_INIT_WORDS = {
    "prompt": "from the image's own prompt",
    "random": "from random embeddings",
    "control_prompt": "from unrelated prompts",
}


def render_text(template: str, **values: Any) -> str:
    """Render a text template of the package, with the functions of this module at hand.

    Nothing is escaped by itself: other people's text goes through the filter ``md`` where the
    result is Markdown.
    """
    environment = Environment(
        loader=PackageLoader("dori_lightning.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = escape
    functions = (number_words, percent_words, interval_words, budget_words, condition_words)
    environment.globals.update({function.__name__: function for function in functions})
    return environment.get_template(template).render(**values).lstrip()


def number_words(count: int, noun: str) -> str:
    """Write a count with its noun: ``1 image``, ``3 images``, ``3 template copies``."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{count} {noun if count == 1 else plural}"


def percent_words(rate: float) -> str:
    """Write a rate as a percentage with one decimal near 0 % and 100 %; ``n/a`` for NaN."""
    if math.isnan(rate):
        return "n/a"
    near_edge = 5e-4 <= rate < 0.01 or 0.99 < rate <= 1 - 5e-4
    return f"{100 * rate:.1f} %" if near_edge else f"{100 * rate:.0f} %"


def interval_words(interval: tuple[float, float]) -> str:
    """Write a 95 % interval as ``72 to 99 %``; ``n/a`` for NaN."""
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return "n/a"
    return f"{percent_words(low)[:-2]} to {percent_words(high)}"


def budget_words(budget: Budget) -> str:
    """Write a budget for a reader: ``50 steps, no radius limit``."""
    steps = f"{number_words(budget.steps, 'step')}"
    if budget.norm == "none":
        return f"{steps}, no radius limit"
    norm = {"l2": "L2", "linf": "L-infinity"}[budget.norm]
    return f"{steps}, {norm} radius {budget.eps:g}"


def condition_words(condition: Condition) -> str:
    """Write a condition for a reader: ``attack from random embeddings, 50 steps, ...``."""
    if condition.attack == "prompt":
        return "prompt as it is"
    start = _INIT_WORDS[condition.init] if condition.init else "from an unnamed start"
    return f"attack {start}, {budget_words(condition.budget)}"
