"""Settings of the locality task, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from hydra.utils import instantiate

from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.types import Init, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from omegaconf import DictConfig

    from dori_lightning.attacks.settings import AttackSettings
    from dori_lightning.mitigations.base import Mitigation
    from dori_lightning.types import Pair

__all__ = ["LocalitySettings", "Part", "choose_pairs", "settings_of_task"]

Part = Literal["embeddings", "activations", "weights", "triggers"]


@dataclass(frozen=True)
class LocalitySettings:
    """What is looked at; see ``conf/task/locality.yaml``.

    Attributes:
        parts: Which questions are answered.
        images: Memorized images under study.
        ids: Their ids, instead of the first ones.
        control_images: Control images that are attacked in the same way.
        prompts: Prompts that triggers are compared with, of each kind.
        start: Whose triggers are traced through layers, weights, budgets and lines.
        forget: Whether the edit is that of all ``suspected`` pairs or of those ``studied``.
        places: Shares of the way on a line, in (0, 1).
        lines: Lines per image and kind, at most.
        activation_step: Step of the sampler.
        noise_seed: Seed of the starting noise.
        nemo: NeMo as it is run with each embedding.
        wanda: Wanda as it is run with each embedding.
        transfer_to: Mitigations whose models triggers are tried on.
    """

    parts: tuple[Part, ...]
    images: int
    ids: tuple[str, ...] | None
    control_images: int
    prompts: int
    start: Init
    forget: Literal["suspected", "studied"]
    places: tuple[float, ...]
    lines: int
    activation_step: int
    noise_seed: int
    nemo: NeMo
    wanda: Wanda
    transfer_to: tuple[Mitigation, ...]


def settings_of_task(cfg: DictConfig, attack: AttackSettings) -> LocalitySettings:
    """Read and check the task's settings.

    Args:
        cfg: Composed configuration.
        attack: Attack settings.

    Raises:
        InputError: Names the key, what it holds and what it may hold.
    """
    attack.check_whole()
    task = cfg.task
    settings = LocalitySettings(
        parts=tuple(task.parts),
        images=task.images,
        ids=None if task.ids is None else tuple(task.ids),
        control_images=task.control_images,
        prompts=attack.restarts if task.prompts is None else task.prompts,
        start=task.start,
        forget=task.forget,
        places=tuple(task.places),
        lines=task.lines,
        activation_step=task.activation_step,
        noise_seed=task.noise_seed,
        nemo=instantiate(task.nemo),
        wanda=instantiate(task.wanda),
        transfer_to=tuple(instantiate(node) for node in task.transfer_to.values()),
    )
    known = get_args(Part)
    for good, rule in (
        (
            bool(settings.parts) and set(settings.parts) <= set(known),
            f"task.parts must be some of {', '.join(known)}, got {list(settings.parts)}",
        ),
        (settings.images >= 1, f"task.images must be at least 1, got {settings.images}"),
        (
            settings.control_images >= 0,
            f"task.control_images must be 0 or more, got {settings.control_images}",
        ),
        (settings.prompts >= 2, f"task.prompts must be at least 2, got {settings.prompts}"),
        (settings.lines >= 1, f"task.lines must be at least 1, got {settings.lines}"),
        (
            settings.start in attack.inits,
            f"task.start must be among attack.inits ({', '.join(attack.inits)}), "
            f"got {settings.start!r}",
        ),
        (
            settings.start in attack.inits_of("control"),
            f"attack.other_inits must hold task.start ({settings.start}), or the controls would "
            f"be attacked in another way",
        ),
        (
            settings.forget in ("suspected", "studied"),
            f"task.forget must be suspected or studied, got {settings.forget!r}",
        ),
        (
            all(0 < place < 1 for place in settings.places),
            f"task.places must lie between 0 and 1, got {list(settings.places)}",
        ),
        (
            attack.restarts >= 2,
            f"attack.restarts must be at least 2, or there is nothing to compare, "
            f"got {attack.restarts}",
        ),
        (
            attack.budget.steps >= 1,
            f"attack.budget.steps must be at least 1, got {attack.budget.steps}",
        ),
        (
            isinstance(settings.nemo, NeMo) and isinstance(settings.wanda, Wanda),
            "task.nemo and task.wanda must be settings of these methods, such as "
            "mitigation@task.nemo=nemo_all_layers",
        ),
        (
            cfg.trainer.get("devices", 1) == 1 and cfg.trainer.get("num_nodes", 1) == 1,
            "task=locality runs in one process: trainer.devices=1 trainer.num_nodes=1",
        ),
    ):
        if not good:
            raise InputError(rule)
    names = [cfg.mitigation.name, *(own.name for own in settings.transfer_to)]
    if len(set(names)) < len(names):
        raise InputError(
            f"the mitigation and task.transfer_to name one model twice: {', '.join(names)}\n"
            f"  mend:  drop one from task.transfer_to, or give it a name of its own"
        )
    return settings


def choose_pairs(
    pairs: Sequence[Pair], settings: LocalitySettings
) -> Mapping[Literal["studied", "controls", "memorized", "ordinary"], tuple[Pair, ...]]:
    """Choose who is studied and who is compared with, by place in the list, never by result.

    Args:
        pairs: Pairs that an audit would look at.
        settings: The task's settings.

    Returns:
        ``studied``: memorized images whose triggers are searched; ``controls``: control images
        that are attacked; ``memorized``: others whose prompts are compared with, vm before tm;
        ``ordinary``: control pairs whose prompts are compared with.

    Raises:
        InputError: An id is not in the list, or there are too few pairs of a kind.
    """
    by_id = {pair.id: pair for pair in pairs}
    if settings.ids is not None:
        unknown = [name for name in settings.ids if name not in by_id]
        if unknown:
            raise InputError(
                f"task.ids names {', '.join(unknown)}, which the list of pairs does not have"
            )
        studied = tuple(by_id[name] for name in settings.ids)
    else:
        studied = tuple(p for p in pairs if p.kind == "vm")[: settings.images]
    controls = tuple(p for p in pairs if p.kind == "control")
    # another caption of a studied picture is no other image
    pictures = {p.sha256 for p in studied if p.sha256}
    others = sorted(
        (p for p in pairs if p.kind != "control" and p not in studied
         and p.sha256 not in pictures),
        key=lambda p: p.kind != "vm",
    )  # fmt: skip
    for found, wanted, what in (
        (studied, 1, "memorized images under study (kind vm)"),
        (others, 2, "other memorized images (kind vm or tm) to compare with"),
        (controls, 2, "control pairs (kind control) to compare with"),
    ):
        if len(found) < wanted:
            raise InputError(
                f"task=locality needs at least {wanted} {what}, the list has {len(found)}\n"
                f"  where: pairs\n"
                f"  mend:  a longer list, or a smaller task.images"
            )
    return {
        "studied": studied,
        "controls": controls[: settings.control_images],
        "memorized": tuple(others[: settings.prompts]),
        "ordinary": controls[: settings.prompts],
    }
