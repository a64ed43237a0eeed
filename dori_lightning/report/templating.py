"""How both pages are rendered: one environment, and what keeps numbers in one piece."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

__all__ = ["rendered_page"]

_LOOSE = re.compile(r"(?<=\d) (?=%)|(?<=\d) (?=of \d)|(?<=\d of) (?=\d)")


def rendered_page(template: str, **values: Any) -> str:
    """Render a template of the package with everything escaped."""
    environment = Environment(
        loader=PackageLoader("dori_lightning.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["firm"] = _firm
    environment.filters["breakable"] = _breakable
    return environment.get_template(template).render(**values).lstrip()


def _firm(text: str) -> str:
    """Keep "95 %" and "4 of 8" on one line: broken they are hard to read."""
    return _LOOSE.sub("\u00a0", text)


def _breakable(name: str) -> Markup:
    """Let a long name break behind its underscores."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))
