"""After how many steps does an attack bring its image back, by how its timesteps are drawn?

Searches eight planted images of the checkpoint from random embeddings, twice each, with as many
noise samples for each choice of ``attack.timesteps``; draws two images at each of a few steps and
prints how many searches have brought their image back by then. Arguments: a folder for what is
found, then the choices, such as ``uniform stratified importance 0.2,0.6``.
"""

import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from dori_lightning import config
from dori_lightning.attacks.embedding_attack import attack_rounds, run_attacks
from dori_lightning.models.generation import generation_noise
from dori_lightning.tasks.audit import audit_context

IMAGES, SNAPSHOTS, THRESHOLD = 2, (4, 8, 16, 25), 0.6


def main(place: str, *choices: str) -> None:
    """Print a row for each choice."""
    config.register()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = compose("config", ["+experiment=audit", "pairs=dori_tiny_sweep"])
    folder = Path(place)
    folder.mkdir(parents=True, exist_ok=True)
    context = audit_context(cfg, folder, instantiate(cfg.pairs).read())
    model = context.model
    suspects = [pair for pair in context.pairs if pair.kind == "vm"][:8]
    noise = torch.stack([generation_noise(2 + k, model.latent_shape) for k in range(IMAGES)])
    for choice in choices:
        chosen = tuple(map(float, choice.split(","))) if "," in choice else choice
        settings = replace(
            context.attack, inits=("random",), other_inits=None, restarts=2,
            snapshots=SNAPSHOTS, timesteps=chosen,
        )  # fmt: skip
        own = replace(context, attack=settings, folder=folder / choice)
        attack = own.attack_context("none")
        if attack.density is not None:
            print("density", " ".join(f"{20 * p:.2f}" for p in attack.density.tolist()))
        back: dict[tuple[str, int], int] = {}
        best: dict[int, list[float]] = {}
        for one in run_attacks(attack, attack_rounds(settings, suspects)):
            step = one.condition.budget.steps
            images = model.generate(one.embedding.expand(IMAGES, -1, -1), noise, own.sampling)
            found = own.references.similarities(images.cpu(), [one.pair] * IMAGES)
            best.setdefault(step, []).append(float(found.max()))
            if float(found.max()) > THRESHOLD:
                search = (one.pair.id, one.restart)
                back[search] = min(step, back.get(search, step))
        by_step = {step: sum(own <= step for own in back.values()) for step in best}
        medians = {step: round(median(values), 2) for step, values in best.items()}
        print(choice, "back by", by_step, "median similarity", medians, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
