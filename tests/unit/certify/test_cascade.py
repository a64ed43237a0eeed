"""What a cascade counts, and what it does not."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dori_lightning.certify.base import AttackBase, Holds, Plan
from dori_lightning.certify.cascade import (
    Cascade,
    CertifySettings,
    Recorder,
    group_of,
    level_order,
    work_until_back,
)
from dori_lightning.mitigations.baselines import NoMitigation
from dori_lightning.models.protocol import Sampling
from dori_lightning.types import InputError, Pair

LEVELS = ("little", "more", "much")
PLAN = Plan(NoMitigation(), "sd", Sampling(steps=2, images_per_pair=2))


@dataclass(frozen=True)
class Scripted(AttackBase):
    """Each pair comes back at the level that it is told to; 10 rows each."""

    back: Mapping[str, str] = field(default_factory=dict)
    holds: Holds = "image"
    gradient_free: bool = False

    def rows(self, plan: Plan) -> int:
        return 10 * len(LEVELS)

    def run(self, subject: Any, pairs: Sequence[Pair], attempt: Any) -> None:
        subject.calls.append((self.name, subject.role, [pair.id for pair in pairs]))
        for level in LEVELS:
            left = attempt.left(level)
            images = {
                pair.id: torch.full((1, 3, 4, 4), float(self.comes_back(subject, pair) == level))
                for pair in left
            }
            if images:
                attempt.add(level, images, rows=10)

    def comes_back(self, subject: Any, pair: Pair) -> str | None:
        return self.back.get(f"{subject.role}/{pair.id}")


def subject(role: str, pairs: Sequence[Pair], calls: list[Any]) -> Any:
    """A model of which a white image is always a copy."""
    context = SimpleNamespace(
        pairs=pairs, seed=0, machine="cpu", model=SimpleNamespace(fingerprint="f"),
        sampling=PLAN.sampling,
    )  # fmt: skip
    return SimpleNamespace(
        role=role, context=context, edit=SimpleNamespace(identity=role), calls=calls,
        calibration=SimpleNamespace(descriptor="d"), carried=nullcontext,
        threshold=lambda pair: float("nan") if pair.id == "flat" else 0.5,
        closest=lambda pair, images: (float(images.mean()), 0),
    )  # fmt: skip


def pairs(kind: str, *names: str) -> list[Pair]:
    return [Pair(name, kind, name, Path(f"{name}.png")) for name in names]


SUSPECTS = pairs("vm", "s0", "s1", "s2", "flat")
CONTROLS = pairs("control", *(f"c{k}" for k in range(4)))


def cascade(tmp_path: Path, *attacks: Scripted, reference: bool = True, limit: float = 0.05):
    calls: list[Any] = []
    settings = CertifySettings(
        {a.name: a for a in attacks},
        max_false_positive=limit,
        paths=tuple(a.name for a in attacks),
    )
    made = Cascade(
        settings=settings,
        attacks=attacks,
        plan=PLAN,
        audited=subject("audited", SUSPECTS, calls),
        suspects=SUSPECTS,
        controls=CONTROLS,
        reference=subject("reference", SUSPECTS, calls) if reference else None,
        planted=subject("planted", pairs("vm", "p0", "p1"), calls),
        folder=tmp_path,
    )
    return made, calls


def test_a_level_at_which_controls_come_back_counts_for_nothing_and_is_not_tried(tmp_path):
    """From the first such level on: later ones are stronger."""
    back = {"audited/c1": "more", "audited/s0": "little", "audited/s1": "much"}
    made, _ = cascade(tmp_path, Scripted("one", back=back))
    (found,) = made.run()
    assert [level.sound for level in found.levels] == [True, False, False]
    assert found.last_sound == "little"
    assert found.convicted == ("s0",)
    tried = {one.pair: one.levels for one in found.of("suspects")}
    assert tried == {"s0": ("little",), "s1": ("little",), "s2": ("little",)}
    assert found.count("suspects") == (1, 3)  # the flat one cannot be told


class Timed(Scripted):
    """Asked how long images take."""

    timed = True


def test_how_long_images_take_is_asked_at_levels_that_do_not_count_too(tmp_path):
    back = {"audited/c1": "more", "audited/s0": "little", "audited/s1": "much"}
    made, _ = cascade(tmp_path, Timed("one", back=back))
    (found,) = made.run()
    assert [level.sound for level in found.levels] == [True, False, False]
    assert found.convicted == ("s0",)
    assert {one.pair: one.level for one in found.of("suspects")} == {
        "s0": "little", "s1": "much", "s2": "",
    }  # fmt: skip
    assert {one.levels for one in found.of("reference")} == {LEVELS}


def test_a_share_of_controls_up_to_the_limit_leaves_a_level_sound(tmp_path):
    made, _ = cascade(tmp_path, Scripted("one", back={"audited/c1": "more"}), limit=0.25)
    (found,) = made.run()
    assert all(level.sound for level in found.levels)
    assert [level.back["controls"] for level in found.levels] == [0, 1, 1]


@pytest.mark.parametrize(("there", "convicted"), [("little", ()), ("more", ()), ("much", ("s0",))])
def test_an_image_that_the_reference_draws_at_no_later_a_level_is_painted(
    tmp_path, there, convicted
):
    back = {"audited/s0": "more", "reference/s0": there}
    made, _ = cascade(tmp_path, Scripted("one", back=back), limit=0.5)
    (found,) = made.run()
    assert found.convicted == convicted
    assert found.painted == (() if convicted else ("s0",))


def test_only_suspects_that_are_left_go_on_and_the_others_go_through_everything(tmp_path):
    made, calls = cascade(
        tmp_path, Scripted("one", back={"audited/s0": "little"}), Scripted("two")
    )
    made.run()
    seen = {(name, role, tuple(ids)) for name, role, ids in calls}
    for name in ("one", "two"):
        assert (name, "audited", ("c0", "c1", "c2", "c3")) in seen
        assert (name, "reference", ("s0", "s1", "s2")) in seen
        assert (name, "planted", ("p0", "p1")) in seen
    assert ("one", "audited", ("s0", "s1", "s2")) in seen
    assert ("two", "audited", ("s1", "s2")) in seen


def test_work_is_summed_over_attacks_until_an_image_comes_back(tmp_path):
    one = Scripted("one", back={"audited/s0": "more", "audited/c0": "much"})
    two = Scripted("two", back={"audited/s1": "more"})
    made, _ = cascade(tmp_path, one, two)
    found = made.run()
    # at "much" a control is back, so suspects are tried twice there and three times in "two"
    assert work_until_back(found, "suspects") == {
        "s0": (20, True), "s1": (40, True), "s2": (50, False),
    }  # fmt: skip
    works = work_until_back(found, "controls")
    assert works == {"c0": (30, True), **dict.fromkeys(("c1", "c2", "c3"), (60, False))}


def test_a_search_looks_again_for_what_embeddings_from_elsewhere_bring_back(tmp_path):
    """Where it does not find it, its gradients are masked."""
    back = {"audited/s0": "little", "audited/s1": "little"}
    transfer = Scripted("transfer", back=back, holds="embedding", gradient_free=True)
    search = Scripted("dori", back={"audited/s1": "more"}, holds="embedding")
    made, calls = cascade(tmp_path, transfer, search)
    found = made.run()
    assert ("dori", "audited", ["s2", "s0", "s1"]) in calls
    assert [own.transfers for own in found] == [True, False]
    # they came back once, and with the work until then
    assert work_until_back(found, "suspects")["s1"] == (10, True)


def test_what_an_interrupted_cascade_has_finished_is_read(tmp_path):
    attack = Scripted("one", back={"audited/s0": "more"})
    first, _ = cascade(tmp_path, attack)
    again, calls = cascade(tmp_path, attack)
    assert first.run() == again.run()
    assert calls == []
    other, calls = cascade(tmp_path, Scripted("one", back={"audited/s0": "much"}))
    other.run()
    assert calls  # other settings


def test_the_closest_image_is_kept(tmp_path):
    made, _ = cascade(tmp_path, Scripted("one", back={"audited/s0": "more"}))
    (found,) = made.run()
    own = next(one for one in found.of("suspects") if one.pair == "s0")
    assert (tmp_path / own.image).is_file()
    assert own.similarities == (0.0, 1.0)
    assert (own.level, own.work, own.best) == ("more", 20, 1.0)


def test_levels_are_put_in_the_order_in_which_they_were_tried():
    assert level_order([("a", "b"), ("a", "c"), ("a", "b", "d"), ()]) == ["a", "c", "b", "d"]


def test_images_belong_to_one_group_each(tmp_path):
    made, _ = cascade(tmp_path, Scripted("one"))
    (found,) = made.run()
    assert {group_of(one) for one in found.tried} == {
        "suspects", "controls", "reference", "planted",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (("one", "one"), "twice"),
        (("other",), "no attack other"),
        ((), "empty"),
    ],
)
def test_paths_that_name_no_cascade_are_refused(paths, words):
    with pytest.raises(InputError, match=words):
        CertifySettings({"one": Scripted("one")}, paths=paths)


@dataclass(frozen=True)
class Nowhere(Scripted):
    def check(self, plan: Plan) -> None:
        raise InputError("it means nothing here", fix="leave it out")


def test_attacks_that_mean_nothing_are_left_out_of_the_protocol_and_refused_by_name():
    attacks = {"one": Scripted("one"), "two": Nowhere("two"), "three": Scripted("three")}
    chosen = CertifySettings(attacks, protocol=("one", "two", "three")).choose(PLAN)
    assert [attack.name for attack in chosen.attacks] == ["one", "three"]
    assert chosen.left_out == {"two": "it means nothing here"}
    with pytest.raises(InputError, match="means nothing here"):
        CertifySettings(attacks, paths=("two",)).choose(PLAN)


def test_the_note_of_the_closest_image_is_kept(tmp_path):
    own = subject("audited", SUSPECTS, [])
    recorder = Recorder(
        own, Scripted("words"), SUSPECTS[:1], closed=frozenset(), folder=tmp_path,
        advance=lambda _: None,
    )  # fmt: skip
    for level, value, note in zip(LEVELS, (0.2, 0.4, 0.3), ("far", "near", "later"), strict=True):
        image = torch.full((1, 3, 4, 4), value)
        recorder.add(level, {"s0": image}, rows=1, notes={"s0": note})
    assert recorder.tried["s0"].note == "near"
