"""A context over a tiny model: what a mitigation is given, made in a second."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from dori_lightning.attacks.budget import AttackSettings
from dori_lightning.attacks.embedding_attack import ControlPrompts
from dori_lightning.audit.context import AuditContext
from dori_lightning.metrics.calibration import Measures, ReferenceImages
from dori_lightning.metrics.descriptors import LocalCorrelation, NormalizedCorrelation
from dori_lightning.metrics.evidence import EvidenceSettings
from dori_lightning.metrics.utility import UtilitySettings
from dori_lightning.mitigations.base import Context
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.models.protocol import Sampling
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.pairs.corpus import Examples, Split
from dori_lightning.pairs.datamodule import PairsDataModule
from dori_lightning.pairs.readers import FolderPairs
from dori_lightning.pairs.validation import image_tensor, square_image
from dori_lightning.runtime.seeding import keyed_generator
from dori_lightning.types import Pair, Pairs
from support.runs import write_pairs
from support.tiny import WORDS


@dataclass(frozen=True)
class FakeCorpus:
    """Random words of the tiny vocabulary with random images; evaluation may be forbidden."""

    identity: str = "fake"
    evaluation: bool = False

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        if split == "evaluation" and not self.evaluation:
            pytest.fail("a mitigation reads the evaluation split")
        found = []
        for k in range(count):
            generator = keyed_generator("fake corpus", self.identity, split, k)
            words = torch.randint(0, len(WORDS), (4,), generator=generator).tolist()
            found.append(" ".join(WORDS[word] for word in words))
        return tuple(found)

    def examples(
        self, split: Split, count: int, resolution: int, *, only: Sequence[int] | None = None
    ) -> Examples:
        prompts = self.prompts(split, count)
        generator = keyed_generator("fake pictures", self.identity, split)
        # low frequencies, so that they are images rather than noise
        coarse = torch.rand(count, 3, 4, 4, generator=generator)
        images = torch.nn.functional.interpolate(coarse, size=resolution, mode="bilinear")
        places = range(count) if only is None else only
        chosen = [images[place] for place in places]
        return Examples.of([prompts[place] for place in places], chosen, resolution)


def write_captions(path: Path) -> Path:
    """Sixty captions of the tiny vocabulary, a line each."""
    path.write_text("\n".join(FakeCorpus().prompts("calibration", 60)), encoding="utf-8")
    return path


def read_pairs(folder: Path, *, vm: int = 2, control: int = 3) -> tuple[Pair, ...]:
    """Pairs of scenes below ``folder``, written there unless they are there already."""
    place = folder / "pairs"
    if not place.is_dir():
        write_pairs(place, vm=vm, control=control)
    return tuple(FolderPairs(path=place).read())


def quiet_trainer(**settings: Any) -> L.Trainer:
    """A Trainer on one CPU that logs and shows nothing."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{**quiet, **settings})


def make_context(
    tmp_path: Path,
    model: StableDiffusion,
    pairs: Sequence[Pair] | None = None,
    *,
    seed: int = 0,
    corpus: FakeCorpus | None = None,
    sampling: Sampling | None = None,
    measures: Measures | None = None,
) -> Context:
    """A context over ``pairs`` (those of ``read_pairs``), with its edits below ``tmp_path``."""
    pairs = read_pairs(tmp_path) if pairs is None else tuple(pairs)
    images = [image_tensor(square_image(pair.image), model.resolution) for pair in pairs]
    measures = measures or Measures(
        {
            "local_correlation": LocalCorrelation(threshold=0.5),
            "normalized_correlation": NormalizedCorrelation(threshold=0.5),
        },
        "local_correlation",
    )

    return Context(
        seed=seed,
        corpus=corpus or FakeCorpus(),
        data=PairsDataModule(pairs, model),
        references=ReferenceImages(pairs, torch.stack(images), measures),
        sampling=sampling or Sampling("ddim", 2, 2.0, 2),
        trainer=quiet_trainer,
        folder=tmp_path / "edits",
    )


def make_audit_context(
    tmp_path: Path, model: StableDiffusion, *, run: str = "run", **fields: Any
) -> AuditContext:
    """An audit of the pairs below ``tmp_path``; ``fields`` replace those of the context."""
    given = make_context(tmp_path, model)
    settings = AttackSettings()
    context = AuditContext(
        folder=tmp_path / run,
        cache=tmp_path / "cache",
        seed=given.seed,
        pairs=Pairs(given.data.pairs),
        model=model,
        data=given.data,
        references=given.references,
        corpus=given.corpus,
        sampling=given.sampling,
        attack=settings,
        budget=settings.budget,
        control_prompts=ControlPrompts((), None),
        mitigation=NoMitigation(),
        utility=UtilitySettings(),
        evidence=EvidenceSettings(),
        make_trainer=quiet_trainer,
    )
    return replace(context, **fields)
