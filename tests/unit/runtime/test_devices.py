import os
import subprocess
import sys
from pathlib import Path

import pytest

from dori_lightning.runtime import distributed
from dori_lightning.types import InputError

WORKER = """
import sys, time
from pathlib import Path
from dori_lightning.runtime.distributed import claim
print(claim(["0", "1"], Path(sys.argv[1])), flush=True)
time.sleep(120)
"""


def test_each_worker_has_a_device_of_its_own_until_it_ends(tmp_path: Path) -> None:
    root = str(Path(__file__).resolve().parents[3])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": root},
        )
        for _ in range(2)
    ]
    try:
        taken = [w.stdout.readline().strip() for w in workers if w.stdout is not None]
        assert sorted(taken) == ["0", "1"]
        with pytest.raises(InputError, match=r"hydra\.launcher\.n_jobs=2"):
            distributed.claim(["0", "1"], tmp_path)
        workers[0].kill()
        workers[0].wait()
        assert distributed.claim(["0", "1"], tmp_path) == taken[0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        for lock in distributed._claimed:
            lock.release()
        distributed._claimed.clear()


def test_a_worker_is_pinned_before_cuda_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(distributed, "_claimed", [])
    monkeypatch.setattr(distributed.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    distributed.pin()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    distributed.pin()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a", "a second job of the worker stays"
    for lock in distributed._claimed:
        lock.release()


def test_without_gpus_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_claimed", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    distributed.pin()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
