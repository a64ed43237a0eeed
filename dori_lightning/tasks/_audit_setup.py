"""Everything that the stages of an audit work with, checked before hours are spent on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from dori_lightning.attacks.embedding_attack import ControlPrompts
from dori_lightning.attacks.memory import pairs_that_fit
from dori_lightning.disk import check_space
from dori_lightning.mitigations.none import NoMitigation
from dori_lightning.models.pictures import unmitigated_name
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.manifest import check_prompt_lengths
from dori_lightning.tasks._folder import claim_folder, without
from dori_lightning.tasks._originals import originals_of
from dori_lightning.tasks._provenance import plain
from dori_lightning.tasks._space import audit_bytes
from dori_lightning.tasks._workshop import workshop_of
from dori_lightning.types import InputError, Pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import lightning.pytorch as L
    from omegaconf import DictConfig

    from dori_lightning.attacks.settings import AttackSettings
    from dori_lightning.metrics.measure import Measures, Originals
    from dori_lightning.metrics.utility import UtilitySettings
    from dori_lightning.mitigations.base import Mitigation, Workshop
    from dori_lightning.models.protocol import Sampling
    from dori_lightning.models.stable_diffusion import StableDiffusion
    from dori_lightning.tracking.tracker import Tracker
    from dori_lightning.types import Budget, Pair

__all__ = ["Bench", "check_controls", "control_prompts", "method_of", "set_up"]


@dataclass(frozen=True)
class Bench:
    """What the stages of an audit share.

    Attributes:
        folder: Run folder.
        cache: What the jobs of a sweep share.
        seed: Run seed.
        pairs: Pairs under audit, and rows of the list that have no picture.
        model: The checkpoint, without any edit.
        data: The pairs, encoded.
        originals: Their pictures, described.
        settings: Attack settings.
        budget: The attack's budget, resolved.
        controls: Where the attack from ``control_prompt`` begins.
        sampling: How pictures are generated.
        mitigation: What is done to the checkpoint.
        workshop: What mitigations work with.
        utility: How much is measured of its price.
        trainer: Runs the attack; its processes share the pairs and their pictures.
    """

    folder: Path
    cache: Path
    seed: int
    pairs: Pairs
    model: StableDiffusion
    data: PairsDataModule
    originals: Originals
    settings: AttackSettings
    budget: Budget
    controls: ControlPrompts
    sampling: Sampling
    mitigation: Mitigation
    workshop: Workshop
    utility: UtilitySettings
    trainer: L.Trainer

    @property
    def suspected(self) -> tuple[Pair, ...]:
        """The pairs that a mitigation is to forget."""
        return tuple(pair for pair in self.pairs if pair.kind != "control")

    @property
    def unmitigated(self) -> Path:
        """Folder for the pictures that the checkpoint draws as it is."""
        return self.cache / "unmitigated" / unmitigated_name(self.model, self.sampling)


def set_up(cfg: DictConfig, folder: Path, tracker: Tracker) -> Bench:
    """Read, check and load what the configuration names.

    Raises:
        InputError: Something is missing, does not fit together, or ``folder`` holds results of
            other settings.
    """
    listed = instantiate(cfg.pairs).read()
    pairs = [pair for pair in listed if pair.role == "audit"]
    settings, sampling, measures, mitigation, utility = (
        instantiate(node)
        for node in (cfg.attack, cfg.sampling, cfg.metrics, cfg.mitigation, cfg.utility)
    )
    check_controls(pairs, settings, measures)
    model = instantiate(cfg.checkpoint)
    model.sampling_timesteps(sampling)  # refuses more steps than it has
    cut = check_prompt_lengths(
        pairs,
        model.token_count,
        model.embedding_shape[0],
        strict=cfg.task.strict_prompts,
        cut_off=model.cut_off,
    )
    pairs = [replace(pair, truncated=pair.id in cut) for pair in pairs]
    cache = Path(cfg.paths.cache)
    width = pairs_that_fit(
        model, noise_batch=settings.noise_batch, wanted=settings.pairs_per_forward
    )
    data = PairsDataModule(pairs, model, pairs_per_batch=width, cache=cache / "encoded")
    data.prepare()
    controls = control_prompts(pairs, data)
    budget = settings.budget.resolve(controls.embeddings)
    check_space(
        folder,
        audit_bytes(
            model,
            pairs,
            settings=settings,
            budget=budget,
            sampling=sampling,
            mitigated=not isinstance(mitigation, NoMitigation),
        ),
        mend="choose another disk with paths.output=FOLDER, or write less: fewer "
        "attack.snapshots or sampling.images_per_pair",
    )
    # all that can be mended was checked: from here on the folder belongs to these settings
    claim_folder(folder, method_of(plain(cfg)))
    originals = originals_of(pairs, model.resolution, measures)
    workshop = workshop_of(cfg, data=data, originals=originals, sampling=sampling, tracker=tracker)
    return Bench(
        folder=folder,
        cache=cache,
        seed=cfg.seed,
        pairs=Pairs(pairs, skipped=listed.skipped if isinstance(listed, Pairs) else ()),
        model=model,
        data=data,
        originals=originals,
        settings=settings,
        budget=budget,
        controls=controls,
        sampling=sampling,
        mitigation=mitigation,
        workshop=workshop,
        utility=utility,
        trainer=instantiate(cfg.trainer, default_root_dir=folder),
    )


def method_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """What decides the results of an audit, out of its resolved configuration.

    How much is measured of a mitigation's cost is not among it: that is measured anew each time.
    """
    # a folder made before there was the choice goes on where it is not made
    unset = () if cfg["attack"].get("early_stop") else ("early_stop",)
    return {
        "seed": cfg["seed"],
        "checkpoint": without(
            cfg["checkpoint"], "device", "channels_last", "gradient_checkpointing"
        ),
        "mitigation": cfg["mitigation"],
        "corpus": cfg["corpus"],
        "attack": without(cfg["attack"], "pairs_per_forward", *unset),
        "sampling": without(cfg["sampling"], "batch"),
        "pairs": without(cfg["pairs"], "cache"),
    }


def check_controls(pairs: Sequence[Pair], settings: AttackSettings, measures: Measures) -> None:
    """Refuse early what would fail for want of control pairs after hours of work.

    Raises:
        InputError: Says what needs them.
    """
    controls = sum(pair.kind == "control" for pair in pairs)
    if not controls and measures.descriptors[measures.decider].threshold is None:
        raise InputError(
            f"{measures.decider} has no threshold of its own, it is calibrated on control pairs, "
            f"and the list has none\n"
            f"  mend:  add pairs of kind control (pictures the checkpoint cannot hold, with their "
            f"prompts), or fix it with metrics.descriptors.{measures.decider}.threshold=NUMBER"
        )
    if "control_prompt" in settings.inits and controls < 2:
        raise InputError(
            f"attack.inits has control_prompt, but the list has {controls} control pairs\n"
            f"  mend:  add pairs of kind control, or drop control_prompt from attack.inits"
        )


def control_prompts(pairs: Sequence[Pair], data: PairsDataModule) -> ControlPrompts:
    """Where attacks from ``control_prompt`` begin: the prompts of all control pairs."""
    controls = [pair for pair in pairs if pair.kind == "control"]
    return ControlPrompts(
        tuple(pair.id for pair in controls),
        data.batch(controls).embeddings if controls else None,
    )
