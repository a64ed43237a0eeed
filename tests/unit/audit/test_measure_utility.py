import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from dori_lightning.audit.utility import (
    LossExamples,
    corpus_id,
    generate_shares,
    measure_utility,
    near_prompts,
    write_utility,
)
from dori_lightning.metrics.utility import Utility, UtilitySettings
from dori_lightning.mitigations.edits import (
    Edit,
    EmptyEdit,
    MaskEdit,
    Origin,
    PairMaskEdit,
    WeightEdit,
    owner_of,
)
from dori_lightning.models.stable_diffusion import StableDiffusion
from dori_lightning.pairs.corpus import CaptionCorpus, Corpus, Examples, NoCorpus, Split
from dori_lightning.runtime import distributed
from dori_lightning.types import Calibration, InputError, Pair
from support.context import FakeCorpus, make_audit_context
from support.tiny import tiny_model, tiny_recipe

SMALL = UtilitySettings(examples=5, draws=2, prompts=5, neighbours=1)
LOSSES = replace(SMALL, prompts=0, neighbours=0)
VALUE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    return tiny_model(tmp_path_factory.mktemp("tiny"), replace(tiny_recipe(), resolution=16))


@dataclass(frozen=True)
class EvaluationOnly:
    """A corpus whose calibration split may not be touched."""

    identity: str = "evaluation only"

    @property
    def held(self) -> FakeCorpus:
        return FakeCorpus(evaluation=True)

    def prompts(self, split: Split, count: int) -> tuple[str, ...]:
        assert split == "evaluation"
        return self.held.prompts(split, count)

    def examples(self, split: Split, count: int, resolution: int, **some: Any) -> Examples:
        assert split == "evaluation"
        return self.held.examples(split, count, resolution, **some)


def measured(
    model: StableDiffusion,
    folder: Path,
    edit: Edit,
    *,
    settings: UtilitySettings = SMALL,
    corpus: Corpus | None = None,
    seed: int = 0,
    run: str = "run",
) -> Utility:
    context = make_audit_context(
        folder, model, run=run, corpus=corpus or EvaluationOnly(), utility=settings, seed=seed
    )
    calibration = Calibration("local_correlation", 0.5, "fixed", (), (), math.nan, ())
    utility = measure_utility(context, edit, calibration)
    assert utility is not None
    write_utility(utility, context.folder)
    return utility


def nothing(model: StableDiffusion) -> MaskEdit:
    """An edit that is applied and changes no weight."""
    weight = model.denoiser().get_parameter(VALUE)
    return MaskEdit(Origin(model.fingerprint), {VALUE: torch.zeros(len(weight), dtype=torch.bool)})


def damage(model: StableDiffusion) -> WeightEdit:
    name = "conv_out.weight"
    weight = model.denoiser().get_parameter(name).detach()
    return WeightEdit(Origin(model.fingerprint), {name: 10 * weight})


@dataclass(frozen=True)
class Runs:
    """Jobs of one sweep, and how many UNet evaluations each of them took."""

    folder: Path
    untouched: Utility
    damaged: Utility
    again: Utility
    costs: tuple[int, ...]


@pytest.fixture(scope="module")
def runs(model: StableDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("sweep")
    found, costs = [], []
    for edit, run in ((nothing(model), "a"), (damage(model), "b"), (damage(model), "b")):
        start = model.unet_evaluations
        found.append(measured(model, folder, edit, run=run))
        costs.append(model.unet_evaluations - start)
    return Runs(folder, *found, tuple(costs))


def test_an_edit_that_changes_nothing_costs_exactly_nothing(runs: Runs) -> None:
    found = runs.untouched
    assert found.denoising_loss is not None
    assert found.denoising_loss.ratio == 1.0
    assert found.denoising_loss.ratio_ci95 == (1.0, 1.0)
    assert all(row.unmitigated == row.mitigated > 0 for row in found.loss_rows)
    assert found.ordinary is not None
    assert found.ordinary.kid is not None
    assert (found.ordinary.kid.mean, found.ordinary.kid.std) == (0.0, 0.0)
    assert found.replicas is not None
    assert found.replicas.unmitigated == found.replicas.mitigated
    for row in found.picture_rows:
        assert row.original_unmitigated == row.original_mitigated
        assert _pixels(row.unmitigated) == _pixels(row.mitigated)


def _pixels(path: Path) -> bytes:
    with Image.open(path) as file:
        return file.convert("RGB").tobytes()


def test_a_damaged_model_costs(runs: Runs) -> None:
    found = runs.damaged
    assert found.denoising_loss is not None
    assert found.denoising_loss.ratio_ci95[0] > 1.1
    assert found.ordinary is not None
    assert found.ordinary.kid is not None
    assert found.ordinary.kid.mean > 0
    assert found.ordinary.similarity < 0.9


def test_the_model_is_as_before(model: StableDiffusion, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in model.denoiser().state_dict().items()}
    measured(model, tmp_path, damage(model), settings=LOSSES)
    after = model.denoiser().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_rows_see_the_masks_of_the_edited_pairs_in_turn(
    model: StableDiffusion, tmp_path: Path
) -> None:
    weight = model.denoiser().get_parameter(VALUE)
    every, none = (torch.full((len(weight),), full) for full in (True, False))
    masks = {"pair0": {VALUE: every}, "pair1": {VALUE: none}}
    settings = replace(SMALL, examples=12, prompts=0)
    edit = PairMaskEdit(Origin(model.fingerprint), masks)
    found = measured(model, tmp_path, edit, settings=settings)
    touched = {row.id: abs(row.mitigated - row.unmitigated) > 1e-6 for row in found.loss_rows}
    owners = {name: owner_of(name, ("pair0", "pair1")) for name in touched}
    assert touched == {name: owner == "pair0" for name, owner in owners.items()}
    assert set(owners.values()) == {"pair0", "pair1"}
    same = {row.id: _pixels(row.unmitigated) == _pixels(row.mitigated) for row in
            found.picture_rows if row.kind == "neighbour"}  # fmt: skip
    assert same == {"pair0_near0": False, "pair1_near0": True}


def test_the_unmitigated_model_is_measured_once_for_all_edits(runs: Runs) -> None:
    # 5 x 2 losses in a pass of 16, then 5 and 2 pictures in passes of 16 x 2 steps, guided
    whole = 16 + 2 * 16 * 2 * 2
    assert runs.costs == (2 * whole, whole, 16), "the run folder's pictures are kept as well"
    for row in runs.damaged.picture_rows:
        assert row.unmitigated.is_relative_to(runs.folder / "cache")
        assert row.mitigated.is_relative_to(runs.folder / "b" / "pictures" / "utility")


def test_a_damaged_cache_is_computed_again_and_said(
    model: StableDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = measured(model, tmp_path, damage(model), settings=LOSSES)
    (kept,) = (tmp_path / "cache").rglob("losses-*.safetensors")
    kept.write_bytes(kept.read_bytes()[:40])
    again = measured(model, tmp_path, damage(model), settings=LOSSES)
    assert again.denoising_loss == first.denoising_loss
    assert "is damaged" in caplog.text


def test_it_is_the_same_again_and_another_under_another_seed(
    model: StableDiffusion, runs: Runs
) -> None:
    assert runs.again == runs.damaged
    other = measured(model, runs.folder, damage(model), settings=LOSSES, seed=1, run="c")
    assert [row.timestep for row in other.loss_rows] != [
        row.timestep for row in runs.damaged.loss_rows
    ]


def test_draws_cover_the_schedule_and_depend_on_names_alone() -> None:
    examples = LossExamples(("a", "b"), torch.zeros(2, 8, 12), torch.zeros(2, 4, 3, 3), 4, 0)
    steps = [examples.draw(1, r, 1000)[1] for r in range(4)]
    assert [step // 250 for step in steps] == [0, 1, 2, 3]
    longer = replace(examples, prompts=("a", "b", "c"))
    assert torch.equal(examples.draw(1, 2, 1000)[0], longer.draw(1, 2, 1000)[0])
    assert not torch.equal(examples.draw(0, 2, 1000)[0], examples.draw(1, 2, 1000)[0])
    assert corpus_id(7) == "corpus_0007"


def test_without_a_corpus_neighbours_are_still_measured(
    model: StableDiffusion, runs: Runs
) -> None:
    found = measured(model, runs.folder, damage(model), corpus=NoCorpus(), run="d")
    assert found.denoising_loss is None
    assert found.ordinary is None
    assert "corpus is none" in found.left_out["denoising_loss"]
    assert "corpus is none" in found.left_out["ordinary"]
    assert found.neighbours is not None
    assert found.neighbours.kid is None, "two pairs are too few groups"
    assert "independent" in found.left_out["neighbours.kid"]
    assert "80 pictures" in found.left_out["neighbours.fid"]
    assert "CLIP" in found.left_out["neighbours.alignment"]


def test_captions_alone_leave_out_the_loss_only(model: StableDiffusion, tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(f"a red cat {k}" for k in range(60)))
    found = measured(
        model,
        tmp_path,
        damage(model),
        corpus=CaptionCorpus(path),
        settings=replace(SMALL, neighbours=0),
    )
    assert "has captions only" in found.left_out["denoising_loss"]
    assert found.ordinary is not None
    assert found.ordinary.prompts == 5


def test_zeros_leave_out_and_say_so(model: StableDiffusion, tmp_path: Path) -> None:
    settings = UtilitySettings(examples=0, prompts=0, neighbours=1)
    found = measured(model, tmp_path, damage(model), settings=settings)
    assert found.left_out["denoising_loss"] == "not asked for (utility.examples=0)"
    assert found.left_out["ordinary"] == "not asked for (utility.prompts=0)"
    assert found.loss_rows == ()
    assert {row.kind for row in found.picture_rows} == {"neighbour"}


def test_nothing_is_measured_without_an_edit_or_without_a_measure(
    model: StableDiffusion, tmp_path: Path
) -> None:
    calibration = Calibration("local_correlation", 0.5, "fixed", (), (), math.nan, ())
    context = make_audit_context(tmp_path, model, utility=SMALL)
    assert measure_utility(context, EmptyEdit(), calibration) is None
    nothing_asked = UtilitySettings(examples=0, prompts=0, neighbours=0)
    context = make_audit_context(tmp_path, model, utility=nothing_asked)
    assert measure_utility(context, damage(model), calibration) is None


def test_the_files_hold_every_number(runs: Runs) -> None:
    found, folder = runs.damaged, runs.folder / "b"
    assert found.denoising_loss is not None
    document = json.loads((folder / "utility.json").read_text())
    assert document["denoising_loss"]["ratio"] == found.denoising_loss.ratio
    losses = pd.read_parquet(folder / "utility_losses.parquet")
    assert len(losses) == 5 * 2
    ratio = losses["mitigated"].mean() / losses["unmitigated"].mean()
    assert ratio == pytest.approx(document["denoising_loss"]["ratio"])
    pictures = pd.read_parquet(folder / "utility_pictures.parquet")
    assert pictures.groupby("kind").size().to_dict() == {"ordinary": 5, "neighbour": 2}
    assert all((folder / place).is_file() for place in pictures["unmitigated"])
    assert all((folder / place).is_file() for place in pictures["mitigated"])


def test_an_edit_for_another_checkpoint_is_refused(model: StableDiffusion, tmp_path: Path) -> None:
    other = MaskEdit(Origin("0" * 16), nothing(model).masks)
    with pytest.raises(InputError, match="fingerprint"):
        measured(model, tmp_path, other, settings=LOSSES)


def pair(name: str, prompt: str, subject: str | None = None) -> Pair:
    return Pair(name, "vm", prompt, Path(f"{name}.png"), subject=subject)


def test_pairs_that_share_a_neighbour_prompt_are_one_group() -> None:
    pairs = [
        pair("a", "red boat at sea"),
        pair("b", "red boat at sea"),
        pair("c", "blue house on a hill"),
    ]
    prompts, lacking = near_prompts(pairs, 4)
    assert not lacking
    groups = {item.owner: item.group for item in prompts}
    texts = {name: {item.text for item in prompts if item.owner == name} for name in "abc"}
    assert texts["a"] & texts["b"], "otherwise this test shows nothing"
    assert groups["a"] == groups["b"] != groups["c"]


def test_a_pair_without_enough_neighbours_is_left_out_by_name() -> None:
    prompts, lacking = near_prompts([pair("a", "red boat at sea"), pair("b", "boat")], 30)
    assert "b" in lacking
    assert {item.owner for item in prompts} <= {"a"}


def test_processes_share_the_images_of_both_models(
    model: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_audit_context(tmp_path, model, corpus=EvaluationOnly(), utility=SMALL)
    edit, shares = damage(model), []
    for rank in range(2):
        before = len(list(tmp_path.rglob("*.png")))
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            patch.setattr(distributed, "world_size", lambda: 2)
            for waits in ("barrier", "check"):
                patch.setattr(distributed, waits, lambda: None)
            generate_shares(context, edit)
        shares.append(len(list(tmp_path.rglob("*.png"))) - before)
    decoded = model.coder_rows.decoded
    measured(model, tmp_path, edit)
    assert model.coder_rows.decoded == decoded, "nothing is left to be drawn"
    assert min(shares) > 0


def test_features_of_the_unmitigated_images_are_kept(
    model: StableDiffusion, tmp_path: Path
) -> None:
    edit, drawn = damage(model), SMALL.prompts * SMALL.pictures
    only = replace(SMALL, examples=0, neighbours=0)
    measured(model, tmp_path, edit, settings=only, run="first")
    encoded = model.coder_rows.encoded
    again = measured(model, tmp_path, edit, settings=only, run="second")
    assert model.coder_rows.encoded - encoded == drawn, "the mitigated model's alone"
    (file, *_) = tmp_path.rglob("features-autoencoder.safetensors")
    file.write_bytes(b"")
    assert measured(model, tmp_path, edit, settings=only, run="third").ordinary == again.ordinary
