"""Compose a configuration and run a task in this process, as the command line would."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from dori_lightning import config
from dori_lightning.planting.scenes import draw_scene
from support.silence import no_silent_stage
from support.tiny import write_tiny

SMALL = (
    "utility=none", "attack.budget.steps=2", "attack.snapshots=[]", "attack.noise_batch=2",
    "attack.inits=[prompt]", "sampling.steps=2", "sampling.images_per_pair=1",
    "report.images=none",
)  # fmt: skip
"""An audit of a tiny checkpoint in seconds."""

ORDINARY = 2
"""Ordinary prompts of an audit that is spared."""


def on_tiny(material: Path, *more: str) -> tuple[str, ...]:
    """Overrides that choose the checkpoint and the pairs in a folder, then ``more``."""
    return (
        "pairs=folder", f"pairs.path={material / 'pairs'}", "checkpoint.name=tiny",
        f"checkpoint.source={material / 'checkpoint'}", "checkpoint.device=cpu", "trainer=cpu",
        # random weights: their autoencoder reconstructs nothing to calibrate a threshold on
        "metrics.descriptors.local_correlation.threshold=0.5",
        # each attacks a suspect once more, plants images or compares losses: tests of their own
        "pairs.self_controls=[]", "power=none", "evidence.losses=false", *more,
    )  # fmt: skip


@contextmanager
def spared() -> Iterator[None]:
    """No figures, no measuring of memory, few ordinary images: most of so small a run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dori_lightning.report.pages.audit_figures", lambda _: {})
        patch.setattr("dori_lightning.report.locality.draw_locality", lambda _: {})
        patch.setattr("dori_lightning.models.memory.free_memory", lambda _: None)
        patch.setattr("dori_lightning.audit.evaluation.ORDINARY_PROMPTS", ORDINARY)
        yield


def configuration(*overrides: str, experiment: str | None = None) -> DictConfig:
    """Composed configuration of the overrides."""
    config.register()
    chosen = [f"+experiment={experiment}"] if experiment else []
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose("config", [*chosen, *overrides])


def run_task(
    folder: Path, *overrides: str, experiment: str | None = None, whole: bool = False
) -> float | None:
    """Run the composed task in ``folder``, spared of what takes longest unless ``whole``.

    Fails where a stage shows no progress, whatever the task.
    """
    cfg = configuration(*overrides, f"paths.output={folder.parent}", experiment=experiment)
    task = import_module(f"dori_lightning.tasks.{cfg.task.name}")
    with nullcontext() if whole else spared(), no_silent_stage():
        rate: float | None = task.run(cfg, folder)
    return rate


def write_material(place: Path, *, vm: int = 2, control: int = 3) -> Path:
    """A tiny checkpoint and pairs, in a folder each."""
    write_tiny(place / "checkpoint")
    write_pairs(place / "pairs", vm=vm, control=control)
    return place


def write_pairs(folder: Path, *, vm: int = 2, control: int = 3) -> Path:
    """A folder of scenes with a metadata.csv."""
    folder.mkdir(parents=True)
    lines = ["id,file_name,kind,prompt"]
    words = (
        "a red boat on sea",
        "a blue house",
        "a photo of a cat",
        "a boat at night",
        "a red house at night",
    )
    for k in range(vm + control):
        draw_scene(k, size=48).image.save(folder / f"{k}.png")
        kind = "vm" if k < vm else "control"
        lines.append(f"pair{k},{k}.png,{kind},{words[k % len(words)]}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def grey(path: Path) -> Path:
    """An image with nothing in it."""
    Image.new("RGB", (40, 40), (128, 128, 128)).save(path)
    return path
