import json
import logging
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from dori_lightning.runtime.batching import fixed_batches
from dori_lightning.runtime.cache import JSON, TENSORS, Cache

KEY = {"checkpoint": "abc", "steps": 50, "guidance": 7.5}


def test_what_was_computed_once_is_read_again(tmp_path):
    cache, calls = Cache(tmp_path), []

    def compute():
        calls.append(1)
        return {"x": torch.arange(3.0)}

    first = cache.get("part/a", KEY, compute, TENSORS)
    again = cache.get("part/a", KEY, compute, TENSORS)
    assert len(calls) == 1
    assert torch.equal(first["x"], again["x"])
    assert cache.path("part/a").is_file()


def test_what_another_process_computes_is_left_for_last_and_then_read(tmp_path):
    cache, made, reused = Cache(tmp_path), [], []
    lock = FileLock(tmp_path / "a.safetensors.lock")
    lock.acquire()

    def compute(name):
        made.append(name)
        if name == "c":  # by then the other one is done
            cache.write("a", {"x": torch.zeros(1)}, KEY, TENSORS)
            lock.release()
        return {"x": torch.ones(1)}

    found = cache.share(dict.fromkeys("abc", KEY), compute, TENSORS, found=reused.append)
    assert (list(found), made, reused) == (["a", "b", "c"], ["b", "c"], ["a"])
    assert found["a"]["x"].tolist() == [0]
    assert cache.share(dict.fromkeys("ab", KEY), compute, TENSORS).keys() == {"a", "b"}
    assert made == ["b", "c"]


def test_another_key_is_computed_anew_and_named(tmp_path, caplog):
    cache = Cache(tmp_path)
    cache.write("a", {"mean": 1.0}, KEY, JSON)
    assert cache.read("a", KEY, JSON) == {"mean": 1.0}
    with caplog.at_level(logging.WARNING):
        assert cache.get("a", {**KEY, "steps": 10}, lambda: {"mean": 2.0}, JSON) == {"mean": 2.0}
    assert "steps" in caplog.text
    assert cache.read("a", {**KEY, "steps": 10}, JSON) == {"mean": 2.0}


@pytest.mark.parametrize("codec", [TENSORS, JSON])
@pytest.mark.parametrize("data", [b"", b"garbage", b"[]", b'{"value": 1}', b"\xff\xfe"])
def test_a_damaged_file_is_computed_anew(tmp_path, codec, data):
    cache, value = Cache(tmp_path), {"x": torch.ones(2)} if codec is TENSORS else {"x": 1}
    cache.path("a", codec).write_bytes(data)
    assert cache.read("a", KEY, codec) is None
    cache.get("a", KEY, lambda: value, codec)
    assert cache.read("a", KEY, codec) is not None


def test_values_of_other_types_get_a_codec_by_two_functions(tmp_path):
    paths = JSON.mapped(str, Path)
    cache = Cache(tmp_path)
    cache.write("where", Path("x/y"), KEY, paths)
    assert cache.read("where", KEY, paths) == Path("x/y")
    assert json.loads((tmp_path / "where.json").read_text())["key"]["guidance"] == "7.5"


@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_batches_have_one_size_and_lose_nothing(count):
    batches = list(fixed_batches(range(count), 4))
    assert [k for batch, valid in batches for k in batch[:valid]] == list(range(count))
    assert all(len(batch) == 4 for batch, _ in batches)
