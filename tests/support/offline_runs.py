"""Read offline W&B runs back with the client's own inspection."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class OfflineRun:
    """What one run wrote."""

    about: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    exit_code: int | None = None


def offline_runs(folder: Path) -> list[Path]:
    """Folders of the offline runs in a run folder."""
    return sorted((folder / "wandb").glob("offline-run-*"))


def inspected(place: Path) -> OfflineRun:
    """Read one offline run."""
    listed = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(place)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    run = OfflineRun()
    for line in listed.splitlines():
        record = json.loads(line)
        held = record.get(record["type"], {})
        match record["type"]:
            case "run":
                run.about = held
                run.config = held["config"]["update"]
            case "history":
                run.history.append(held["item"])
            case "summary":
                run.summary |= held["update"]
            case "metric":
                run.step_metrics[held["name"]] = held.get("step_metric", "")
            case "artifact":
                run.artifacts[held["type"]] = held
            case "exit":
                run.exit_code = held.get("exit_code", 0)
    return run


def files_of(artifact: dict[str, Any]) -> dict[str, Path]:
    """Name in an artifact to the file that would be uploaded."""
    return {c["path"]: Path(c["local_path"]) for c in artifact["manifest"]["contents"]}
