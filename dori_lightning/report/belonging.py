"""Which audits may stand in one table, and what their rows are called."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dori_lightning.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from dori_lightning.report.run_files import Run

__all__ = ["BASELINE", "check_baselines", "check_belonging", "labels_of"]

BASELINE = "none"
"""The mitigation that is none: the row that every other one is compared with."""

# What decides a cell besides its own keys. Initial points, budgets and snapshots only decide which
# cells there are; batch widths and devices decide nothing.
_SHARED = (
    "seed",
    "checkpoint.precision",
    "checkpoint.resolution",
    "sampling.sampler",
    "sampling.steps",
    "sampling.guidance",
    "sampling.images_per_pair",
    "sampling.seed",
    "attack.lr",
    "attack.noise_batch",
    "attack.keep_first_token",
    "attack.restarts",
    "metrics.decider",
    "metrics.aggregation",
)
_ABSENT = "nothing"
_SOME = 5


def check_baselines(runs: Sequence[Run], *, unfinished: Sequence[str]) -> None:
    """Refuse checkpoints without an audit of the checkpoint as it is.

    Raises:
        InputError: Names them, and the runs that have no result.
    """
    by_checkpoint: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        by_checkpoint[run.checkpoint].add(run.mitigation)
    lacking = [name for name, held in by_checkpoint.items() if BASELINE not in held]
    if lacking:
        pending = f"\n  without a result: {', '.join(unfinished)}" if unfinished else ""
        raise InputError(
            f"no table without its none row: nothing shows what {', '.join(lacking)} reproduces "
            f"without a mitigation, nor sets the threshold of the other rows{pending}\n"
            f"  where: task.runs\n"
            f"  mend:  audit the checkpoint with mitigation=none under the same settings, and add "
            f"that run"
        )


def check_belonging(runs: Sequence[Run], base: Run) -> None:
    """Refuse audits of one checkpoint that differ in weights, pairs, sampling, attack or measure.

    Args:
        runs: Audits of one checkpoint.
        base: The one without mitigation.

    Raises:
        InputError: Names every difference.
    """
    problems = [f"  {run.folder.name}: {text}" for run in runs for text in _differences(run, base)]
    if problems:
        listed = "\n".join(problems)
        raise InputError(
            f"these runs do not belong into one table with {base.folder.name}:\n{listed}\n"
            f"  mend:  make a table of each group by itself: task.runs=[FOLDER,FOLDER]"
        )


def _differences(run: Run, base: Run) -> Iterator[str]:
    if run.fingerprint != base.fingerprint:
        yield f"weights {run.fingerprint}, there {base.fingerprint}"
    yield from _pair_differences(run, base)
    for key in _SHARED:
        here, there = _look_up(run.config, key), _look_up(base.config, key)
        if here != there:
            yield f"{key} is {here}, there {there}"
    decider = base.document["calibration"]["descriptor"]
    if decider not in run.descriptors:
        yield f"not measured by {decider}, which decides there"
    settings = f"metrics.descriptors.{decider}"
    here, there = (dict(_flat(_look_up(r.config, settings))) for r in (run, base))
    for key in sorted((here.keys() | there.keys()) - {"threshold"}):
        if here.get(key) != there.get(key):
            yield f"{settings}.{key} is {here.get(key)}, there {there.get(key)}"
    yield from _stopping_differences(run, base)
    if run.aggregation != base.aggregation:
        yield f"pictures count by their {run.aggregation}, there by their {base.aggregation}"


def _stopping_differences(run: Run, base: Run) -> Iterator[str]:
    """What decides which attacks were stopped: it cannot be decided again under another rule."""
    here, there = (_look_up(r.config, "attack.early_stop") is True for r in (run, base))
    if here != there:
        yield f"attack.early_stop is {here}, there {there}"
    if not here or not there:
        return
    steps, others = (_look_up(r.config, "attack.snapshots") for r in (run, base))
    if steps != others:
        yield f"attacks may stop after {steps} steps, there after {others}"
    own, rule = run.calibration(), base.calibration()
    if own.descriptor != rule.descriptor or not math.isclose(
        own.threshold, rule.threshold, abs_tol=1e-9
    ):
        yield (
            f"attacks were stopped by {own.descriptor} above {own.threshold:.3f}, there by "
            f"{rule.descriptor} above {rule.threshold:.3f}"
        )


def _pair_differences(run: Run, base: Run) -> Iterator[str]:
    here, there = _pairs(run), _pairs(base)
    for what, ids in (
        ("lacks the pairs", [name for name in there if name not in here]),
        ("has the pairs", [name for name in here if name not in there]),
        ("has other prompts or pictures for",
         [name for name in here if name in there and here[name] != there[name]]),
    ):  # fmt: skip
        if ids:
            more = f" and {len(ids) - _SOME} more" if len(ids) > _SOME else ""
            yield f"{what} {', '.join(ids[:_SOME])}{more}"


def _pairs(run: Run) -> dict[str, tuple[Any, ...]]:
    hashes = run.document["provenance"].get("image_hashes", {})
    return {
        pair["id"]: (pair["kind"], pair["prompt"], hashes.get(pair["id"]))
        for pair in run.document["pairs"]
    }


def labels_of(runs: Sequence[Run]) -> dict[Path, str]:
    """Name the row of every run: its mitigation, with the settings in which runs of a name differ.

    Returns:
        Run folder to label, such as ``wanda`` or ``wanda[fraction=0.1]``.
    """
    named: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        named[run.mitigation].append(run)
    labels: dict[Path, str] = {}
    for name, group in named.items():
        settings = [dict(_flat(_look_up(run.config, "mitigation"))) for run in group]
        keys = list(dict.fromkeys(key for held in settings for key in held))
        differing = [
            key for key in keys if len({json.dumps(held.get(key)) for held in settings}) > 1
        ]
        for run, held in zip(group, settings, strict=True):
            words = ", ".join(f"{key}={held.get(key)}" for key in differing)
            labels[run.folder] = f"{name}[{words}]" if words else name
    return labels


def _look_up(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part, _ABSENT) if isinstance(config, Mapping) else _ABSENT
    return config


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings by dotted name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif name:
        yield name, value
