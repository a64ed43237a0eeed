"""How fast an audit's parts are on this machine, against loops written without the package."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from dori_lightning.bench.figure import speed_figure
from dori_lightning.bench.record import family_of
from dori_lightning.bench.settings import BenchSettings, ShapeSettings
from dori_lightning.bench.tables import family_table, markdown
from dori_lightning.files import write_atomically
from dori_lightning.tasks._bench_families import Bench, measured
from dori_lightning.tasks._folder import claim_folder, without
from dori_lightning.tasks._provenance import git_sha, package_versions, plain
from dori_lightning.tasks._tracking import logged

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dori_lightning.bench.record import Family

__all__ = ["run"]

log = logging.getLogger(__name__)

_WIDTH = 190


@logged
def run(cfg: DictConfig, folder: Path) -> None:
    """Measure the families of ``task.rows`` and write record, table and figure into ``folder``.

    A family that was measured before is read, so that a long measurement goes on where it was cut
    and single families can be added.

    Raises:
        InputError: A setting is impossible, or ``folder`` holds measurements of other settings.
    """
    settings = settings_of(cfg)
    claim_folder(folder, _method_of(cfg))
    bench = Bench(cfg, settings, folder)
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else _WIDTH)
    for name in settings.rows:
        place = folder / "rows" / f"{name}.json"
        if place.is_file():
            family = family_of(place)
            log.info("%s is there already: %s", name, place)
        else:
            family = measured(bench, name)
            write_atomically(place, _json(family.as_json()))
        console.print(family_table(family))
        _warn_of_others(family)
    families = {p.stem: family_of(p) for p in sorted((folder / "rows").glob("*.json"))}
    record = {
        "provenance": _provenance(cfg),
        "families": {name: family.as_json() for name, family in families.items()},
    }
    write_atomically(folder / "bench.json", _json(record))
    write_atomically(folder / "bench.md", markdown(list(families.values())).encode())
    figure = speed_figure(families)
    if figure is not None:
        write_atomically(folder / "figures" / "speed.png", figure)
    console.print(f"record: {folder / 'bench.json'}", soft_wrap=True)


def settings_of(cfg: DictConfig) -> BenchSettings:
    """What ``cfg.task`` asks for."""
    known = {item.name for item in fields(BenchSettings)}
    node = {key: value for key, value in plain(cfg)["task"].items() if key in known}
    return BenchSettings(**{**node, "sd14": ShapeSettings(**node["sd14"])})


def _method_of(cfg: DictConfig) -> dict[str, Any]:
    """What decides what is measured; which families are wanted now is not among it."""
    whole = plain(cfg)
    return {
        "seed": whole["seed"],
        "task": without(whole["task"], "rows"),
        "checkpoint": whole["checkpoint"],
        "pairs": without(whole["pairs"], "cache"),
        "sampling": whole["sampling"],
        "threads": torch.get_num_threads(),
        "device": _device_name(),
    }


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'} ({platform.machine()})"


def _provenance(cfg: DictConfig) -> dict[str, Any]:
    return {
        "git_sha": git_sha(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": _device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "seed": int(cfg.seed),
        "task": plain(cfg)["task"],
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _warn_of_others(family: Family) -> None:
    """Say where the machine was not ours alone: its seconds are no measurement then."""
    before = family.load[0]
    if before > 0.5:
        log.warning(
            "%s was measured on a machine that others used: load average %.2f before it; its "
            "seconds are no figures to quote",
            family.name,
            before,
        )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
