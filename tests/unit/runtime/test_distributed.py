"""Two processes: what one gives, whoever starts them, and all leave together."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch

from dori_lightning.mitigations.edits import WeightEdit, read_edit
from dori_lightning.runtime import distributed
from dori_lightning.runtime.checkpoints import checkpoint_step, last_checkpoint
from dori_lightning.types import InputError
from support.context import read_pairs
from support.distributed_fits import LR, fit
from support.processes import ROOT, python
from support.tiny import write_tiny

pytestmark = pytest.mark.enable_socket

WORKER = """
import sys, time
from pathlib import Path
from dori_lightning.runtime.distributed import claim
print(claim(["0", "1"], Path(sys.argv[1])), flush=True)
time.sleep(120)
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_tiny(folder / "checkpoint")
    read_pairs(folder)
    return folder


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def two_processes(*arguments, seconds=600):
    """Exit codes of two processes with the environment that torchrun gives."""
    port = str(free_port())
    started = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "none",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        command = [sys.executable, "-m", "support.distributed_fits", *arguments]
        started.append(subprocess.Popen(command, env=environment))
    try:
        return [process.wait(seconds) for process in started]
    finally:
        for process in started:
            process.kill()


def written(folder):
    (path,) = (folder / "edits").glob("*.safetensors")
    edit = read_edit(path)
    assert isinstance(edit, WeightEdit)
    return edit


def assert_close(found, wanted):
    """Equal but for rounding: sums are taken in another order.

    Adam divides a gradient by its own size, so where that is rounding itself, so is the step: a
    few weights may differ by as much as they were moved.
    """
    assert found.weights.keys() == wanted.weights.keys()
    difference = torch.cat(
        [(found.weights[n] - w).abs().flatten() for n, w in wanted.weights.items()]
    )
    assert float(difference.median()) < 1e-4 * LR
    assert float(difference.quantile(0.9)) < 2e-2 * LR
    assert float(difference.max()) < 8 * LR


def test_one_process_shares_with_nobody():
    assert distributed.shard(3) == distributed.Shard(slice(None), 1.0, whole=True)
    assert distributed.broadcast_object(5) == 5
    assert distributed.is_first()
    distributed.barrier()
    distributed.check()


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("world", [2, 3])
def test_shares_average_to_the_mean_of_the_whole(monkeypatch, count, world):
    values = torch.arange(count).double() ** 2
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    means, taken = [], []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        own = distributed.shard(count)
        taken += values[own.rows].tolist()
        means.append(own.weight * values[own.rows].mean())
    assert torch.isclose(torch.stack(means).mean(), values.mean())
    if count >= world:
        assert sorted(taken) == values.tolist(), "every row once"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["esd", "concept_ablation", "siss", "adversarial"])
def test_two_processes_train_what_one_trains(material, tmp_path, name):
    alone = fit(shutil.copytree(material, tmp_path / "alone"), name)
    shared = shutil.copytree(material, tmp_path / "shared")
    assert two_processes(str(shared), name) == [0, 0]
    assert_close(written(shared), alone)
    assert not list((shared / "edits" / "unfinished").glob("*"))


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "codes"), [("SIGTERM", [143, 143]), ("SIGKILL", [1, -9])])
def test_one_process_that_goes_in_a_search_ends_both_and_they_go_on_to_the_same_bits(
    material, tmp_path, signum, codes
):
    whole = shutil.copytree(material, tmp_path / "whole")
    assert two_processes(str(whole), "adversarial") == [0, 0]
    cut = shutil.copytree(material, tmp_path / "cut")
    # it comes back at all: nobody waits for the one that left
    assert two_processes(str(cut), "adversarial", "2", signum) == codes
    (scratch,) = (cut / "edits" / "unfinished").iterdir()
    last = last_checkpoint(scratch, "adversarial")
    assert checkpoint_step(last) == 2
    assert two_processes(str(cut), "adversarial") == [0, 0]
    assert written(cut).identity == written(whole).identity


def test_processes_that_would_wait_for_this_one_end_with_it():
    waiting = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)]
    (process,) = waiting
    distributed._end_alone(waiting)
    assert process.returncode == -signal.SIGKILL
    assert waiting == [], "Lightning looks after them no more"


def test_a_wrong_number_of_tasks_is_refused_with_the_right_command(monkeypatch):
    for name, value in {
        "SLURM_NTASKS": "1",
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "dori",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "n1",
    }.items():
        monkeypatch.setenv(name, value)
    trainer = distributed.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    with pytest.raises(InputError, match="1 SLURM tasks were started for 2") as caught:
        distributed.start(trainer)
    assert "srun --nodes=1 --ntasks-per-node=2 python -m dori_lightning" in str(caught.value)


def test_a_trainer_that_the_machine_cannot_make_is_a_users_error():
    with pytest.raises(InputError, match=r"(?s)no Trainer can be made: .*trainer=cpu"):
        distributed.Trainer(accelerator="cpu", devices=1, fast_dev_run=-1)


def test_a_task_of_submitits_local_executor_knows_its_place(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    for name, value in {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": "7",
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_GLOBALID": "1",
        "SUBMITIT_LOCAL_LOCALID": "1",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_NNODES": "1",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK",
                 "LOCAL_WORLD_SIZE"):  # fmt: skip
        monkeypatch.setenv(name, "9")  # what the environment exports goes again with the test
    monkeypatch.delenv("MASTER_PORT")
    assert distributed.SubmititEnvironment.detect()
    place = distributed.SubmititEnvironment()
    assert place.creates_processes_externally
    assert (place.world_size(), place.global_rank(), place.local_rank()) == (2, 1, 1)
    assert place.node_rank() == 0
    assert place.main_address
    assert 1024 <= place.main_port <= 65535
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert not distributed.SubmititEnvironment.detect()


def test_each_worker_has_a_device_of_its_own_until_it_ends(tmp_path):
    workers = [python(WORKER, tmp_path) for _ in range(2)]
    try:
        taken = [worker.stdout.readline().strip() for worker in workers]
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


def test_a_worker_is_pinned_before_cuda_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "_claimed", [])
    monkeypatch.setattr(distributed.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    distributed.pin()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a"
    distributed.pin()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-a", "a second job of the worker stays"
    for lock in distributed._claimed:
        lock.release()


def test_without_gpus_nothing_is_pinned(monkeypatch):
    monkeypatch.setattr(distributed, "_claimed", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    distributed.pin()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
