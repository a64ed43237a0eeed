"""What a fine-tuning writes, known before anything is drawn for it."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dori_lightning.mitigations import finetuning
from dori_lightning.runtime import artifacts, checkpoints
from dori_lightning.types import InputError
from support.distributed_fits import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_too_little_disk_is_refused_before_anything_is_drawn(
    name, model, suspected, context, monkeypatch
):
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    used = model.unet_evaluations
    with pytest.raises(InputError, match=r"0\.1 MB free(.|\n)*unfinished(.|\n)*paths\.cache="):
        context.find(METHODS[name], model, suspected)
    assert model.unet_evaluations == used


@pytest.mark.parametrize("name", ["most", "some", "low rank"])
def test_as_much_is_asked_for_as_three_checkpoints_take(
    name, model, suspected, context, monkeypatch
):
    esd: Any = METHODS["esd"]
    adversarial: Any = METHODS["adversarial"]
    esd = replace(
        esd, steps=3, batch=1, sampling_steps=1, finetune=replace(esd.finetune, checkpoint_every=1)
    )
    method = {
        "most": esd,
        "some": replace(esd, variant="x"),
        "low rank": replace(
            adversarial, low_rank=2, epochs=1, updates=3, adversarial_batch=1, ordinary_batch=1
        ),
    }[name]
    asked: list[int] = []
    numbers: list[int] = []
    files: list[int] = []

    def ask(_, needed, *, fix):
        del fix
        asked.append(needed)

    def measure(folder):
        paths = list(folder.glob("*.ckpt"))
        held = [t for path in paths for t in tensors(checkpoints.read_checkpoint(path))]
        numbers.append(sum(t.nbytes for t in held))
        # a tiny model's files are headers for the most part, half a kilobyte a tensor
        files.append(sum(path.stat().st_size for path in paths) - 600 * len(held))

    monkeypatch.setattr(finetuning, "check_space", ask)
    # between a new checkpoint and the removal of the oldest
    monkeypatch.setattr(checkpoints, "sync_folder", measure)
    context.find(method, model, suspected)
    (needed,) = asked
    assert max(numbers) == pytest.approx(needed, rel=0.01)
    assert max(files) < needed


def tensors(held: Any) -> Iterator[torch.Tensor]:
    """Tensors of a checkpoint, without the triggers, which are small in a model of full size."""
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        for key, value in held.items():
            if key != "trigger_pool":
                yield from tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from tensors(value)
