"""Compose a configuration and run a task in this process, as the command line would."""

from importlib import import_module
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from dori_lightning import config
from dori_lightning.planting.scenes import draw_scene


def configuration(*overrides: str, experiment: str | None = None) -> DictConfig:
    """Composed configuration of the overrides."""
    config.register()
    chosen = [f"+experiment={experiment}"] if experiment else []
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        return compose("config", [*chosen, *overrides])


def run_task(folder: Path, *overrides: str, experiment: str | None = None) -> float | None:
    """Run the composed task in ``folder``."""
    cfg = configuration(*overrides, f"paths.output={folder.parent}", experiment=experiment)
    rate: float | None = import_module(f"dori_lightning.tasks.{cfg.task.name}").run(cfg, folder)
    return rate


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
    """A picture with nothing in it."""
    Image.new("RGB", (40, 40), (128, 128, 128)).save(path)
    return path
