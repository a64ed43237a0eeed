"""Files of run folders, as another tool would read them."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open


def report_json(folder: Path) -> dict[str, Any]:
    """The content of a run folder's ``report.json``."""
    document: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
    return document


def tensors_of(path: Path) -> tuple[dict[str, bytes], dict[str, str]]:
    """Tensors and metadata of a file, whose header has no order of its own."""
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata()


def results(folder: Path) -> dict[str, Any]:
    """What must not depend on how a run came about: cells, rows, images and attacks."""
    report = report_json(folder)
    found = {key: report.get(key) for key in ("cells", "pairs", "effort")}
    found["rows"] = (folder / "pairs.parquet").read_bytes()
    for path in folder.glob("pictures/**/*.png"):
        found[str(path.relative_to(folder))] = path.read_bytes()
    for path in folder.glob("attacks/**/*.safetensors"):
        found[str(path.relative_to(folder))] = tensors_of(path)
    return found


def written(folder: Path, pattern: str = "attacks/**/*.safetensors") -> dict[Path, int]:
    """Files of a folder with the time they were written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}
