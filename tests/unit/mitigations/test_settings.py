"""Settings outside their range are refused, by their names, before anything is computed."""

from dataclasses import replace
from typing import Any

import pytest

from dori_lightning.mitigations.concept_ablation import ConceptAblation
from dori_lightning.mitigations.esd import ESD
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.mitigations.nemo_criteria import NoiseDifference, Replication
from dori_lightning.mitigations.nemo_search import Levels
from dori_lightning.mitigations.prompt_adjustment import AdjustmentSettings, PromptAdjustment
from dori_lightning.mitigations.replacements import AnchorSettings
from dori_lightning.mitigations.siss import SISS
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.types import InputError
from support.distributed_fits import METHODS

ADVERSARIAL: Any = METHODS["adversarial"]
HALF = FinetuneSettings(precision="16-mixed")
NAN = float("nan")


def each(settings: Any, **wrong: Any) -> list[Any]:
    """One case for every wrong value."""
    kind = type(settings).__name__
    return [
        pytest.param(settings, name, value, id=f"{kind}.{name}={value}")
        for name, value in wrong.items()
    ]


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        *each(AnchorSettings(), prompts=0, images=0, ordinary=0, max_similarity=1.0),
        *each(AnchorSettings(), anchor_rate=0.7),
        *each(AnchorSettings(), anchor_rate=-0.1),
        *each(FinetuneSettings(), lr=0.0, clip=0.0, weight_decay=-1.0, warmup=-1),
        *each(FinetuneSettings(), checkpoint_every=0),
        *each(ADVERSARIAL, epochs=0, adversarial_weight=0.0, low_rank=0),
        *each(ConceptAblation("ablation"), steps=0, batch=0, prior_weight=-1.0),
        *each(ESD("esd"), variant="y", steps=0, batch=0, eta=0.0),
        *each(ESD("esd"), sampling_steps=0),
        *each(SISS("siss"), steps=0),
        *each(SISS("siss"), batch=0, micro_batch=0, mixture=0.0, scaling_norm=-1.0, finetune=HALF),
        *each(SISS("siss"), mixture=1.0),
        *each(PromptAdjustment(), target=-1.0, quantile=1.5, calibration_prompts=0),
        *each(PromptAdjustment(), target=NAN),
        *each(AdjustmentSettings(), lr=0.0, iterations=0, weight_decay=-1.0),
        *each(NeMo(), scope="all", stages=[], samples=1, statistics_prompts=1, refine_group=0),
        *each(NeMo(), stages=["side"], criterion="replication"),
        *each(NeMo(criterion=Replication()), samples=0),
        *each(Levels(), start_z=0.0, z_step=0.0, k_step=-1),
        *each(NoiseDifference(), threshold=1.0, threshold_prompts=1, timestep=50),
        *each(Replication(), limit=1.0),
        *each(Wanda(), fraction=0.0, steps=0),
        *each(Wanda(), scope="everybody", stages=[]),
        *each(Wanda(), fraction=1.0, stages=["middle"]),
    ],
)
def test_a_setting_outside_its_range_is_refused_by_its_name(settings, name, value):
    # the name comes before what was got, which shows all settings
    with pytest.raises(InputError, match=rf"(?s)^mitigation.*\b{name}\b.*(got|for SISS)"):
        replace(settings, **{name: value})
