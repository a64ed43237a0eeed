"""An audit of a fine-tuned model by two processes, started in each of the ways there are."""

import os
import socket

import pytest

from dori_lightning.runtime.checkpoints import last_checkpoint, read_checkpoint
from support.processes import PROGRAM, begin, said, until
from support.records import results, written
from support.runs import SMALL, on_tiny, run_task

WAYS = ("lightning", "torchrun", "slurm")
AUDIT = (
    *SMALL, "sampling.images_per_pair=2", "mitigation=esd_x", "mitigation.steps=2",
    "mitigation.batch=2", "mitigation.sampling_steps=2",
)  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.enable_socket]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def start(way, place, *arguments):
    """Two processes in one of the ways; under SLURM what srun gives each of two tasks."""
    if way == "lightning":
        return [begin(place, PROGRAM, *arguments)]
    port = free_port()
    if way == "torchrun":
        torchrun = ("torch.distributed.run", "--nproc-per-node=2", "--master-port", port, "-m")
        return [begin(place, *torchrun, PROGRAM, *arguments)]
    job = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "dori", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NNODES": "1", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return [
        begin(
            place, PROGRAM, *arguments,
            env={**os.environ, **job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip


def together(material, place, *more):
    """Overrides of an audit by two processes."""
    return on_tiny(
        material, *AUDIT, "trainer=ddp", "trainer.accelerator=cpu", "name=two",
        f"paths.output={place}", f"paths.cache={place / 'cache'}", *more,
    )  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_what_one_gives(way, material, tmp_path):
    started = start(way, tmp_path, *together(material, tmp_path))
    text = said(*started)
    assert [process.returncode for process in started] == [0] * len(started), text
    assert text.count(f"\n{tmp_path / 'two'}\n") == 1, "one process speaks for both"
    made = written(tmp_path, "cache/edits/*.safetensors")
    assert len(made) == 1
    # under the edit that two processes made, one finds the same to the bit
    run_task(tmp_path / "one", *on_tiny(material, *AUDIT, f"paths.cache={tmp_path / 'cache'}"))
    assert written(tmp_path, "cache/edits/*.safetensors") == made
    assert results(tmp_path / "two") == results(tmp_path / "one")


def test_an_error_found_while_the_other_process_starts_is_said_once(material, tmp_path):
    """It reads and loads at the same time, and does not wait for one that is gone."""
    wrong = ("attack.inits=[control_prompt]", "attack.other_inits=null", "pairs.kinds=[vm]")
    (process,) = start("lightning", tmp_path, *together(material, tmp_path, *wrong))
    text = said(process)
    assert process.returncode == 2, text
    assert text.count("attack.inits has control_prompt") == 1


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_which_names_it_and_the_same_command_goes_on(
    killed, material, tmp_path
):
    arguments = together(
        material, tmp_path, "mitigation.steps=40", "mitigation.finetune.checkpoint_every=1"
    )
    started = start("slurm", tmp_path, *arguments)
    unfinished = tmp_path / "cache" / "edits" / "unfinished"
    until(lambda: list(unfinished.glob("*/step-*.ckpt")), *started)
    started[killed].kill()
    left = started[1 - killed]
    text = said(left, seconds=600)
    assert left.returncode == 1, text
    assert text.count("dori: ") == 1
    assert f"dori: the process of rank {killed} is gone" in text
    assert "Traceback" not in text
    (scratch,) = unfinished.iterdir()
    last = last_checkpoint(scratch, "what is left")
    assert last is not None
    step = read_checkpoint(last)["global_step"]
    assert 1 <= step < 40
    again = start("slurm", tmp_path, *arguments)
    text = said(*again)
    assert [process.returncode for process in again] == [0, 0], text
    assert f"going on from step {step}\n" in text
    assert (tmp_path / "two" / "report.json").is_file()
