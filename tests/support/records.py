"""Files of run folders, as another tool would read them."""

import json
from pathlib import Path
from typing import Any


def report_json(folder: Path) -> dict[str, Any]:
    """The content of a run folder's ``report.json``."""
    document: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return document
