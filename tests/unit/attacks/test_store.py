from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dori_lightning.attacks.solver import AttackResult
from dori_lightning.attacks.store import AttackStore
from dori_lightning.runtime.artifacts import write_atomically


def result() -> AttackResult:
    return AttackResult(
        ("a", "b"),
        1,
        torch.randn(2, 2, 3, 4),
        (1, 5),
        torch.rand(2, 5),
        torch.tensor([False, True]),
        torch.tensor([True, False]),
    )


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    store, made = AttackStore(tmp_path, {"seed": "0"}), result()
    store.write(made, "prompt", {"a": "x", "b": "y"})
    found = store.read("b", "prompt", 1, "y")
    assert found is not None
    assert torch.equal(found.embeddings[0], made.embeddings[1])
    assert torch.equal(found.losses[0], made.losses[1])
    assert found.snapshots == (1, 5)
    assert found.diverged.tolist() == [True]
    assert found.no_gradient.tolist() == [False]
    assert store.read("a", "random", 1, "x") is None


def test_another_method_or_input_does_not_count_as_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    AttackStore(tmp_path, {"seed": "0"}).write(result(), "prompt", {"a": "x", "b": "y"})
    assert AttackStore(tmp_path, {"seed": "1"}).read("a", "prompt", 1, "x") is None
    assert "another seed" in caplog.text
    assert AttackStore(tmp_path, {"seed": "0"}).read("a", "prompt", 1, "z") is None
    assert "another inputs" in caplog.text


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda _: b"", lambda _: b"hello"])
def test_a_damaged_file_is_computed_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    store = AttackStore(tmp_path, {"seed": "0"})
    store.write(result(), "prompt", {"a": "x", "b": "y"})
    path = store.path("a", "prompt", 1)
    path.write_bytes(damage(path.read_bytes()))
    assert store.read("a", "prompt", 1, "x") is None
    assert "damaged" in caplog.text


def test_a_failed_write_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
