"""The card of an exported checkpoint: what was changed, how it was audited, and what that leaves.

Pictures and prompts of pairs are not in it: they are what must not get out.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from dori_lightning.report.record import Flag, read_report
from dori_lightning.report.tables import cells_markdown
from dori_lightning.report.words import budget_words, escape, number_words, one_line
from dori_lightning.types import INITS, KINDS, Budget, Cell, Condition, InputError, Norm

# -------- card_audit
# What a model card says of an audit, read from the audit's record: counts, never pictures.

_SEVERITIES = ("invalid", "critical", "warning", "info")


@dataclass(frozen=True)
class AuditedThing:
    """What an audit looked at.

    Attributes:
        fingerprint: Of the checkpoint.
        edit: Identity of the edit it carried; ``none`` for the checkpoint as it is.
    """

    fingerprint: str
    edit: str


@dataclass(frozen=True)
class CardAudit:
    """An audit, as a model card shows it.

    Attributes:
        verdict: Its paragraph.
        cells: Its rows, with those of the checkpoint before the mitigation where there are any.
        flags: What limits the numbers' meaning, gravest first.
        descriptor: Which descriptor decided.
        threshold: Similarity above which a picture counted as a copy.
        rule: ``fixed`` or ``calibrated``.
        recommended: Largest attack that leaves the controls alone, None where there is none.
        loss: Denoising loss on ordinary pictures over that before the mitigation, with its 95 %
            interval; None where it was not measured.
        finished: When, ISO 8601.
        git_sha: Commit of the code, None outside a checkout.
    """

    verdict: str
    cells: tuple[Cell, ...]
    flags: tuple[Flag, ...]
    descriptor: str
    threshold: float
    rule: str
    recommended: Budget | None
    loss: tuple[float, float, float] | None
    finished: str
    git_sha: str | None


def audited_thing(folder: Path, document: Mapping[str, Any]) -> AuditedThing:
    """Tell which weights an audit's run folder speaks of.

    Args:
        folder: The run folder; its ``edit.json`` names the edit.
        document: Its ``report.json``.

    Raises:
        InputError: ``edit.json`` is missing or damaged, or the record names no checkpoint.
    """
    path = folder / "edit.json"
    try:
        identity = json.loads(path.read_text("utf-8"))["identity"]
        return AuditedThing(str(document["provenance"]["fingerprint"]), str(identity))
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist, so it is unknown which edit was audited\n"
            f"  fix:   run the audit's command again; it finishes what is missing"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder} does not say what was audited ({error!r})\n"
            f"  fix:   run the audit's command again; it rewrites its record"
        ) from None


def card_audit(folder: Path) -> CardAudit:
    """Read what a card shows of an audit.

    Raises:
        InputError: The record is missing or not as an audit writes it.
    """
    document = read_report(folder)
    try:
        rule = document["calibration"]
        budget = document["recommended_budget"]
        return CardAudit(
            verdict=str(document["verdict"]),
            cells=tuple(_cell(row) for row in document["cells"]),
            flags=_flags(document["flags"]),
            descriptor=str(rule["descriptor"]),
            threshold=float(rule["threshold"]),
            rule=_one_of(rule["rule"], ("fixed", "calibrated")),
            recommended=None if budget is None else _budget(budget),
            loss=_loss_card_audit(document.get("utility")),
            finished=str(document["provenance"]["finished"]),
            git_sha=document["provenance"]["git_sha"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / 'report.json'} is not as an audit writes it ({error!r})\n"
            f"  fix:   run the audit's command again; it rewrites its record"
        ) from None


def _cell(row: Mapping[str, Any]) -> Cell:
    attack: Literal["prompt", "dori"] = _one_of(row["attack"], ("prompt", "dori"))
    init = None if row["init"] is None else _one_of(row["init"], INITS)
    low, high = row["mr_ci95"]
    return Cell(
        checkpoint=str(row["checkpoint"]),
        mitigation=str(row["mitigation"]),
        condition=Condition(attack, init, _budget(row["budget"])),
        kind=_one_of(row["kind"], KINDS),
        n=int(row["n"]),
        failed=int(row["failed"]),
        hits=int(row["hits"]),
        mr=_number(row["mr"]),
        mr_ci95=(_number(low), _number(high)),
        similarity_median=_number(row["similarity"]["median"]),
        similarity_mad=_number(row["similarity"]["mad"]),
        descriptor=str(row["descriptor"]),
        threshold=float(row["threshold"]),
        aggregation=_one_of(row["aggregation"], ("max", "median")),
    )


def _budget(row: Mapping[str, Any]) -> Budget:
    eps = None if row["eps"] is None else float(row["eps"])
    return Budget(_one_of(row["norm"], get_args(Norm)), eps, int(row["steps"]))


def _flags(rows: Sequence[Mapping[str, Any]]) -> tuple[Flag, ...]:
    flags = [
        Flag(str(row["name"]), _one_of(row["severity"], _SEVERITIES), str(row["text"]))
        for row in rows
    ]
    return tuple(sorted(flags, key=lambda flag: _SEVERITIES.index(flag.severity)))


def _loss_card_audit(utility: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    loss = (utility or {}).get("denoising_loss")
    if loss is None:
        return None
    low, high = loss["ratio_ci95"]
    return _number(loss["ratio"]), _number(low), _number(high)


def _number(value: float | None) -> float:
    """A number of the record, which has null for NaN."""
    return math.nan if value is None else float(value)


def _one_of(value: Any, known: Sequence[Any]) -> Any:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return value


# -------- model_card

_TAGS = ("stable-diffusion", "text-to-image", "memorization", "dori-lightning")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Changed:
    """What an edit changes in one part of the UNet.

    Attributes:
        tensors: Weight tensors that it changes.
        weights: Numbers in them that differ afterwards.
        total: Numbers in them.
    """

    tensors: int
    weights: int
    total: int


@dataclass(frozen=True)
class Exported:
    """What a card says of an export.

    Attributes:
        checkpoint: Name of the original.
        source: Its hub id or ``package:NAME``; None where it is a file or folder of the user's,
            whose place is nobody's business.
        revision: Pinned commit of a hub id.
        fingerprint: Hash of the original's weights.
        exported: Hash of the weights that were written, as the loader finds it.
        dtypes: Part to the dtype it was written in.
        exact: Whether no weight was rounded.
        mitigation: Name of what found the edit; ``none`` where there is none.
        settings: Its settings, plain values.
        cost: What it took, such as ``unet_evaluations`` and ``seconds``.
        edit: Identity of the edit.
        changed: Part of the UNet to what is changed in it; empty where nothing is.
        pairs: Kind to the number of pairs it should make the model forget; None where unknown.
        pair: The one pair whose masks were chosen from a per-pair edit.
        seed: Run seed of the mitigation; None where unknown.
        git_sha: Commit of the code, None outside a checkout.
        packages: Package to version.
    """

    checkpoint: str
    source: str | None
    revision: str | None
    fingerprint: str
    exported: str
    dtypes: Mapping[str, str]
    exact: bool
    mitigation: str
    settings: Mapping[str, Any]
    cost: Mapping[str, float]
    edit: str
    changed: Mapping[str, Changed] = field(default_factory=dict)
    pairs: Mapping[str, int] | None = None
    pair: str | None = None
    seed: int | None = None
    git_sha: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)


def model_card(export: Exported, audit: CardAudit | None) -> str:
    """Write the card as Markdown with the front matter of the Hugging Face Hub.

    Args:
        export: What was exported.
        audit: The audit of it; None where there was none, which the card says.
    """
    sections = (
        _front_matter(export),
        f"# {escape(export.checkpoint)}, {_title(export)}",
        _origin(export),
        "## What was changed",
        _changes(export),
        "## Audit",
        _audit(export, audit),
        "## What an audit cannot tell",
        _LIMITS,
        "## How to load it",
        _LOADING,
        "## How to reproduce it",
        _reproduction(export),
    )
    return "\n\n".join(sections) + "\n"


_LIMITS = """\
An audit finds what it looks for. It tried the listed pictures with the listed starts and budgets:
a longer or another attack may still bring a picture back, and pictures that were not on the list
were not looked for. No copy among n pictures leaves room up to the upper end of the interval. What
counts as a copy is decided by one descriptor and its threshold; copies that it does not see, such
as mirrored or cropped ones, were not counted. A picture that no longer comes back may still have
left traces in the weights, and nothing is said here of styles, persons or other concepts."""

_LOADING = """\
```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("FOLDER", safety_checker=None)
```

All weights are safetensors, and no code comes with them. A safety checker is not part of this
export, whether the original had one or not. The scheduler is DDIM with the original's noise
schedule."""


def _front_matter(export: Exported) -> str:
    lines = ["---", "library_name: diffusers", "pipeline_tag: text-to-image", "tags:"]
    lines += [f"- {tag}" for tag in _TAGS]
    if (hub_id := _hub_id(export)) is not None:
        lines.append(f"base_model: {json.dumps(hub_id)}")
    return "\n".join([*lines, "---"])


def _hub_id(export: Exported) -> str | None:
    named = export.source is not None and _HUB_ID.fullmatch(export.source)
    return export.source if named else None


def _title(export: Exported) -> str:
    return f"after {escape(export.mitigation)}" if export.changed else "as it was"


def _origin(export: Exported) -> str:
    source = "a local file or folder" if export.source is None else escape(export.source)
    if export.revision is not None:
        source += f", revision {escape(export.revision)}"
    parts = [f"{part} {name}" for part, name in export.dtypes.items()]
    alike = set(export.dtypes.values())
    dtypes = ", ".join(escape(text) for text in (alike if len(alike) == 1 else parts))
    rounding = (
        "every weight has exactly the value it was computed with"
        if export.exact
        else "weights were rounded to this"
    )
    return "\n".join(
        [
            f"- original: {escape(export.checkpoint)} ({source}), "
            f"fingerprint {escape(export.fingerprint)}",
            f"- this checkpoint: fingerprint {escape(export.exported)}",
            f"- written in {dtypes}; {rounding}",
            "- licence: that of the original applies; this card grants none",
        ]
    )


def _changes(export: Exported) -> str:
    if not export.changed:
        return "Nothing: no weight differs from the original's."
    tensors = sum(part.tensors for part in export.changed.values())
    weights = sum(part.weights for part in export.changed.values())
    lines = [
        f"{escape(export.mitigation)} changed {weights:,} weights in "
        f"{number_words(tensors, 'tensor')} of the UNet (edit {escape(export.edit)}). The text "
        f"encoder and the autoencoder are the original's."
    ]
    if export.pair is not None:
        lines.append(
            f"The edit has masks of its own for each picture; those of {escape(export.pair)} are "
            f"in this checkpoint, so nothing was done about any other picture."
        )
    if export.pairs is not None:
        counts = ", ".join(f"{count} of kind {escape(k)}" for k, count in export.pairs.items())
        lines.append(
            f"It was to make the model forget these pairs of prompt and picture: {counts}."
        )
    lines.append(
        "| part of the UNet | tensors | weights changed | of |\n|---|---:|---:|---:|\n"
        + "\n".join(
            f"| {escape(name)} | {part.tensors} | {part.weights:,} | {part.total:,} |"
            for name, part in export.changed.items()
        )
    )
    if export.cost:
        spent = ", ".join(f"{escape(k)} {value:,g}" for k, value in export.cost.items())
        lines.append(f"Cost of finding it: {spent}.")
    return "\n\n".join(lines)


def _audit(export: Exported, audit: CardAudit | None) -> str:
    if audit is None:
        return (
            "**This checkpoint was not audited.** Whether it still reproduces the pictures it was "
            "to forget, from their prompts or under attack, is unknown."
        )
    lines = [escape(audit.verdict)]
    if not export.exact:
        lines.append("The audit was of the weights before they were rounded for this export.")
    lines += [
        cells_markdown([replace(c, mitigation=escape(c.mitigation)) for c in audit.cells]).strip(),
        f"MR is the memorization rate, the share of pairs that come back. A picture counts as a "
        f"copy above {audit.threshold:.2f} by {escape(audit.descriptor)} (threshold "
        f"{audit.rule}). "
        + (
            "No attack of this audit left the controls alone."
            if audit.recommended is None
            else f"The largest attack that left the controls alone: "
            f"{budget_words(audit.recommended)}."
        ),
        _loss(audit),
    ]
    if audit.flags:
        lines.append(
            "\n".join(f"- **{flag.severity}**: {escape(flag.text)}" for flag in audit.flags)
        )
    commit = "" if audit.git_sha is None else f", commit {escape(audit.git_sha)}"
    lines.append(f"Audit finished {escape(audit.finished)}{commit}.")
    return "\n\n".join(lines)


def _loss(audit: CardAudit) -> str:
    if audit.loss is None:
        return "What the change costs on ordinary pictures was not measured."
    ratio, low, high = audit.loss
    if math.isnan(ratio):
        return "The denoising loss on ordinary pictures is no longer finite."
    return (
        f"Denoising loss on ordinary pictures, times that of the original: {ratio:.3f} "
        f"({low:.3f} to {high:.3f})."
    )


def _reproduction(export: Exported) -> str:
    command = ["python", "-m", "dori_lightning", "task=export"]
    if export.source is not None and export.source.startswith("package:"):
        command.append(f"checkpoint={export.source.removeprefix('package:')}")
    else:
        command += ["checkpoint=custom", f"checkpoint.source={_hub_id(export) or 'ORIGINAL'}"]
        if export.revision is not None:
            command.append(f"checkpoint.revision={export.revision}")
    command.append("task.edit=edit.safetensors" if export.changed else "mitigation=none")
    lines = [f"```\n{one_line(shlex.join(command))}\n```"]
    if export.changed:
        seed = "unknown" if export.seed is None else str(export.seed)
        settings = json.dumps(_without_places(export.settings), indent=2, sort_keys=True)
        lines.append(
            f"writes these weights again from the edit. To find the edit anew, run the mitigation "
            f"on the same pairs and the same ordinary prompts, with seed {seed} and the settings\n"
            f"\n```json\n{settings}\n```"
        )
    if export.packages:
        versions = ", ".join(f"{escape(k)} {escape(v)}" for k, v in export.packages.items())
        commit = "" if export.git_sha is None else f", commit {escape(export.git_sha)}"
        lines.append(f"Written with {versions}{commit}.")
    return "\n\n".join(lines)


def _without_places(value: Any) -> Any:
    """Settings whose absolute paths are cut to their last part."""
    if isinstance(value, str) and re.match(r"/|~|[A-Za-z]:[\\/]", value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(item) for item in value]
    return value
