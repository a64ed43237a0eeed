"""How a checkpoint's value neurons react to ordinary prompts, and which layers carry the text."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.table import Table

from dori_lightning.mitigations.activations import (
    ActivationStatistics,
    LayerInfluence,
    activation_statistics,
    layer_influence,
)
from dori_lightning.runtime.artifacts import check_folder, claim_folder, drop_keys, write_json
from dori_lightning.runtime.logging import answer_console
from dori_lightning.tasks.run_record import (
    FINGERPRINT,
    deciding_settings,
    logged,
    to_container,
    with_fingerprint,
)
from dori_lightning.types import InputError


@logged
def run(cfg: DictConfig, folder: Path) -> None:
    """Compute the statistics that NeMo selects by, and write them into ``folder``."""
    corpus, sampling = instantiate(cfg.corpus), instantiate(cfg.sampling)
    if cfg.task.influence_prompts < 1:
        raise InputError(f"task.influence_prompts must be >= 1, got {cfg.task.influence_prompts}")
    prompts = corpus.prompts("calibration", cfg.task.prompts)
    method = _method_of(to_container(cfg))
    check_folder(folder, method, unknown=[FINGERPRINT])
    model = instantiate(cfg.checkpoint)
    claim_folder(folder, with_fingerprint(method, model))
    statistics = activation_statistics(model, prompts)
    influence = layer_influence(
        model,
        prompts[: cfg.task.influence_prompts],
        sampling=sampling,
        seed=cfg.seed,
        timestep=cfg.task.timestep,
    )
    path = statistics.save(folder / "statistics.safetensors")
    summary = {
        "checkpoint": {"name": model.name, "fingerprint": model.fingerprint},
        "corpus": corpus.identity,
        "prompts": statistics.prompts,
        "identity": statistics.identity,
        "layers": _rows(statistics, influence),
    }
    write_json(folder / "statistics.json", summary, sort_keys=False)
    console = answer_console()
    console.print(_table(summary["layers"]))
    console.print(f"statistics: {path}", soft_wrap=True)
    preset = "nemo_text_stream" if model.text_stream else "nemo"
    console.print(
        f"use them with mitigation={preset} mitigation.statistics={path}", soft_wrap=True
    )


def _method_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """What decides the results, out of the resolved configuration."""
    return {
        "seed": cfg["seed"],
        "task": cfg["task"],
        "checkpoint": deciding_settings(cfg["checkpoint"]),
        "corpus": cfg["corpus"],
        "sampling": drop_keys(cfg["sampling"], "batch", "images_per_pair", "seed"),
    }


def _rows(
    statistics: ActivationStatistics, influence: dict[str, LayerInfluence]
) -> list[dict[str, Any]]:
    return [
        {
            "layer": name,
            "neurons": len(statistics.means[name]),
            "without_spread": int((statistics.stds[name] == 0).sum()),
            "mean": float(statistics.means[name].mean()),
            "std": float(statistics.stds[name].mean()),
            **asdict(measured),
        }
        for name, measured in influence.items()
    ]


def _shared_ending(names: Sequence[str]) -> str:
    """What all names end with, from a dot on."""
    ending: list[str] = []
    for parts in zip(*(reversed(name.split(".")) for name in names), strict=False):
        if len(names) < 2 or len(set(parts)) > 1:
            break
        ending.insert(0, parts[0])
    return "".join(f".{part}" for part in ending)


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="value layers; change and share of the noise when one sees no prompt")
    for heading in ("layer", "neurons", "mean", "std", "change", "share"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    shared = _shared_ending([row["layer"] for row in rows])
    for row in rows:
        table.add_row(
            row["layer"].removesuffix(shared),
            str(row["neurons"]),
            *(f"{row[key]:.4f}" for key in ("mean", "std", "change", "share")),
        )
    return table
