import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dori_lightning.mitigations.edits import (
    Edit,
    EmptyEdit,
    MaskEdit,
    Origin,
    PairMaskEdit,
    WeightEdit,
    read_edit,
    write_edit,
)
from dori_lightning.types import InputError

ORIGIN = Origin(
    "0123456789abcdef",
    mitigation="nemo",
    settings={"kind": "Nemo", "threshold": 0.4, "layers": ["down", "mid"], "inner": {"k": None}},
    cost={"unet_evaluations": 12, "seconds": 3.5},
    notes={"boat": {"neurons": 3}},
)
ROWS = {"a.weight": torch.tensor([True, False, True]), "b.weight": torch.tensor([False] * 5)}
SINGLES = {"a.weight": torch.rand(4, 6, 1, 3, generator=torch.Generator().manual_seed(0)) < 0.3}

EDITS: dict[str, Callable[[], Edit]] = {
    "rows": lambda: MaskEdit(ORIGIN, ROWS),
    "weights": lambda: MaskEdit(ORIGIN, SINGLES),
    "of each pair": lambda: PairMaskEdit(
        ORIGIN, {"boat": {**SINGLES, "c.weight": ROWS["a.weight"]}, "a.b-c_1": ROWS, "idle": {}}
    ),
    "trained": lambda: WeightEdit(
        ORIGIN,
        {
            "a.weight": torch.randn(3, 4),
            "half": torch.randn(5).half(),
            "brain": torch.randn(2, 2).bfloat16(),
            "single": torch.tensor(2.5),
            "turned": torch.randn(4, 3).t(),
        },
    ),
}


@pytest.fixture(params=EDITS)
def edit(request: pytest.FixtureRequest) -> Edit:
    return EDITS[request.param]()


def test_what_is_written_comes_back_with_its_identity_and_origin(
    tmp_path: Path, edit: Edit
) -> None:
    path = write_edit(tmp_path / "below" / "edit.safetensors", edit)
    again = read_edit(path)
    assert type(again) is type(edit)
    assert again.identity == edit.identity
    assert again.origin == ORIGIN
    assert again.counts() == edit.counts()
    written, read = edit.tensors(), again.tensors()
    assert written.keys() == read.keys()
    for name, value in written.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    assert again.pairs == edit.pairs, "pairs without a mask too, in their order"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_masks_take_the_place_of_what_is_pruned_only(tmp_path: Path) -> None:
    mask = torch.zeros(1000, 1000, dtype=torch.bool)
    mask[3, 4] = True
    path = write_edit(tmp_path / "edit.safetensors", MaskEdit(ORIGIN, {"w": mask}))
    assert path.stat().st_size < 2000


def test_an_edit_that_changes_nothing_has_nothing_to_write(tmp_path: Path, edit: Edit) -> None:
    assert edit.kind
    assert not EmptyEdit().kind
    with pytest.raises(TypeError, match="nothing to write"):
        write_edit(tmp_path / "edit.safetensors", EmptyEdit())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_cut_file_is_refused_by_its_path(tmp_path: Path, edit: Edit, share: float) -> None:
    path = write_edit(tmp_path / "edit.safetensors", edit)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(path)


def test_a_changed_byte_among_the_tensors_is_noticed(tmp_path: Path, edit: Edit) -> None:
    path = write_edit(tmp_path / "edit.safetensors", edit)
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for place in {header, (header + len(data)) // 2, len(data) - 1}:
        damaged = bytearray(data)
        damaged[place] ^= 0x41
        path.write_bytes(bytes(damaged))
        refused(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the edit .*nothing\.safetensors: No such"):
        read_edit(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match="cannot read the edit"):
        read_edit(tmp_path)


def test_foreign_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "edit.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    assert "does not say of which edit" in refused(path)
    save_file({"weight": torch.ones(3)}, path, metadata={"format": "pt"})
    assert "does not say of which edit" in refused(path)


def test_a_pickle_is_refused_and_not_loaded(tmp_path: Path) -> None:
    path, mark = tmp_path / "edit.safetensors", tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (mark,))

    path.write_bytes(pickle.dumps(Evil()))
    refused(path)
    torch.save({"weight": Evil()}, path)
    refused(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil()))
    assert mark.exists(), "it would have been"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layout", "2"),
        ("kind", "program"),
        ("identity", "0" * 24),
        ("origin", "{"),
        ("origin", "[]"),
        ("origin", json.dumps({"fingerprint": "another"})),
        ("origin", json.dumps({"fingerprint": "0123456789abcdef", "unknown": 1})),
        ("shapes", "{}"),
        ("shapes", "[]"),
        ("shapes", json.dumps({"a.weight": [1], "b.weight": [5]})),
        ("shapes", json.dumps({"a.weight": [3, 2**40], "b.weight": [5]})),
        ("shapes", json.dumps({"a.weight": ["x"], "b.weight": [5]})),
        ("pairs", "7"),
    ],
)
def test_a_note_that_does_not_fit_is_refused(tmp_path: Path, key: str, value: str) -> None:
    path = write_edit(tmp_path / "edit.safetensors", EDITS["rows"]())
    if key == "pairs":
        write_edit(path, EDITS["of each pair"]())
    with safe_open(path, framework="pt") as file:
        note = file.metadata()
    assert key in note
    save_file(load_file(path), path, metadata={**note, key: value})
    refused(path)


def test_a_missing_part_of_the_note_is_refused(tmp_path: Path) -> None:
    path = write_edit(tmp_path / "edit.safetensors", EDITS["of each pair"]())
    with safe_open(path, framework="pt") as file:
        note = file.metadata()
    for key in note:
        save_file(load_file(path), path, metadata={k: v for k, v in note.items() if k != key})
        refused(path)


def refused(path: Path) -> str:
    with pytest.raises(InputError, match="no edit of this program, or damaged") as caught:
        read_edit(path)
    assert str(path) in str(caught.value)
    return str(caught.value)
