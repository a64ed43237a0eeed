"""The card of an exported checkpoint: what was changed, how it was audited, and what that leaves.

Images and prompts of pairs are not in it: they are what must not get out.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dori_lightning.models.components import Component
from dori_lightning.report.record import AuditRecord
from dori_lightning.report.tables import cells_table, markdown_table
from dori_lightning.report.words import one_line, render_text
from dori_lightning.types import FusedLora, ReplacedPart

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
        fingerprint: Of the original.
        exported: Fingerprint of what was written, as the loader finds it.
        dtypes: Component to the dtype it was written in.
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
        replaced: Parts of the original whose weights were from other files.
        loras: What was added to the original's weights before.
    """

    checkpoint: str
    source: str | None
    revision: str | None
    fingerprint: str
    exported: str
    dtypes: Mapping[Component, str]
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
    replaced: Sequence[ReplacedPart] = ()
    loras: Sequence[FusedLora] = ()


def model_card(export: Exported, audit: AuditRecord | None) -> str:
    """Write the card as Markdown with the front matter of the Hugging Face Hub.

    Args:
        export: What was exported.
        audit: The record of its audit; None where there was none, which the card says.
    """
    alike = set(export.dtypes.values())
    return render_text(
        "model_card.md.j2",
        export=export,
        audit=audit,
        table="" if audit is None else markdown_table(cells_table(audit.cells)),
        hub_id=_hub_id(export),
        dtypes=alike if len(alike) == 1 else [f"{k} {v}" for k, v in export.dtypes.items()],
        command=one_line(shlex.join(_command(export))),
        settings=json.dumps(_without_places(export.settings), indent=2, sort_keys=True),
    )


def _hub_id(export: Exported) -> str | None:
    named = export.source is not None and _HUB_ID.fullmatch(export.source)
    return export.source if named else None


def _command(export: Exported) -> list[str]:
    """The command that exports the checkpoint again."""
    command = ["python", "-m", "dori_lightning", "task=export"]
    if export.source is not None and export.source.startswith("package:"):
        command.append(f"checkpoint={export.source.removeprefix('package:')}")
    else:
        command += ["checkpoint=custom", f"checkpoint.source={_hub_id(export) or 'ORIGINAL'}"]
        if export.revision is not None:
            command.append(f"checkpoint.revision={export.revision}")
    command += [f"checkpoint.{replaced.part}=FILE" for replaced in export.replaced]
    if export.loras:
        files = ",".join(f"{{path:FILE,scale:{lora.scale:g}}}" for lora in export.loras)
        command.append(f"checkpoint.lora=[{files}]")
    return [*command, "task.edit=edit.safetensors" if export.changed else "mitigation=none"]


def _without_places(value: Any) -> Any:
    """Settings whose absolute paths are cut to their last part."""
    if isinstance(value, str) and re.match(r"/|~|[A-Za-z]:[\\/]", value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(item) for item in value]
    return value
