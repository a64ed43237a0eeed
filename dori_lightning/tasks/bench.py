"""How fast an audit's parts are on this machine, against loops written without the package."""

import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from pydantic import TypeAdapter
from rich.markdown import Markdown

from dori_lightning.bench.attack import attack_family, compiled_family
from dori_lightning.bench.measure import FAMILIES, BenchContext, BenchSettings, Family
from dori_lightning.bench.parts import (
    audit_family,
    finetuning_family,
    mask_family,
    nemo_family,
    sampling_family,
)
from dori_lightning.bench.report import markdown, speed_figure
from dori_lightning.runtime.artifacts import claim_folder, drop_keys, write_atomically, write_json
from dori_lightning.runtime.cache import JSON, Cache
from dori_lightning.runtime.logging import answer_console
from dori_lightning.tasks.audit import make_context, make_trainer
from dori_lightning.tasks.run_record import (
    git_sha,
    logged,
    numerics,
    package_versions,
    to_container,
)
from dori_lightning.types import InputError, first_line

log = logging.getLogger(__name__)

_FAMILY = JSON.mapped(asdict, TypeAdapter(Family).validate_python)


@logged
def run(cfg: DictConfig, folder: Path) -> None:
    """Measure the families of ``task.rows`` and write record, table and figure into ``folder``.

    They are written after each family. One that was measured before is read, so that a long
    measurement goes on where it was cut and single families can be added.

    Raises:
        InputError: A setting is impossible, or ``folder`` holds measurements of other settings.
        RuntimeError: A family failed; the others are measured all the same.
    """
    settings = settings_of(cfg)
    claim_folder(folder, _method_of(cfg))
    stored, left_out = Cache(folder / "rows"), dict[str, str]()
    missing = [n for n in settings.rows if stored.read(n, {"family": n}, _FAMILY) is None]
    end = math.inf if settings.seconds is None else time.monotonic() + settings.seconds
    load = cache(partial(_context, cfg, settings, folder / "scratch"))
    if set(missing) - {"audit"}:
        load()
    measure, failed = _families(cfg, settings, load, folder / "scratch"), False
    for place, name in enumerate(missing):
        left = end - time.monotonic()
        if left <= 0:
            left_out[name] = "no time left"
            continue
        share = FAMILIES[name] / sum(FAMILIES[other] for other in missing[place:])
        timed = partial(_with_load, partial(measure[name], time.monotonic() + share * left))
        try:
            stored.get(name, {"family": name}, timed, _FAMILY)
        except Exception as error:  # a part that fails must not cost the others
            log.exception("bench: %s failed", name)
            left_out[name], failed = f"it failed: {first_line(error)}", True
        _write(cfg, folder, stored, left_out)
    table = _write(cfg, folder, stored, left_out)
    console = answer_console(190)
    console.print(Markdown(table))
    console.print(f"record: {folder / 'bench.json'}", soft_wrap=True)
    if failed:
        raise RuntimeError(f"not everything could be measured: {left_out}")


def _write(cfg: DictConfig, folder: Path, stored: Cache, left_out: Mapping[str, str]) -> str:
    """Write record, table and figure of what is measured so far; returns the table."""
    found = [stored.read(name, {"family": name}, _FAMILY) for name in FAMILIES]
    families = [family for family in found if family is not None]
    provenance = _provenance(cfg)
    record = {
        "provenance": provenance,
        "families": {family.name: asdict(family) for family in families},
        "left_out": dict(left_out),
    }
    table, figure = markdown(families), speed_figure(families)
    table = f"{provenance['device']}\n\n{table}"
    table += "".join(f"\n- not measured: {name}: {why}" for name, why in left_out.items())
    write_json(folder / "bench.json", record)
    write_atomically(folder / "bench.md", table.encode())
    if figure is not None:
        write_atomically(folder / "figures" / "speed.png", figure)
    return table


def _with_load(measure: Callable[[], Family]) -> Family:
    """Measure a family; warn where the machine was busy before."""
    before = os.getloadavg()[0]
    family = replace(measure(), load=(before, os.getloadavg()[0]))
    if before > 0.5:
        log.warning(
            "%s was measured on a machine that others used: load average %.2f before it; its "
            "seconds are no figures to quote", family.name, before,
        )  # fmt: skip
    return family


def settings_of(cfg: DictConfig) -> BenchSettings:
    """The settings in ``cfg.task``.

    Raises:
        InputError: One of them is impossible.
    """
    task = to_container(cfg)["task"]
    return BenchSettings(**{item.name: task[item.name] for item in fields(BenchSettings)})


def _families(
    cfg: DictConfig, settings: BenchSettings, load: Callable[[], BenchContext], scratch: Path
) -> dict[str, Callable[[float], Family]]:
    """How each family is measured, until when."""
    task = cfg.task

    def bench(until: float) -> BenchContext:
        return replace(load(), until=until)

    # fmt: off
    return {
        "attack": lambda until: attack_family(bench(until), settings),
        "sampling": lambda until: sampling_family(bench(until), settings),
        "nemo": lambda until: nemo_family(bench(until), settings, instantiate(task.nemo)),
        "wanda": lambda until: mask_family(
            "wanda", bench(until), instantiate(task.wanda),
            pairs=settings.wanda_pairs, repeats=settings.repeats,
        ),
        "finetuning": lambda until: finetuning_family(
            bench(until), settings, instantiate(task.finetuning)
        ),
        "compiled": lambda until: compiled_family(bench(until), settings),
        "audit": lambda _: audit_family(settings, _audit_overrides(cfg, settings), scratch),
    }
    # fmt: on


def _context(cfg: DictConfig, settings: BenchSettings, scratch: Path) -> BenchContext:
    """The checkpoint with its pairs of kind vm.

    Raises:
        InputError: There are fewer pairs than the settings ask for, or there is no such device.
    """
    make_trainer(cfg, None)  # refuses a GPU that is not there before anything is built for it
    pairs = [p for p in instantiate(cfg.pairs).read() if p.kind == "vm" and p.role == "audit"]
    if len(pairs) < settings.most_pairs:
        raise InputError(
            f"the benchmark attacks {settings.most_pairs} pairs of kind vm, and the list has "
            f"{len(pairs)}\n"
            f"  where: task.pairs and task.*_pairs\n"
            f"  fix:   smaller numbers there, or another list with pairs=NAME"
        )
    model = instantiate(cfg.checkpoint)
    if model.family.name != "sd":
        raise InputError(
            f"the loops that the benchmark compares with are those of Stable Diffusion's UNet, "
            f"and {model.name} is of {model.family.title}",
            where="checkpoint",
            fix="checkpoint=dori_tiny, or checkpoint=sd14_shape on a GPU",
        )
    return BenchContext(model, tuple(pairs), make_context(cfg, model, pairs), scratch)


def _audit_overrides(cfg: DictConfig, settings: BenchSettings) -> tuple[str, ...]:
    """What makes an audit of this run's checkpoint and pairs, out of its command line."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    ours = ("task", "name", "sweep", "mitigation@task", "experiment", "paths.", "logger", "attack",
            "utility")  # fmt: skip
    kept = tuple(text for text in given if not text.lstrip("+~").startswith(ours))
    threshold = f"metrics.descriptors.{cfg.metrics.decider}.threshold={settings.threshold}"
    return (*kept, threshold)


def _method_of(cfg: DictConfig) -> dict[str, Any]:
    """What decides what is measured; which families are wanted now is not among it."""
    whole = to_container(cfg)
    return {
        "seed": whole["seed"],
        "task": drop_keys(whole["task"], "rows", "seconds"),
        "checkpoint": whole["checkpoint"],
        "pairs": drop_keys(whole["pairs"], "cache"),
        "sampling": whole["sampling"],
        "threads": torch.get_num_threads(),
        "device": _device_name(),
    }


def _provenance(cfg: DictConfig) -> dict[str, Any]:
    return {
        **_method_of(cfg),
        "git_sha": git_sha(),
        "packages": package_versions(),
        "numerics": numerics(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
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
