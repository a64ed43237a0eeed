"""How fast an audit's parts are on this machine, against loops written without the package."""

import logging
import os
import platform
from collections.abc import Callable
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

from dori_lightning.bench.attack import attack_family, shape_family
from dori_lightning.bench.measure import (
    FAMILIES,
    BenchContext,
    BenchSettings,
    Family,
    ShapeSettings,
)
from dori_lightning.bench.parts import (
    audit_family,
    finetuning_family,
    mask_family,
    nemo_family,
    sampling_family,
)
from dori_lightning.bench.report import markdown, speed_figure
from dori_lightning.planting.random_weights import random_sd14
from dori_lightning.planting.recipe import build_tokenizer
from dori_lightning.runtime.artifacts import claim_folder, drop_keys, write_atomically, write_json
from dori_lightning.runtime.cache import JSON, Cache
from dori_lightning.runtime.logging import answer_console
from dori_lightning.tasks.audit import make_context
from dori_lightning.tasks.run_record import git_sha, logged, package_versions, to_container
from dori_lightning.types import InputError

log = logging.getLogger(__name__)

_FAMILY = JSON.mapped(asdict, TypeAdapter(Family).validate_python)


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
    measure = _families(cfg, settings, folder / "scratch")
    stored = Cache(folder / "rows")
    for name in settings.rows:
        stored.get(name, {"family": name}, partial(_with_load, measure[name]), _FAMILY)
    found = [stored.read(name, {"family": name}, _FAMILY) for name in FAMILIES]
    families = [family for family in found if family is not None]
    record = {
        "provenance": _provenance(cfg),
        "families": {family.name: asdict(family) for family in families},
    }
    table, figure = markdown(families), speed_figure(families)
    write_json(folder / "bench.json", record)
    write_atomically(folder / "bench.md", table.encode())
    if figure is not None:
        write_atomically(folder / "figures" / "speed.png", figure)
    console = answer_console(190)
    console.print(Markdown(table))
    console.print(f"record: {folder / 'bench.json'}", soft_wrap=True)


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
    known = {item.name: task[item.name] for item in fields(BenchSettings)}
    return BenchSettings(**{**known, "sd14": ShapeSettings(**known["sd14"])})


def _families(
    cfg: DictConfig, settings: BenchSettings, scratch: Path
) -> dict[str, Callable[[], Family]]:
    """How each family is measured; the checkpoint is loaded by the first that needs it."""
    bench = cache(partial(_context, cfg, settings, scratch))
    task = cfg.task
    # fmt: off
    return {
        "attack": lambda: attack_family(bench(), settings),
        "sampling": lambda: sampling_family(bench(), settings),
        "nemo": lambda: nemo_family(bench(), settings, instantiate(task.nemo)),
        "wanda": lambda: mask_family(
            "wanda", bench(), instantiate(task.wanda),
            pairs=settings.wanda_pairs, repeats=settings.repeats,
        ),
        "finetuning": lambda: finetuning_family(bench(), settings, instantiate(task.finetuning)),
        "audit": lambda: audit_family(settings, _audit_overrides(cfg, settings), scratch),
        "sd14": lambda: _shape(settings.sd14, cfg.seed),
    }
    # fmt: on


def _context(cfg: DictConfig, settings: BenchSettings, scratch: Path) -> BenchContext:
    """The checkpoint with its pairs of kind vm.

    Raises:
        InputError: There are fewer pairs than the settings ask for.
    """
    pairs = [p for p in instantiate(cfg.pairs).read() if p.kind == "vm" and p.role == "audit"]
    if len(pairs) < settings.most_pairs:
        raise InputError(
            f"the benchmark attacks {settings.most_pairs} pairs of kind vm, and the list has "
            f"{len(pairs)}\n"
            f"  where: task.pairs and task.*_pairs\n"
            f"  fix:   smaller numbers there, or another list with pairs=NAME"
        )
    model = instantiate(cfg.checkpoint)
    return BenchContext(model, tuple(pairs), make_context(cfg, model, pairs), scratch)


def _shape(settings: ShapeSettings, seed: int) -> Family:
    gpu, half = torch.cuda.is_available(), settings.dtype == "bf16"
    model = random_sd14(
        build_tokenizer(("a",), max_length=77),
        latent=settings.latent,
        dtype=torch.bfloat16 if half else torch.float32,
        autocast=None if half or not gpu else torch.bfloat16,
        device=torch.device("cuda" if gpu else "cpu"),
        seed=seed,
    )
    return shape_family(model, settings, seed=seed)


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
        "task": drop_keys(whole["task"], "rows"),
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
