import pytest
import torch

from dori_lightning.attacks.embedding_attack import RESULT
from dori_lightning.attacks.solver import AttackResult, OptimizerState
from dori_lightning.runtime.cache import Cache


def result(*, on_its_way: bool = False) -> AttackResult:
    state = OptimizerState(*(torch.randn(1, 3, 4) for _ in range(3)), torch.ones(1).double())
    return AttackResult(
        ("a",),
        torch.randn(1, 2, 3, 4),
        (1, 5),
        torch.rand(1, 5),
        torch.tensor([False]),
        torch.tensor([True]),
        state if on_its_way else None,
    )


@pytest.mark.parametrize("on_its_way", [True, False])
def test_what_is_written_comes_back(tmp_path, on_its_way):
    store, made = Cache(tmp_path), result(on_its_way=on_its_way)
    assert store.read("prompt/a.r1", {"seed": 0}, RESULT) is None
    path = store.write("prompt/a.r1", made, {"seed": 0}, RESULT)
    assert path == tmp_path / "prompt" / "a.r1.safetensors"
    found = store.read("prompt/a.r1", {"seed": 0}, RESULT)
    assert found is not None
    assert (found.snapshots, found.steps) == ((1, 5), 5)
    assert torch.equal(found.embeddings, made.embeddings)
    assert torch.equal(found.losses, made.losses)
    assert (found.diverged.tolist(), found.no_gradient.tolist()) == ([False], [True])
    assert (found.state is not None) == on_its_way
    if found.state is not None and made.state is not None:
        assert all(torch.equal(v, getattr(made.state, k)) for k, v in vars(found.state).items())


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda _: b"", lambda _: b"hello"])
def test_a_damaged_file_is_computed_anew(tmp_path, damage, caplog):
    path = Cache(tmp_path).write("a", result(), {"seed": 0}, RESULT)
    path.write_bytes(damage(path.read_bytes()))
    assert Cache(tmp_path).read("a", {"seed": 0}, RESULT) is None
    assert "damaged" in caplog.text
