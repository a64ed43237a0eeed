"""Parts of a checkpoint out of other files: a mended UNet on the base that it was made from.

What a file does not hold stays the base's; ``models.tensors`` tells which names are known.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dori_lightning.models.components import Component
from dori_lightning.models.fingerprint import plain_value
from dori_lightning.models.tensors import components_in, take_tensors
from dori_lightning.models.weight_files import (
    PredictionNote,
    WeightFile,
    component_folder,
    find_weights,
    shipped_folder,
)
from dori_lightning.types import InputError, ReplacedPart

log = logging.getLogger(__name__)

_TEXT_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps",
)  # fmt: skip
"""What decides an embedding; the rest of a text encoder's configuration does not."""


@dataclass(frozen=True)
class Replacement:
    """Files to take tensors of one component from; opened, so that what they are is known.

    Attributes:
        component: Of which component.
        source: The file or folder that was named.
        files: The weight files.
    """

    component: Component
    source: Path
    files: tuple[WeightFile, ...]

    @classmethod
    def open(cls, component: Component, source: str) -> "Replacement":
        """Find and open the files of a component; reads their headers only.

        Args:
            component: Of which component.
            source: A ``.safetensors`` file, the component's folder, or a folder that holds it
                under its name (``checkpoint-500`` with ``unet/`` in it), or ``package:NAME`` for
                one that ships with this package.

        Raises:
            InputError: There are none, or they are something else; says how to mend it.
        """
        place = shipped_folder(source) or Path(source).expanduser()
        files = tuple(WeightFile.open(path) for path in find_weights(place, component))
        return cls(component, place, files)

    def prediction_notes(self) -> Iterator[PredictionNote]:
        """What the files, and a scheduler beside a UNet's folder, say that the UNet predicts."""
        if self.component != "unet":
            return
        yield from (note for file in self.files if (note := file.prediction_note) is not None)
        folder = component_folder(self.source, self.component)
        path = folder.parent / "scheduler" / "scheduler_config.json"
        if self.source.is_dir() and path.is_file():
            kind = _read_json(path).get("prediction_type", "epsilon")
            yield PredictionNote(path, str(kind), f"prediction_type {kind!r}")

    def apply(self, module: nn.Module) -> ReplacedPart:
        """Put the tensors into a loaded component in fp32; the others stay the base's.

        Args:
            module: The base's component, with its ``config``.

        Returns:
            What is on what.

        Raises:
            InputError: The files or their configuration do not fit the base; nothing is changed.
        """
        self._check_config(module)
        self._check_component()
        given = take_tensors(
            self.component,
            module,
            self.files,
            whole=False,
            what=f"{self.source} does not fit the checkpoint's {self.component}",
            where=f"checkpoint.{self.component}",
            fix="give the checkpoint that it was made from as checkpoint.source, or a file with "
            "the names of diffusers or of the original single files",
        )
        base = module.state_dict()
        _refuse_differences(self.source, self.component, given, base)
        changed = sum(not torch.equal(tensor, base[name]) for name, tensor in given.items())
        module.load_state_dict(given, strict=False)
        found = ReplacedPart(
            part=self.component,
            source=self._name(),
            files={file.path.name: file.sha256() for file in self.files},
            replaced=len(given),
            changed=changed,
            total=len(base),
        )
        log.info(
            "%s: %d of %d tensors are those of %s, %d of them differ from the checkpoint's",
            self.component, found.replaced, found.total, self.source, changed,
        )  # fmt: skip
        if not changed:
            log.warning(
                "%s holds the same weights as the checkpoint: checkpoint.%s changes nothing",
                self.source, self.component,
            )  # fmt: skip
        return found

    def _name(self) -> str:
        """What reports call the source: no more of its place than tells which it is."""
        place = self.source.absolute()  # not resolved: files of the hub cache are links to hashes
        return f"{place.parent.name}/{place.name}" if place.name == self.component else place.name

    def _check_component(self) -> None:
        """Refuse files that hold another component.

        Raises:
            InputError: Names the component that they hold.
        """
        held = components_in(name for file in self.files for name in file.names)
        if held and self.component not in held:
            raise InputError(
                f"{self.source} holds no {self.component}, but looks like a {held[0]}",
                where=f"checkpoint.{self.component}",
                fix=f"checkpoint.{held[0]}={self.source}",
            )

    def _check_config(self, module: nn.Module) -> None:
        """Refuse a folder whose configuration says another model than the base's.

        Raises:
            InputError: Names the values that differ.
        """
        path = component_folder(self.source, self.component) / "config.json"
        if not self.source.is_dir() or not path.is_file():
            return
        own = _read_json(path)
        config: Any = module.config
        base = dict(config) if isinstance(config, Mapping) else config.to_dict()
        differ = [
            f"{key} {own[key]!r}, the checkpoint has {base[key]!r}"
            for key in base
            if key in own
            and self._decides(key)
            and plain_value(own[key]) != plain_value(base[key])
        ]
        if differ:
            raise InputError(
                f"{path} says another model than the checkpoint's {self.component}: "
                f"{'; '.join(differ[:5])}",
                where=f"checkpoint.{self.component}",
                fix="give the checkpoint that it was made from as checkpoint.source; or, if the "
                "values do not matter, the weight file itself instead of the folder",
            )

    def _decides(self, key: str) -> bool:
        """Whether a value of the configuration decides what the component computes."""
        if self.component == "text_encoder":
            return key in _TEXT_SETTINGS
        # the size of an autoencoder's training images is only a note
        return not key.startswith("_") and (self.component, key) != ("vae", "sample_size")


def _read_json(path: Path) -> dict[str, Any]:
    """The settings in a configuration's file.

    Raises:
        InputError: It is damaged.
    """
    try:
        held = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}", fix="get it again") from error
    if not isinstance(held, dict):
        raise InputError(f"{path} holds no settings", fix="get it again")
    return held


def _refuse_differences(
    source: Path,
    component: Component,
    given: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
) -> None:
    """Refuse tensors that are what changed, to be added, rather than weights.

    Mended weights point where the base's point; a difference is small and points elsewhere.

    Raises:
        InputError: They look like differences.
    """
    size = own = along = 0.0
    for name, tensor in given.items():
        size += float(tensor.square().sum())
        own += float(base[name].square().sum())
        along += float((tensor * base[name]).sum())
    if size and math.sqrt(size) < 0.3 * math.sqrt(own) and along < 0.5 * math.sqrt(size * own):
        raise InputError(
            f"{source} looks like differences to be added to a {component}, not like weights: its "
            f"values are {math.sqrt(size / own):.2g} as large as the checkpoint's and hardly "
            f"along them",
            where=f"checkpoint.{component}",
            fix="add them to the weights that they were taken from, and save the sum",
        )
