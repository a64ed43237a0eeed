from dori_lightning.attacks.budget import AttackSettings, BudgetSettings
from dori_lightning.bench.measure import BenchSettings
from dori_lightning.bench.parts import finetuning_family, mask_family, nemo_family, sampling_family
from dori_lightning.mitigations.adversarial_finetuning import AdversarialFinetuning, PoolSettings
from dori_lightning.mitigations.finetuning import FinetuneSettings
from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.mitigations.nemo_criteria import Replication
from dori_lightning.mitigations.nemo_search import Levels
from dori_lightning.mitigations.replacements import SurrogateSettings
from dori_lightning.mitigations.wanda import Wanda

SMALL = BenchSettings(
    repeats=1, sampling_pairs=2, nemo_pairs=2, finetuning_pairs=2,
    finetuning_updates=2,
)  # fmt: skip


def test_generating_in_batches_gives_the_same_images_in_fewer_passes(bench):
    fair, ours = sampling_family(bench, SMALL).rows
    sampling = bench.context.sampling
    assert fair.samples == fair.passes == 2 * sampling.steps * sampling.images_per_pair * 2
    assert ours.passes == sampling.steps
    assert ours.values["furthest_pixel"] < 0.005


def test_nemo_finds_the_same_neurons_for_all_pairs_together(bench):
    method = NeMo(
        criterion=Replication(limit=0.01),
        samples=1,
        statistics_prompts=4,
        levels=Levels(start_z=1.0, z_step=1.0, min_z=0.0),
        refine=False,
    )
    alone, ours = nemo_family(bench, SMALL, method).rows
    assert ours.values["pairs_with_equal_masks"] == 2
    assert alone.passes > ours.passes > 0


def test_wanda_takes_all_pairs_together(bench):
    method = Wanda(fraction=0.1, steps=2)
    alone, ours = mask_family("wanda", bench, method, pairs=2, repeats=1).rows
    assert ours.values["pairs"] == 2
    # one at a time the empty prompt is looked at again for each pair
    assert alone.samples > ours.samples > 0


def test_finetuning_searches_once_and_leaves_the_model_as_it_was(bench):
    method = AdversarialFinetuning(
        name="cheap",
        surrogates=SurrogateSettings(source=None, per_pair=1, candidates=1, max_similarity=0.99),
        pool=PoolSettings(
            AttackSettings(inits=("prompt",), budget=BudgetSettings(steps=2), noise_batch=1)
        ),
        finetune=FinetuneSettings(lr=1e-4),
        epochs=5,
        updates=7,
        adversarial_batch=2,
        ordinary_batch=3,
    )
    before = [p.clone() for p in bench.model.parameters()]
    (row,) = finetuning_family(bench, SMALL, method).rows
    assert all((a == b).all() for a, b in zip(before, bench.model.parameters(), strict=True))
    assert row.samples >= 2 * 2 + 2 * (2 + 3), "two steps of the search and two updates"
    assert "2 of 7 updates" in row.what
