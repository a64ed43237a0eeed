"""Altered copies of suspects as controls."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dori_lightning.metrics.evidence import EvidenceSettings
from dori_lightning.pairs.copies import (
    ALTER,
    alterations,
    altered_copies,
    check_evidence,
    counted_with_copies,
    learned_alterations,
    relative_detail,
)
from dori_lightning.types import InputError, Kind, Pair


def pair(folder: Path, name: str, kind: Kind = "vm") -> Pair:
    path = folder / f"{name}.png"
    pixels = np.random.default_rng(len(name)).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return Pair(name, kind, f"the {name}", path, repeats=3.0, sha256=f"hash-of-{name}")


@pytest.mark.parametrize(
    ("setting", "controls", "expected"),
    [
        ("auto", 19, ("mirrored", "turned")),
        ("auto", 20, ()),
        ([], 0, ()),
        (["shifted", "mirrored"], 99, ("mirrored", "shifted")),
        ("turned", 0, ("turned",)),
    ],
)
def test_copies_are_made_where_a_list_has_few_controls(
    setting: str | list[str], controls: int, expected: tuple[str, ...]
) -> None:
    assert alterations(setting, controls=controls) == expected


def test_copies_count_as_controls_for_the_error_rate_that_is_asked_for(tmp_path: Path) -> None:
    suspects = [pair(tmp_path, f"cat{k}") for k in range(10)]
    asked = EvidenceSettings(0.05)
    assert counted_with_copies({"vm": 10}, "auto") == {"vm": 10, "control": 20}
    check_evidence(suspects, "auto", asked, reference=False)
    with pytest.raises(InputError, match=r"needs at least 19 .* this audit has 10"):
        check_evidence(suspects, ["mirrored"], asked, reference=False)


@pytest.mark.parametrize("setting", ["flipped", ["mirrored", "mirrored"], ["mirrored", "auto"]])
def test_an_unknown_alteration_is_refused(setting: str | list[str]) -> None:
    with pytest.raises(InputError, match=r"pairs\.self_controls must be auto or some of mirrored"):
        alterations(setting, controls=0)


def test_a_copy_is_a_control_with_the_suspects_prompt(tmp_path: Path) -> None:
    suspect, control = pair(tmp_path, "cat"), pair(tmp_path, "horse", "control")
    (made,) = altered_copies([suspect, control], ["mirrored"], tmp_path / "copies")
    assert (made.id, made.kind, made.copy_of) == ("cat.mirrored", "control", "cat")
    assert (made.prompt, made.repeats) == (suspect.prompt, 0.0)
    original, copy = (np.asarray(Image.open(p.image)) for p in (suspect, made))
    assert np.array_equal(copy, original[:, ::-1])
    again = altered_copies([suspect], ["mirrored"], tmp_path / "copies")
    assert again == (made,)


@pytest.mark.parametrize("kind", ALTER)
def test_an_alteration_keeps_every_pixel_and_moves_it(kind: str, tmp_path: Path) -> None:
    image = Image.open(pair(tmp_path, "cat").image)
    altered = ALTER[kind](image)  # type: ignore[index]
    before, after = np.asarray(image), np.asarray(altered)
    assert (before != after).mean() > 0.9
    assert sorted(before.ravel()) == sorted(after.ravel())


def test_a_listed_pair_of_a_copys_name_is_refused(tmp_path: Path) -> None:
    pairs = [pair(tmp_path, "cat"), pair(tmp_path, "cat.mirrored", "control")]
    with pytest.raises(InputError, match=r"cat.mirrored is both"):
        altered_copies(pairs, ["mirrored"], tmp_path)


@pytest.mark.parametrize(
    ("mirrored", "turned", "learned"),
    [(3, 0, ("mirrored",)), (2, 0, ()), (4, 1, ("mirrored",)), (4, 2, ()), (0, 5, ("turned",))],
)
def test_copies_that_the_model_was_trained_on_are_told_by_the_other_alteration(
    tmp_path: Path, mirrored: int, turned: int, learned: tuple[str, ...]
) -> None:
    suspects = [pair(tmp_path, f"cat{k}") for k in range(6)]
    copies = altered_copies(suspects, ("mirrored", "turned"), tmp_path / "copies")
    back = {f"cat{k}.mirrored" for k in range(mirrored)} | {
        f"cat{k}.turned" for k in range(turned)
    }
    assert learned_alterations(copies, back) == learned
    # one alteration alone has nothing to be told by
    assert learned_alterations([p for p in copies if p.id.endswith("mirrored")], back) == ()


def test_flat_controls_have_less_detail_than_what_they_stand_for(tmp_path: Path) -> None:
    suspects = [pair(tmp_path, name) for name in ("cat", "horse")]
    flat = Image.new("RGB", (8, 8), (200, 10, 10))
    flat.paste((10, 10, 200), (4, 0, 8, 8))
    flat.save(tmp_path / "flat.png")
    control = Pair("flat", "control", "red and blue", tmp_path / "flat.png", sha256="flat")
    assert relative_detail([*suspects, control]) < 0.5
    assert relative_detail([*suspects, pair(tmp_path, "tiger", "control")]) > 0.5
    assert np.isnan(relative_detail(suspects))
