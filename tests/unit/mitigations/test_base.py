import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from dori_lightning.mitigations.base import Context, edit_key, settings_fingerprint
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.mitigations.edits import Edit, MaskEdit, Origin
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import InputError, Pair
from support.context import FakeCorpus


@dataclass(frozen=True)
class Pruned:
    """Prunes a share of one layer and leaves a line in ``log`` each time it is asked to."""

    log: str
    name: str = "pruned"
    share: float = 0.5
    inner: NoMitigation | None = None
    delay: float = 0.0
    fails: bool = False

    def apply(self, model: Any, pairs: Sequence[Pair], context: Context) -> Edit:
        with Path(self.log).open("a") as file:
            file.write("made\n")
        time.sleep(self.delay)
        if self.fails:
            raise RuntimeError("power cut")
        model.unet_evaluations += 7
        mask = torch.arange(10) < 10 * self.share
        origin = Origin(
            model.fingerprint, notes={"pairs": len(pairs)}, cost={"unet_evaluations": 5.0}
        )
        return MaskEdit(origin, {"layer.weight": mask})


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


def made(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_a_second_find_reads_what_the_first_made(context, model, suspected, log):
    mitigation = Pruned(str(log))
    first = context.find(mitigation, model, suspected)
    second = context.find(mitigation, model, suspected)
    assert (first.made, second.made) == (True, False)
    assert made(log) == 1
    assert first.key == second.key
    assert first.path == second.path == context.folder / f"{first.key}.safetensors"
    assert first.edit.identity == second.edit.identity
    assert first.edit.origin == second.edit.origin


def test_an_edit_says_what_made_it_and_what_that_cost(context, model, suspected, log):
    context.find(Pruned(str(log), delay=0.02), model, suspected)
    origin = context.find(Pruned(str(log), delay=0.02), model, suspected).edit.origin
    assert origin is not None
    assert origin.mitigation == "pruned"
    assert origin.settings["kind"] == "Pruned"
    assert origin.settings["share"] == 0.5
    assert origin.notes == {"pairs": 2}
    assert origin.cost["seconds"] >= 0.02
    assert origin.cost["unet_evaluations"] == 5, "what the mitigation says itself stays"


def test_the_edit_that_changes_nothing_is_not_kept(context, model, suspected):
    found = context.find(NoMitigation(), model, suspected)
    assert found.path is None
    assert found.made
    assert not list(context.folder.glob("*.safetensors"))


def test_what_decides_an_edit_gives_it_another_key_and_nothing_else_does(
    model, suspected, context_of, tmp_path, monkeypatch
):
    base, plain = context_of(tmp_path), Pruned("log")
    key = edit_key(plain, model, suspected, base)
    first = suspected[0]
    keys = [
        key,
        edit_key(replace(plain, share=0.4), model, suspected, base),
        edit_key(replace(plain, inner=NoMitigation()), model, suspected, base),
        edit_key(plain, model, suspected[:1], base),
        edit_key(plain, model, (replace(first, prompt="a cat"), *suspected[1:]), base),
        edit_key(plain, model, (replace(first, sha256="0" * 64), *suspected[1:]), base),
        edit_key(plain, model, suspected, context_of(tmp_path, seed=1)),
        edit_key(plain, model, suspected, context_of(tmp_path, corpus=FakeCorpus("other"))),
        edit_key(plain, model, suspected, replace(base, sampling=Sampling("ddim", 3, 2.0, 2))),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(model, "fingerprint", "another")
        keys.append(edit_key(plain, model, suspected, base))
    with monkeypatch.context() as patch:
        patch.setattr(model, "latent_shape", (4, 8, 8))
        keys.append(edit_key(plain, model, suspected, base))
    assert len(set(keys)) == len(keys)

    same = [
        edit_key(replace(plain, name="other"), model, suspected, base),
        edit_key(plain, model, suspected, context_of(tmp_path / "elsewhere")),
        edit_key(plain, model, suspected, replace(base, sampling=replace(base.sampling, batch=1))),
    ]
    assert set(same) == {key}


def test_settings_are_plain_values_all_the_way_down(log):
    settings = settings_fingerprint(Pruned("x", inner=NoMitigation()))
    assert settings["inner"] == {"kind": "NoMitigation", "name": "none"}
    assert json.loads(json.dumps(settings)) == settings
    with pytest.raises(TypeError, match="plain values"):
        settings_fingerprint(Pruned(torch.ones(1)))


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda _: b"", lambda _: b"hello"])
def test_a_damaged_file_is_an_error_and_not_made_again_silently(
    context, model, suspected, log, damage
):
    path = context.find(Pruned(str(log)), model, suspected).path
    assert path is not None
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="damaged"):
        context.find(Pruned(str(log)), model, suspected)
    assert made(log) == 1
    path.unlink()
    assert context.find(Pruned(str(log)), model, suspected).made


def test_an_edit_of_another_checkpoint_under_this_key_is_refused(
    context, model, suspected, log, monkeypatch
):
    mitigation = Pruned(str(log))
    key = edit_key(mitigation, model, suspected, context)
    with monkeypatch.context() as patch:
        patch.setattr(model, "fingerprint", "another")
        path = context.find(mitigation, model, suspected).path
    assert path is not None
    path.rename(context.folder / f"{key}.safetensors")
    with pytest.raises(InputError, match=f"another.*{model.fingerprint}"):
        context.find(mitigation, model, suspected)


def test_a_mitigation_that_fails_leaves_nothing_and_lets_the_next_one_try(
    context, model, suspected, log
):
    broken = Pruned(str(log), fails=True)
    with pytest.raises(RuntimeError, match="power cut"):
        context.find(broken, model, suspected)
    left = [path for path in context.folder.iterdir() if path.suffix != ".lock"]
    assert not left
    key = edit_key(broken, model, suspected, context)
    with FileLock(context.folder / f"{key}.lock", timeout=0):
        pass  # Timeout here: the failure would have kept the lock


def test_two_jobs_that_ask_at_once_make_it_once(context, model, suspected, log):
    """Each job opens the lock's file by itself, so that threads exclude each other like jobs."""
    start = threading.Barrier(2)

    def job(_):
        start.wait()
        return context.find(Pruned(str(log), delay=0.3), model, suspected)

    with ThreadPoolExecutor(2) as jobs:
        found = list(jobs.map(job, range(2)))
    assert made(log) == 1
    assert sorted(result.made for result in found) == [False, True]
    assert len({result.edit.identity for result in found}) == 1
