"""Each process has a log of its own, and a log that cannot be written stops nobody."""

import logging
from contextlib import suppress
from pathlib import Path

import pytest

from dori_lightning.runtime import peers
from dori_lightning.runtime.logging import ProcessFileHandler

RECORD = logging.LogRecord("x", logging.INFO, "file", 1, "a line", None, None)


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
def test_every_launcher_numbers_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str
) -> None:
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
def test_a_full_disk_is_said_once_and_the_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    handler = ProcessFileHandler("/dev/full")
    for _ in range(3):
        handler.handle(RECORD)
    said = capsys.readouterr().err
    assert said.count("the log goes on here alone: /dev/full") == 1
    assert "No space left on device" in said
    assert "Traceback" not in said
    with suppress(OSError):  # it tries once more to flush
        handler.close()
