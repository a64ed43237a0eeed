import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dori_lightning.certify.cascade import AttackFindings, Tried
from dori_lightning.certify.relearning import Relearning, level_of, relearning_ratio
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.models.latent_diffusion import LatentDiffusion
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import InputError
from support.attempts import Kept, make_subject, plan_of
from support.families import load_family
from support.unchanged import unchanged


def losses(subject, pairs) -> torch.Tensor:
    """Mean denoising losses of images under their prompts."""
    latents, model = subject.latents(pairs), subject.model
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, *latents.shape, generator=generator)
    times = torch.randint(model.num_train_timesteps, (64, 1), generator=generator)
    prompts = torch.stack([*subject.prompts(pairs).values()])
    with torch.no_grad():
        return torch.stack(
            [
                model.denoising_loss(latents, own, at.expand(len(pairs)), prompts)
                for own, at in zip(noise, times, strict=True)
            ]
        ).mean(0)


def test_it_trains_on_the_images_level_by_level_and_leaves_nothing(
    tmp_path: Path, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(tmp_path, model)
    pairs = subject.context.pairs[:1]
    attack = Relearning(steps=(1, 3), lr=3e-3, samples=8, company=1)
    attempt, trained = Kept(pairs), []
    draw = type(subject).draw

    def look(self, embeddings, **more):
        trained.append(losses(self, pairs))
        return draw(self, embeddings, **more)

    monkeypatch.setattr(type(subject), "draw", look)
    before = losses(subject, pairs)
    with unchanged(model):
        attack.run(subject, pairs, attempt)
    assert list(attempt.images) == ["after 1 steps", "after 3 steps"]
    assert trained[1] < trained[0] < before
    assert attempt.images["after 1 steps"]["pair0"].shape == (4, 3, 32, 32)
    left = [path for path in (tmp_path / "cache" / "edits").rglob("*") if path.is_file()]
    assert {path.suffix for path in left} <= {".lock"}
    assert attempt.rows == {"pair0": attack.rows(plan_of(NoMitigation()))}


def test_rows_are_those_that_were_taken(tmp_path: Path, model: LatentDiffusion) -> None:
    subject = make_subject(tmp_path, model)
    pairs = subject.context.pairs[:4]  # their images fill a batch
    attempt, before = Kept(pairs), model.unet_evaluations
    Relearning(steps=(1, 2), samples=1, company=4).run(subject, pairs, attempt)
    assert sum(attempt.rows.values()) == model.unet_evaluations - before


def test_it_ends_where_nobody_is_left(tmp_path: Path, model: LatentDiffusion) -> None:
    subject = make_subject(tmp_path, model)
    pairs = subject.context.pairs[:1]
    attempt = Kept(pairs, back={level_of(1): ["pair0"]})
    before = model.unet_evaluations
    Relearning(steps=(1, 500), samples=1, company=1).run(subject, pairs, attempt)
    assert list(attempt.images) == [level_of(1)]
    assert model.unet_evaluations - before < 500


@pytest.mark.parametrize("prompts", ["own", "exchanged"])
def test_small_groups_are_filled_with_controls(
    prompts: Any, tmp_path: Path, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = make_subject(tmp_path, model)
    suspect, *others = subject.context.pairs
    attack, seen = Relearning(steps=(1,), samples=2, company=3, prompts=prompts), []
    loss = model.denoising_loss

    def denoising_loss(latents, noise, timesteps, embeddings, *, pair_ids=None):
        seen.append((pair_ids, embeddings))
        return loss(latents, noise, timesteps, embeddings, pair_ids=pair_ids)

    monkeypatch.setattr(model, "denoising_loss", denoising_loss)
    attack.run(subject, [suspect], attempt := Kept([suspect]))
    controls = [pair for pair in others if pair.kind == "control"][:2]
    company = [suspect, *controls]
    ((ids, embeddings),) = seen
    assert ids == [pair.id for pair in company] * 2
    known = subject.prompts(company)
    under = company if prompts == "own" else [*controls, suspect]
    assert all(
        torch.equal(row, known[pair.id]) for row, pair in zip(embeddings, under, strict=False)
    )
    assert set(attempt.images[level_of(1)]) == {suspect.id}


def test_on_flow_matching(tmp_path: Path) -> None:
    flow = load_family("sd3")
    sampling = Sampling("flow_euler", 2, 1.0, images_per_pair=1)
    subject = make_subject(tmp_path, flow, sampling=sampling)
    pairs = subject.context.pairs[:1]
    with unchanged(flow):
        Relearning(steps=(1,), samples=2, company=1).run(subject, pairs, attempt := Kept(pairs))
    assert set(attempt.images) == {level_of(1)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": []},
        {"steps": [20, 10]},
        {"steps": [0, 10]},
        {"lr": 0.0},
        {"samples": 0},
        {"prompts": "mixed"},
        {"prompts": "exchanged", "company": 1},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Relearning(**wrong)


def findings(**groups: list[int | None]) -> AttackFindings:
    """Steps until a copy by group; None for images that are none after 80."""
    steps = (10, 20, 40, 80)
    tried = []
    for group, own in groups.items():
        for place, back in enumerate(own):
            upto = [count for count in steps if back is None or count <= back]
            tried.append(
                Tried(
                    f"{group}{place}",
                    "control" if group == "controls" else "vm",
                    "reference" if group == "reference" else "audited",
                    "relearning",
                    levels=tuple(map(level_of, upto)),
                    back_at=None if back is None else len(upto) - 1,
                )
            )
    return AttackFindings("relearning", "weights", (), tuple(tried), (), ())


def test_the_ratio_is_one_of_medians_where_both_are_known() -> None:
    found = findings(suspects=[10, 20, 20, 40], controls=[40, 40, 80, None])
    ratio = relearning_ratio(found, "controls")
    assert (ratio.measure, ratio.suspects, ratio.others) == ("median", 20, 40)
    assert ratio.ratio == 0.5
    assert math.isnan(relearning_ratio(found, "reference").ratio)


def test_where_half_are_censored_it_is_one_of_means_up_to_the_last_step() -> None:
    found = findings(suspects=[40, 40], reference=[80, None, None, None])
    ratio = relearning_ratio(found, "reference")
    # all suspects are back at 40, of the others most are not at 80
    assert (ratio.measure, ratio.horizon) == ("restricted mean", 80)
    assert ratio.ratio == 40 / 80
    found = findings(suspects=[20, 20, 40, None], reference=[40, None, None, None])
    ratio = relearning_ratio(found, "reference")
    assert ratio.horizon == 80
    assert ratio.suspects == (20 + 20 + 40 + 80) / 4
    assert ratio.others == (40 + 80 + 80 + 80) / 4
