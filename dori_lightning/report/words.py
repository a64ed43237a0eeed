"""Words and numbers as all reports write them, and the templates that use them."""

import math
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dori_lightning.locality.estimates import Estimate, Rate
from dori_lightning.metrics.evidence import fewest_together, nulls_needed
from dori_lightning.types import Budget, Cell, Condition, Init, Kind

METHOD_WORDS = {"nemo": "NeMo", "wanda": "Wanda"}

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

START_WORDS = {
    "random": "random embeddings",
    "prompt": "the image's own prompt",
    "control_prompt": "unrelated prompts",
    "prompt_itself": "the prompt itself, not attacked",
}
"""What attacks start from, for many pairs."""

PART_WORDS = {
    "unet": "UNet", "transformer": "transformer", "vae": "autoencoder",
    "text_encoder": "text encoder", "text_encoder_2": "second text encoder",
}  # fmt: skip
"""Parts of a checkpoint."""

NOTHING = "-"
"""Stands in a table for what was not measured."""


def number_words(count: int, noun: str) -> str:
    """Write a count with its noun: ``1 image``, ``3 images``, ``3 template copies``."""
    return f"{count} {noun if count == 1 else plural_words(noun)}"


def plural_words(noun: str) -> str:
    """Write a noun in the plural: ``images``, ``template copies``."""
    if noun.endswith("y"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith("ch") else "s")


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
    steps = number_words(budget.steps, "step")
    if budget.norm == "none":
        return f"{steps}, no radius limit"
    norm = {"l2": "L2", "linf": "L-infinity"}[budget.norm]
    return f"{steps}, {norm} radius {budget.eps:g}"


def claims_words(suspects: int, nulls: int, rate: float) -> str:
    """Say how many images have to stand out for an error rate to be kept, and what one needs.

    Args:
        suspects: Images under suspicion, at least 1.
        nulls: Attacked images that the model cannot hold.
        rate: False discovery rate.
    """
    attacked = f"{number_words(nulls, 'attacked image')} that the model cannot hold"
    bounds = f"a false discovery rate of {percent_words(rate)}"
    needed = nulls_needed(suspects, rate, found=1)
    together = fewest_together(suspects, nulls, rate)
    alone = "the only suspect" if suspects == 1 else f"one of {suspects} suspects alone"
    if together == 1:
        return f"With {attacked}, even {alone} can be named at {bounds}."
    if together is None:
        lack = f"{nulls_needed(suspects, rate)} would be needed if all suspects come back"
        lack += f" and {needed} if one does" if suspects > 1 else ""
        return f"With {attacked}, no result can bound its error by {bounds}: {lack}."
    return (
        f"With {attacked}, {bounds} is kept where at least {together} of {suspects} suspects "
        f"stand out together; {alone} would need {needed}."
    )


def condition_words(condition: Condition) -> str:
    """Write a condition for a reader: ``attack from random embeddings, 50 steps, ...``."""
    if condition.attack == "prompt":
        return "prompt as it is"
    start = f"from {START_WORDS[condition.init]}" if condition.init else "from an unnamed start"
    return f"attack {start}, {budget_words(condition.budget)}"


def rate_words(rate: Rate | None) -> str:
    """Write a rate of embeddings: ``5 of 6 (83 %, interval 44 to 97 %)``."""
    if rate is None:
        return "not attacked"
    if not rate.n:
        return "none tried"
    share, interval = percent_words(rate.rate), interval_words(rate.ci95)
    return f"{rate.hits} of {rate.n} ({share}, interval {interval})"


def estimate_words(estimate: Estimate, digits: int = 2) -> str:
    """Write a mean with its interval: ``1.23 [1.10, 1.31]``; ``n/a`` for NaN."""
    centre = mean_words(estimate.value, digits)
    if math.isnan(estimate.low):
        return centre
    return f"{centre} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def mean_words(value: float, digits: int = 2) -> str:
    """Write a mean without an interval; ``n/a`` for NaN."""
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def counts_words(cell: Cell | None) -> str:
    """Write how many images came back: ``3/16 +1 failed``."""
    if cell is None:
        return NOTHING
    return f"{cell.hits}/{cell.n}" + (f" +{cell.failed} failed" if cell.failed else "")


def similarity_words(cell: Cell) -> str:
    """Write median and median absolute deviation: ``0.91 ± 0.04``; ``n/a`` without a result."""
    if math.isnan(cell.similarity_median):
        return "n/a"
    return f"{cell.similarity_median:.2f} ± {cell.similarity_mad:.2f}"


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


@cache
def environment(*, html: bool) -> Environment:
    """The package's templates, with the functions of this module as filters.

    Args:
        html: Whether values are escaped for HTML. Otherwise nothing is escaped by itself: other
            people's text goes through the filter ``md`` where the result is Markdown.
    """
    made = Environment(
        loader=PackageLoader("dori_lightning.report", "templates"),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "md": escape,
        "number": number_words,
        "percent": percent_words,
        "interval": interval_words,
        "budget": budget_words,
        "condition": condition_words,
        "counts": counts_words,
        "similarity": similarity_words,
        "kind": KIND_WORDS.__getitem__,
        "kinds": lambda kind: plural_words(KIND_WORDS[kind]),
        "rate": rate_words,
        "estimate": estimate_words,
        "mean": mean_words,
        "method": METHOD_WORDS.__getitem__,
        "start": START_WORDS.__getitem__,
        "part_name": PART_WORDS.__getitem__,
    }
    return made


def render_text(template: str, **values: Any) -> str:
    """Render a text template of the package."""
    return environment(html=False).get_template(template).render(**values).lstrip()


def text_macro(template: str, name: str, *values: Any, **named: Any) -> str:
    """Render one macro of a text template as one paragraph on one line."""
    macro = getattr(environment(html=False).get_template(template).module, name)
    return " ".join(macro(*values, **named).split())
