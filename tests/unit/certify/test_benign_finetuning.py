from pathlib import Path
from typing import Any

import pytest

from dori_lightning.certify.benign_finetuning import BenignFinetuning
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.types import InputError
from support.attempts import Kept, make_subject, plan_of
from support.context import FakeCorpus
from support.edits import value_masks
from support.unchanged import unchanged

ATTACK = BenignFinetuning(steps=(1, 2), samples=2, images=3, search=1)


def subject_of(tmp_path: Path, model, edit=None):
    return make_subject(tmp_path, model, edit, corpus=FakeCorpus(evaluation=True))


def test_one_training_on_ordinary_images_serves_all_groups(tmp_path, model, monkeypatch) -> None:
    subject, trained = subject_of(tmp_path, model, value_masks(model)), []
    loss = model.denoising_loss

    def denoising_loss(latents, *given, pair_ids=None, **more):
        if str(pair_ids[0]).startswith("ordinary"):
            trained.extend(pair_ids)
        return loss(latents, *given, pair_ids=pair_ids, **more)

    monkeypatch.setattr(model, "denoising_loss", denoising_loss)
    one, other = subject.context.pairs[:2]
    with unchanged(model):
        ATTACK.run(subject, [one], attempt := Kept([one]))
    assert list(attempt.images) == [
        "1 ordinary steps, then its prompt",
        "2 ordinary steps, then its prompt",
        "2 ordinary steps, then 1 steps from prompt",
    ]
    assert trained == ["ordinary0", "ordinary1", "ordinary2", "ordinary0"]
    ATTACK.run(subject, [other], Kept([other]))
    assert len(trained) == 4
    assert attempt.rows == {one.id: ATTACK.rows(plan_of(NoMitigation()))}


def test_it_ends_where_nobody_is_left(tmp_path, model) -> None:
    subject = subject_of(tmp_path, model)
    pairs = subject.context.pairs[:1]
    attempt = Kept(pairs, back={"1 ordinary steps, then its prompt": [pairs[0].id]})
    ATTACK.run(subject, pairs, attempt)
    assert len(attempt.images) == 1
    assert len([*(tmp_path / "cache" / "edits").glob("*.safetensors")]) == 1


@pytest.mark.parametrize("wrong", [{"steps": []}, {"steps": [9, 3]}, {"lr": 0.0}, {"images": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        BenignFinetuning(**wrong)
