"""Embeddings that were found on another model."""

import json
from dataclasses import replace

import pytest
import torch

from dori_lightning.attacks.budget import AttackSettings, BudgetSettings
from dori_lightning.attacks.embedding_attack import RESULT, Job
from dori_lightning.attacks.solver import AttackResult
from dori_lightning.certify.base import Subject
from dori_lightning.certify.embeddings import search
from dori_lightning.certify.transfer import Transfer
from dori_lightning.mitigations.base import settings_fingerprint
from dori_lightning.mitigations.edits import EmptyEdit, MaskEdit, Origin
from dori_lightning.mitigations.nemo import NeMo
from dori_lightning.models.protocol import Sampling
from dori_lightning.runtime.cache import Cache
from dori_lightning.types import InputError
from support.attempts import attacked, make_subject, plan_of
from support.context import make_audit_context
from support.families import load_family
from support.tiny import load_tiny, tiny_model, write_tiny

SAMPLING = Sampling("ddim", 2, 2.0, images_per_pair=8)
SEARCH = AttackSettings(
    inits=("random",), noise_batch=2, budget=BudgetSettings(steps=2), own_units=False
)
ATTACK = Transfer(search=SEARCH, steps=3)
FIRST, SECOND = (
    "found elsewhere from random",
    "3 steps from what was found elsewhere from random",
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """A tiny model under an edit that zeroes half of its text values."""
    place = tmp_path_factory.mktemp("transfer")
    model = tiny_model(place / "checkpoint")
    masks = {
        f"{name}.weight": torch.arange(layer.weight.shape[0]) % 2 == 0
        for name, layer in model.layers("text.value").items()
    }
    edit = MaskEdit(Origin(model.fingerprint), masks)
    return make_subject(place, model, edit=edit, sampling=SAMPLING)


def test_what_the_unmitigated_model_gives_is_drawn_from_the_mitigated_one(subject):
    pairs = subject.context.pairs[:2]
    attempt = attacked(ATTACK, subject, pairs)
    assert attempt.levels == [FIRST, SECOND]
    assert attempt.total == 2 * ATTACK.rows(plan_of(sampling=SAMPLING)) == 2 * (32 + 3 * 2 + 32)
    start = {
        pair.id: subject.context.attack_context("none").initial(Job(pair, "random", 0))
        for pair in pairs
    }
    before = search(subject.with_edit(EmptyEdit()), SEARCH, pairs, "random", 0, initial=start)
    found = {name: result.embeddings[0, -1] for name, result in before.items()}
    on = replace(SEARCH, budget=BudgetSettings(steps=3))
    with subject.carried():
        images = subject.draw(found)
        ends = search(subject, on, pairs, "random", 0, initial=found)
        further = subject.draw({name: result.embeddings[0, -1] for name, result in ends.items()})
    for pair in pairs:
        assert not torch.equal(found[pair.id], start[pair.id])
        assert torch.equal(attempt.images[FIRST][pair.id], images[pair.id])
        assert torch.equal(attempt.images[SECOND][pair.id], further[pair.id])
    unedited = subject.with_edit(EmptyEdit()).draw(found)
    assert not torch.equal(unedited[pairs[0].id], images[pairs[0].id])


def test_rows_and_a_search_that_is_kept_for_other_jobs(subject):
    model, pairs = subject.model, subject.context.pairs[:2]
    drawn = replace(ATTACK, steps=0)
    first = attacked(drawn, subject, pairs)
    before = model.unet_evaluations
    again = attacked(drawn, subject, pairs)
    # sixteen images are a full batch, so that no row is padding
    assert (
        again.total
        == model.unet_evaluations - before
        == 2 * drawn.rows(plan_of(sampling=SAMPLING))
    )
    assert again.total == first.total == 2 * 8 * 2 * 2
    assert all(torch.equal(first.images[FIRST][p.id], again.images[FIRST][p.id]) for p in pairs)


def test_nobody_left_is_nobody_drawn(subject):
    pairs = subject.context.pairs[:2]
    attempt = attacked(ATTACK, subject, pairs, back=lambda level, pair: True)
    assert attempt.levels == [FIRST]


def test_the_reference_draws_what_was_found_on_the_audited_model(subject, tmp_path):
    other = load_tiny(str(write_tiny(tmp_path / "twin", seed=1)))
    there = make_audit_context(tmp_path, other, sampling=SAMPLING)
    reference = Subject("reference", there, EmptyEdit(), subject.calibration, subject)
    pairs = subject.context.pairs[:1]
    assert ATTACK.applies(reference)
    assert not ATTACK.applies(replace(reference, audited=None))
    assert not ATTACK.applies(replace(subject, role="planted"))
    own = attacked(replace(ATTACK, steps=0), subject, pairs)
    found = attacked(replace(ATTACK, steps=0), reference, pairs)
    assert not torch.equal(found.images[FIRST][pairs[0].id], own.images[FIRST][pairs[0].id])
    # other parts of conditioning: its embeddings mean nothing there
    flow = make_subject(tmp_path / "flow", load_family("sd3"))
    assert not ATTACK.applies(replace(flow, role="reference", audited=subject))


def write_audit(folder, pairs, shape, *, starts=("prompt",)):
    """What an audit leaves of its attack: records with made-up embeddings."""
    hashes = {pair.id: pair.sha256 for pair in pairs}
    folder.mkdir()
    record = {"provenance": {"image_hashes": hashes}}
    (folder / "report.json").write_text(json.dumps(record), encoding="utf-8")
    for init in starts:
        for place, pair in enumerate(pairs):
            embeddings = torch.stack([torch.zeros(shape), torch.full(shape, 0.1 * place)])
            result = AttackResult(
                ids=(pair.id,),
                embeddings=embeddings[None],
                snapshots=(0, 1),
                losses=torch.zeros(1, 1),
                diverged=torch.tensor([False]),
                no_gradient=torch.tensor([False]),
            )
            Cache(folder / "attacks").write(f"{init}/{pair.id}.r0", result, {"any": "key"}, RESULT)
    return folder


def test_embeddings_of_another_audit(subject, tmp_path):
    pairs = subject.context.pairs
    folder = write_audit(tmp_path / "audit", pairs, subject.model.embedding_shape)
    attack = replace(ATTACK, source=str(folder), steps=0)
    attack.check(plan_of(sampling=SAMPLING))
    attempt = attacked(attack, subject, pairs[1:2])
    assert attempt.levels == ["found elsewhere from prompt"]
    with subject.carried():
        own = {pairs[1].id: torch.full(subject.model.embedding_shape, 0.1)}
        images = subject.draw(own)
    assert torch.equal(attempt.images[attempt.levels[0]][pairs[1].id], images[pairs[1].id])
    before = settings_fingerprint(attack)
    (folder / f"attacks/prompt/{pairs[0].id}.r0.safetensors").write_bytes(b"another")
    assert settings_fingerprint(attack) != before


def test_starts_without_controls_are_left_out_and_other_audits_refused(subject, tmp_path):
    pairs, shape = subject.context.pairs, subject.model.embedding_shape
    folder = write_audit(tmp_path / "audit", pairs, shape, starts=("prompt", "random"))
    attack = replace(ATTACK, source=str(folder), steps=0)
    (folder / f"attacks/prompt/{pairs[-1].id}.r0.safetensors").unlink()
    assert attacked(attack, subject, pairs[:1]).levels == [FIRST]
    (folder / f"attacks/random/{pairs[-1].id}.r0.safetensors").unlink()
    with pytest.raises(InputError, match="no start on all of these pairs"):
        attacked(attack, subject, pairs[:1])
    renamed = [replace(pair, id="other") for pair in pairs[:1]]
    strange = write_audit(tmp_path / "strange", renamed, shape)
    with pytest.raises(InputError, match="not an audit of these images"):
        attacked(replace(attack, source=str(strange)), subject, pairs[:1])
    wide = write_audit(tmp_path / "wide", pairs, (shape[0], shape[1] + 1))
    with pytest.raises(InputError, match="another shape"):
        attacked(replace(attack, source=str(wide)), subject, pairs[:1])


def test_no_source_is_refused_before_anything_is_loaded(tmp_path):
    plan = plan_of(sampling=SAMPLING)
    with pytest.raises(InputError, match="has no source"):
        ATTACK.check(plan)
    ATTACK.check(plan_of(NeMo(), sampling=SAMPLING))
    with pytest.raises(InputError, match="not the run folder of a finished audit"):
        replace(ATTACK, source=str(tmp_path / "nothing")).check(plan)
    empty = write_audit(tmp_path / "empty", (), (1, 1), starts=())
    with pytest.raises(InputError, match="holds no embeddings"):
        replace(ATTACK, source=str(empty)).check(plan)
    with pytest.raises(InputError, match="takes no -1 steps"):
        Transfer(steps=-1)
