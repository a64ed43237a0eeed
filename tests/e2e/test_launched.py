"""An audit of a fine-tuned model by two processes, started in each of the ways there are."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from dori_lightning.runtime.checkpoints import last_checkpoint, read_checkpoint
from support.runs import run_task, write_pairs
from support.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("lightning", "torchrun", "slurm")

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    place = tmp_path_factory.mktemp("material")
    write_tiny(place / "checkpoint")
    write_pairs(place / "pairs")
    return place


def overrides(material):
    return [
        "pairs=folder",
        f"pairs.path={material / 'pairs'}",
        "attack.budget.steps=2",
        "attack.noise_batch=2",
        "attack.inits=[prompt]",
        "attack.snapshots=[]",
        "sampling.steps=2",
        "sampling.images_per_pair=2",
        "checkpoint.name=tiny",
        f"checkpoint.source={material / 'checkpoint'}",
        "checkpoint.device=cpu",
        "metrics.descriptors.local_correlation.threshold=0.5",
        "mitigation=esd_x",
        "mitigation.steps=2",
        "mitigation.batch=2",
        "mitigation.sampling_steps=2",
        "utility=none",
    ]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def by_lightning(arguments, cwd):
    return [start(["-m", "dori_lightning", *arguments], cwd, environment())]


def by_torchrun(arguments, cwd):
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", free_port()]
    return [start([*command, "-m", "dori_lightning", *arguments], cwd, environment())]


def by_slurm(arguments, cwd):
    """What srun gives each of two tasks on one node."""
    port = free_port()
    return [
        start(
            ["-m", "dori_lightning", *arguments],
            cwd,
            environment(
                SLURM_JOB_ID="7",
                SLURM_JOB_NAME="dori",
                SLURM_NTASKS="2",
                SLURM_NTASKS_PER_NODE="2",
                SLURM_STEP_NUM_TASKS="2",
                SLURM_NODELIST="127.0.0.1",
                SLURM_NNODES="1",
                SLURM_NODEID="0",
                SLURM_PROCID=str(rank),
                SLURM_LOCALID=str(rank),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
        )
        for rank in range(2)
    ]


def start(command, cwd, env):
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


STARTERS: dict[str, Callable[[list[str], Path], list[subprocess.Popen[str]]]] = {
    "lightning": by_lightning,
    "torchrun": by_torchrun,
    "slurm": by_slurm,
}


def results(folder):
    """Pictures and attacks of a run, and what decided them."""
    found: dict[str, object] = {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("pictures/**/*.png")
    }
    for path in folder.glob("attacks/**/*.safetensors"):
        with safe_open(path, framework="np") as file:
            tensors = {n: file.get_tensor(n).tobytes() for n in file.keys()}  # noqa: SIM118
            found[str(path.relative_to(folder))] = (tensors, file.metadata())
    return found


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_what_one_gives(way, material, tmp_path):
    cache = f"paths.cache={tmp_path / 'cache'}"
    arguments = [
        *overrides(material),
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "name=two",
        f"paths.output={tmp_path}",
        cache,
    ]
    started = STARTERS[way](arguments, tmp_path)
    try:
        said = [process.communicate(timeout=1500)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
    assert "\n".join(said).count(f"\n{tmp_path / 'two'}\n") == 1, "one process speaks for both"
    (edit,) = (tmp_path / "cache" / "edits").glob("*.safetensors")
    made = edit.stat().st_mtime_ns
    # under the edit that two processes made, one finds the same to the bit
    run_task(tmp_path / "one", *overrides(material), "trainer=cpu", cache)
    assert edit.stat().st_mtime_ns == made
    two, one = results(tmp_path / "two"), results(tmp_path / "one")
    assert len(one) > 10
    assert two == one


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_which_names_it_and_the_same_command_goes_on(
    killed, material, tmp_path
):
    arguments = [
        *overrides(material),
        "mitigation.steps=40",
        "mitigation.finetune.checkpoint_every=1",
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "name=two",
        f"paths.output={tmp_path}",
        f"paths.cache={tmp_path / 'cache'}",
    ]
    started = by_slurm(arguments, tmp_path)
    unfinished = tmp_path / "cache" / "edits" / "unfinished"
    try:
        deadline = time.monotonic() + 600
        while not list(unfinished.glob("*/step-*.ckpt")):
            assert all(process.poll() is None for process in started), started[0].communicate()[0]
            assert time.monotonic() < deadline, "no step was taken"
            time.sleep(0.02)
        started[killed].kill()
        said = started[1 - killed].communicate(timeout=600)[0]
    finally:
        for process in started:
            process.kill()
    assert started[1 - killed].returncode == 1, said
    assert said.count("dori: ") == 1
    assert f"dori: the process of rank {killed} is gone" in said
    assert "Traceback" not in said
    (scratch,) = unfinished.iterdir()
    last = last_checkpoint(scratch, "what is left")
    assert last is not None
    assert 1 <= read_checkpoint(last)["global_step"] < 40
    again = by_slurm(arguments, tmp_path)
    try:
        said = "".join(process.communicate(timeout=1500)[0] for process in again)
    finally:
        for process in again:
            process.kill()
    assert [process.returncode for process in again] == [0, 0], said
    assert f"going on from {last}" in said
    assert (tmp_path / "two" / "report.json").is_file()
