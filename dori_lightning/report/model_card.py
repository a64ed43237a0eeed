"""The card of an exported checkpoint: what was changed, how it was audited, and what that leaves.

Pictures and prompts of pairs are not in it: they are what must not get out.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dori_lightning.markdown import escape, one_line
from dori_lightning.report.summary import budget_words, number_words
from dori_lightning.report.tables import cells_markdown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dori_lightning.report.card_audit import CardAudit

__all__ = ["Changed", "Exported", "model_card"]

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
