"""Progress, the log file of each process, and which remarks of libraries are heard."""

import logging
import time
import warnings
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as L
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from dori_lightning.report.tables import TextTable, rich_table
from dori_lightning.runtime import logging as progress
from dori_lightning.runtime import peers
from dori_lightning.runtime.logging import ProcessFileHandler, quiet_libraries
from support.silence import MOST, no_silent_stage
from support.tiny import tiny_model

RECORD = logging.LogRecord("x", logging.INFO, "file", 1, "a line", None, None)


def test_a_log_gets_a_line_now_and_then_with_the_time_left(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = iter([0.0, 9.0, 12.0, 41.0, 42.0, 50.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress_bar("attack", 10) as advance:
        advance(2)
        advance(1)
        advance(1)
        advance(2)
    assert [r.message for r in caplog.records] == [
        "attack: 3 of 10, about 28 s left",
        "attack: 6 of 10, about 28 s left",
        "attack: done in 50 s",
    ]


def test_a_stage_without_progress_is_noticed_in_any_task(tmp_path):
    model = tiny_model(tmp_path)
    with pytest.raises(AssertionError, match="encode_prompts"), no_silent_stage():
        model.encode_prompts(["a cat"] * (MOST + 1))
    with no_silent_stage():
        for prompt in progress.with_progress("prompts", ["a cat"] * (MOST + 1)):
            model.encode_prompts([prompt])
        model.encode_prompts(["a cat"] * MOST)


def test_whoever_waits_says_so(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0.01)
    with progress.waiting_for("another process"):
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "waiting for another process" in caplog.text


def test_other_processes_and_empty_stages_say_nothing(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patched:
        patched.setenv("LOCAL_RANK", "1")
        with progress.progress_bar("attack", 10) as advance:
            advance(1)
    with progress.progress_bar("attack", 0) as advance:
        advance(1)
    assert not caplog.records


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "dori.log"),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, "dori.log"),
        ({"RANK": "5", "LOCAL_RANK": "1", "GROUP_RANK": "2"}, "dori-5.log"),
        ({"SLURM_PROCID": "3"}, "dori-3.log"),
        ({"SUBMITIT_LOCAL_GLOBALID": "2"}, "dori-2.log"),
        ({"LOCAL_RANK": "1"}, "dori-1.log"),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, "dori-1.0.log"),
    ],
)
def test_every_launcher_numbers_its_processes(tmp_path, monkeypatch, environment, name):
    for variable in peers.RANKS:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    handler = ProcessFileHandler(str(tmp_path / "dori.log"))
    handler.emit(RECORD)
    handler.close()
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "a line\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_said_once_and_the_run_goes_on(capsys):
    handler = ProcessFileHandler("/dev/full")
    for _ in range(3):
        handler.handle(RECORD)
    said = capsys.readouterr().err
    assert said.count("the log goes on here alone: /dev/full") == 1
    assert "No space left on device" in said
    assert "Traceback" not in said
    with suppress(OSError):  # it tries once more to flush
        handler.close()


def test_lightning_speaks_once_and_of_trouble_only(caplog, capsys):
    quiet_libraries()
    with caplog.at_level(logging.INFO):
        L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").warning("mind this")
    assert [record.getMessage() for record in caplog.records] == ["mind this"]
    assert "TPU" not in capsys.readouterr().err


def test_writing_a_checkpoint_says_nothing(tmp_path, caplog):
    quiet_libraries()
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=0)
    trainer.fit(BoringModel())
    with caplog.at_level(logging.INFO):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert [record.getMessage() for record in caplog.records] == []


def test_remarks_on_nothing_are_dropped_and_others_kept(caplog):
    quiet_libraries()
    diffusers = logging.getLogger("diffusers.models.modeling_utils")
    diffusers.warning("There are modules in UNet that should be kept in float32: []. Casting")
    diffusers.warning("There are modules in UNet that should be kept in float32: [norm]. Casting")
    assert ["[norm]" in record.getMessage() for record in caplog.records] == [True]


def test_the_hint_at_srun_is_dropped_and_other_warnings_kept():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn(
            "The `srun` command is available on your system but is not used.", stacklevel=1
        )
        warnings.warn("The `srun` command failed.", stacklevel=1)
    assert [str(w.message) for w in heard] == ["The `srun` command failed."]


def test_brackets_are_printed_as_they_are(capsys):
    console = progress.answer_console()
    console.print("page: /runs/[red]/a[/]/[b", soft_wrap=True)
    console.print(rich_table(TextTable("[bold]title", "", ("[dim]name",), (("[link]row",),), 1)))
    said = capsys.readouterr().err
    for text in ("/runs/[red]/a[/]/[b", "[bold]title", "[dim]name", "[link]row"):
        assert text in said
