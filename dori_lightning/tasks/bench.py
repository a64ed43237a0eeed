"""How fast an audit's parts are on this machine, against loops written without the package."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from dori_lightning.audit.context import reference_images
from dori_lightning.bench.attack import Subject, attack_rows, own_attack, random_task, solved
from dori_lightning.bench.parts import (
    audit_rows,
    finetuning_rows,
    nemo_rows,
    sampling_rows,
    scaling_rows,
    startup_rows,
    wanda_rows,
)
from dori_lightning.bench.report import (
    BenchSettings,
    Family,
    ShapeSettings,
    family_of,
    family_table,
    markdown,
    speed_figure,
)
from dori_lightning.models.random_weights import random_sd14
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.planting.recipe import build_tokenizer
from dori_lightning.runtime.artifacts import claim_folder, drop_keys, write_atomically
from dori_lightning.tasks.audit import make_context
from dori_lightning.tasks.run_record import git_sha, logged, package_versions, to_container
from dori_lightning.types import InputError

# -------- bench_families
# Measure one family of a measurement of speed, loading what it needs when it needs it.


@dataclass(frozen=True)
class Bench:
    """What a measurement works with.

    Attributes:
        cfg: Composed configuration.
        settings: What is measured.
        folder: Run folder.
    """

    cfg: DictConfig
    settings: BenchSettings
    folder: Path

    @cached_property
    def subject(self) -> Subject:
        """The checkpoint with its pairs of kind vm.

        Raises:
            InputError: There are fewer pairs than the settings ask for.
        """
        cfg, settings = self.cfg, self.settings
        pairs = [p for p in instantiate(cfg.pairs).read() if p.kind == "vm" and p.role == "audit"]
        most = max(
            settings.pairs, settings.sampling_pairs, settings.nemo_pairs, settings.wanda_pairs,
            settings.finetuning_pairs,
        )  # fmt: skip
        if len(pairs) < most:
            raise InputError(
                f"the bench attacks {most} pairs of kind vm, and the list has {len(pairs)}\n"
                f"  where: task.pairs and task.*_pairs\n"
                f"  fix:   smaller numbers there, or another list with pairs=NAME"
            )
        model = instantiate(cfg.checkpoint)
        data = PairsDataModule(pairs, model)
        data.prepare()
        return Subject(
            model=model,
            pairs=tuple(pairs),
            context=make_context(
                cfg,
                data=data,
                references=reference_images(pairs, model.resolution, instantiate(cfg.metrics)),
                sampling=instantiate(cfg.sampling),
            ),
            trainer=instantiate(cfg.trainer, default_root_dir=self.folder),
            folder=self.folder / "scratch",
            threshold=settings.threshold,
            seed=cfg.seed,
        )

    def program_place(self, name: str) -> Path:
        """Empty folder where the program is started."""
        place = self.folder / "scratch" / name
        place.mkdir(parents=True, exist_ok=True)
        return place

    @property
    def audit_overrides(self) -> tuple[str, ...]:
        """What makes an audit of this run's checkpoint and pairs, out of its command line."""
        given: tuple[str, ...] = ()
        if HydraConfig.initialized():
            given = tuple(HydraConfig.get().overrides.task)
        ours = ("task", "name", "sweep", "mitigation@task", "sampling@task", "experiment",
                "paths.", "logger", "attack", "utility")  # fmt: skip
        kept = tuple(text for text in given if not text.lstrip("+~").startswith(ours))
        decider = self.cfg.metrics.decider
        return (
            *kept,
            f"metrics.descriptors.{decider}.threshold={self.settings.threshold}",
        )


def measured(bench: Bench, name: str) -> Family:
    """Measure a family.

    Args:
        bench: What to work with.
        name: One of ``bench.settings.FAMILIES``.
    """
    before = os.getloadavg()[0]
    family = _FAMILIES[name](bench)
    return replace(family, load=(before, os.getloadavg()[0]))


def _attack(bench: Bench) -> Family:
    settings, subject = bench.settings, bench.subject
    task = subject.task(settings.pairs, steps=settings.steps, noise_batch=settings.noise_batch)
    quality: dict[str, Any] | None = None
    if settings.quality_pairs:
        longer = subject.task(
            settings.quality_pairs,
            steps=settings.quality_steps,
            noise_batch=settings.noise_batch,
        )
        quality = {"subject": subject, "task": longer}
    rows, limits = attack_rows(
        subject.model, task, ours=lambda own: own_attack(subject, own),
        repeats=settings.repeats, compiled=settings.compile, title="attack", quality=quality,
    )  # fmt: skip
    title = (
        f"Attack on {subject.model.name}: {settings.pairs} pairs, {settings.steps} steps of "
        f"{settings.noise_batch} noise samples, {settings.repeats} repeats"
    )
    return Family("attack", title, rows, _said(bench, "pairs", "steps", "noise_batch"), limits)


def _sd14(bench: Bench) -> Family:
    own = bench.settings.sd14
    gpu = torch.cuda.is_available()
    half = own.dtype == "bf16"
    model = random_sd14(
        build_tokenizer(("a",), max_length=77),
        latent=own.latent,
        dtype=torch.bfloat16 if half else torch.float32,
        autocast=None if half or not gpu else torch.bfloat16,
        device="cuda" if gpu else "cpu",
        channels_last=gpu,
        seed=bench.cfg.seed,
    )
    task = random_task(
        model, pairs=own.pairs, steps=own.steps, noise_batch=own.noise_batch, seed=bench.cfg.seed
    )
    rows, limits = attack_rows(
        model, task, ours=lambda task: solved(model, task), repeats=own.repeats,
        compiled=own.compile, title="attack on SD 1.4's shape",
    )  # fmt: skip
    title = (
        f"Attack on Stable Diffusion 1.4's shape, random weights in {own.dtype}, latents of side "
        f"{own.latent}: {own.pairs} pairs, {own.steps} steps of {own.noise_batch} noise samples, "
        f"{own.repeats} repeats"
    )
    return Family("sd14", title, rows, {"sd14": vars(own)}, limits)


def _sampling(bench: Bench) -> Family:
    named = {"other sampler": instantiate(bench.cfg.task.sampler)}
    rows = sampling_rows(bench.subject, bench.settings, named)
    sampling = bench.subject.sampling
    title = (
        f"Drawing {sampling.images_per_pair} pictures of each of "
        f"{bench.settings.sampling_pairs} pairs: {sampling.sampler}, {sampling.steps} steps, "
        f"guidance {sampling.guidance:g}"
    )
    return Family("sampling", title, rows, _said(bench, "sampling_pairs", "repeats"))


def _nemo(bench: Bench) -> Family:
    method = instantiate(bench.cfg.task.nemo)
    rows = nemo_rows(bench.subject, bench.settings, method)
    title = f"NeMo by {type(method.criterion).__name__} on {bench.settings.nemo_pairs} pairs"
    return Family("nemo", title, rows, _said(bench, "nemo_pairs", "nemo_repeats"))


def _wanda(bench: Bench) -> Family:
    rows = wanda_rows(bench.subject, bench.settings, instantiate(bench.cfg.task.wanda))
    title = f"Wanda on {bench.settings.wanda_pairs} pairs"
    return Family("wanda", title, rows, _said(bench, "wanda_pairs", "repeats"))


def _finetuning(bench: Bench) -> Family:
    methods = {name: instantiate(bench.cfg.task[name]) for name in ("paper", "cheap")}
    rows = finetuning_rows(bench.subject, bench.settings, methods)
    title = (
        f"One epoch of adversarial fine-tuning on {bench.settings.finetuning_pairs} pairs; its "
        f"updates from {bench.settings.finetuning_updates} that were timed"
    )
    return Family(
        "finetuning", title, rows, _said(bench, "finetuning_pairs", "finetuning_updates")
    )


def _audit(bench: Bench) -> Family:
    rows = audit_rows(bench.settings, bench.audit_overrides, bench.program_place("audit"))
    title = f"A whole audit of {bench.settings.audit_pairs} pairs, in a process of its own"
    return Family("audit", title, rows, _said(bench, "audit_pairs", "audit_steps"))


def _startup(bench: Bench) -> Family:
    rows = startup_rows(bench.settings, bench.audit_overrides, bench.program_place("startup"))
    return Family("startup", "Starting the program", rows, _said(bench, "startup_repeats"))


def _scaling(bench: Bench) -> Family:
    rows = scaling_rows(bench.subject, bench.settings)
    title = "What an attack costs with more budgets, and with more pairs"
    said = _said(bench, "scaling_pairs", "scaling_budgets", "scaling_steps", "scaling_repeats")
    return Family("scaling", title, rows, said)


def _said(bench: Bench, *names: str) -> dict[str, Any]:
    return {name: getattr(bench.settings, name) for name in names}


_FAMILIES: dict[str, Callable[[Bench], Family]] = {
    "attack": _attack,
    "sampling": _sampling,
    "nemo": _nemo,
    "wanda": _wanda,
    "finetuning": _finetuning,
    "audit": _audit,
    "startup": _startup,
    "scaling": _scaling,
    "sd14": _sd14,
}


# -------- bench

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
    node = {key: value for key, value in to_container(cfg)["task"].items() if key in known}
    return BenchSettings(**{**node, "sd14": ShapeSettings(**node["sd14"])})


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
        "task": to_container(cfg)["task"],
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
