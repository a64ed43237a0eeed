from dataclasses import replace

from dori_lightning.attacks.budget import AttackSettings, BudgetSettings
from dori_lightning.bench.attack import Subject
from dori_lightning.bench.parts import (
    finetuning_rows,
    nemo_rows,
    sampling_rows,
    scaling_rows,
    wanda_rows,
)
from dori_lightning.bench.report import BenchSettings
from dori_lightning.mitigations.adversarial_finetuning import AdversarialFinetuning, PoolSettings
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.mitigations.nemo_criteria import ROWS, DenoisingLoss
from dori_lightning.mitigations.nemo_search import Levels
from dori_lightning.mitigations.replacements import SurrogateSettings
from dori_lightning.mitigations.wanda import Wanda
from dori_lightning.models.memory import PARALLEL_PAIRS
from dori_lightning.models.protocol import Sampling

SMALL = BenchSettings(
    repeats=1, pairs=3, noise_batch=1, quality_pairs=0, sampling_pairs=2, nemo_pairs=2,
    wanda_pairs=2, finetuning_pairs=2, finetuning_updates=2, scaling_pairs=(1, 10),
    scaling_budgets=(1, 4), scaling_steps=4, scaling_repeats=1,
)  # fmt: skip


def test_drawing_in_batches_gives_the_same_pictures_in_fewer_passes(subject: Subject) -> None:
    other = replace(subject.sampling, steps=1)
    fair, ours, short = sampling_rows(subject, SMALL, {"one step": other})
    steps, pictures, pairs = subject.sampling.steps, subject.sampling.images_per_pair, 2
    assert fair.samples == steps * 2 * pictures * pairs
    assert fair.values["unet_passes"] == fair.samples, "each half of the guidance by itself"
    assert ours.values["unet_passes"] == steps
    assert short.values["unet_passes"] == 1
    assert ours.values["furthest_pixel"] < 0.005
    assert fair.values["decoded"] == pictures * pairs
    assert short.values["mcnemar_p"] == 1
    assert {row.values["memorization"]["n"] for row in (fair, ours, short)} == {2}


def test_nemo_finds_the_same_neurons_in_fewer_passes(subject: Subject) -> None:
    method = NeMo(
        criterion=DenoisingLoss(suppressed_share=0.1),
        samples=2,
        statistics_prompts=4,
        levels=Levels(start_z=1.0, z_step=0.5, min_z=0.0),
    )
    alone, ours = nemo_rows(subject, SMALL, method)
    assert alone.values["same_neurons"]
    assert alone.values["unet_passes"] > ours.values["unet_passes"] > 0
    assert ours.samples == ROWS * ours.values["unet_passes"]


def test_wanda_takes_all_pairs_together(subject: Subject) -> None:
    alone, ours = wanda_rows(subject, SMALL, Wanda(fraction=0.1, steps=2))
    assert ours.values["weights_differ"] == alone.values["weights_differ"] < 0.01
    # one at a time the empty prompt is looked at again for each pair
    assert alone.samples > ours.samples > 0


def test_an_epoch_is_its_search_and_its_updates(subject: Subject) -> None:
    method = AdversarialFinetuning(
        name="paper",
        surrogates=SurrogateSettings(source=None, per_pair=1),
        pool=PoolSettings(
            AttackSettings(inits=("prompt",), budget=BudgetSettings(steps=2), noise_batch=1)
        ),
        finetune=FinetuneSettings(lr=1e-4),
        epochs=5,
        updates=7,
        adversarial_batch=2,
        ordinary_batch=3,
        ordinary_examples=6,
    )
    before = [p.clone() for p in subject.model.parameters()]
    (row,) = finetuning_rows(subject, SMALL, {"paper": method})
    assert all((a == b).all() for a, b in zip(before, subject.model.parameters(), strict=True))
    # two pairs fill a pass
    assert row.values["search_evaluations"] == 2 * PARALLEL_PAIRS
    assert row.values["update_evaluations"] == 7 * 5
    assert row.samples == 2 * PARALLEL_PAIRS + 7 * 5
    assert row.values["updates_timed"] == 2
    assert row.seconds[0] > row.values["search_seconds"] > 0
    assert row.seconds[0] == row.values["search_seconds"] + 7 * row.values["seconds_per_update"]


def test_budgets_are_read_off_one_attack_and_pairs_add_up(subject: Subject) -> None:
    rows = {row.name: row for row in scaling_rows(subject, SMALL)}
    assert list(rows) == ["1 budget", "4 budgets", "1 pairs", "10 pairs"]
    assert rows["1 budget"].samples == rows["4 budgets"].samples == 8 * 4
    assert rows["1 pairs"].samples == PARALLEL_PAIRS * 1
    assert rows["10 pairs"].samples == 3 * PARALLEL_PAIRS * 1
    assert rows["10 pairs"].pairs == 10


def test_a_sampler_by_name_is_held_against_the_audits_own(subject: Subject) -> None:
    named = Sampling("ddim", subject.sampling.steps, subject.sampling.guidance, 2)
    row = sampling_rows(subject, SMALL, {"the same": named})[2]
    assert (row.values["gained"], row.values["lost"]) == (0, 0)
