"""Who is named when a connection between the processes of a run breaks."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dori_lightning import roster
from dori_lightning.roster import Member


@pytest.fixture(autouse=True)
def _nobody_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "_members", [])
    monkeypatch.setattr(roster, "_SECONDS", 0.3)


@pytest.fixture
def other() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_a_process_that_was_killed_is_named_before_anybody_has_waited_for_it(
    other: "subprocess.Popen[bytes]",
) -> None:
    here = roster.me().host
    roster.meet([roster.me(), Member(here, other.pid, "1"), Member("elsewhere", 1, "2")])
    assert roster.lost() == ("another process of this run, on elsewhere,", "dori-RANK.log")
    other.kill()
    assert roster.lost() == ("the process of rank 1", "dori-1.log")


def test_the_first_process_has_the_log_without_a_number(other: "subprocess.Popen[bytes]") -> None:
    other.kill()
    other.wait()
    roster.meet([Member(roster.me().host, other.pid, ""), roster.me()])
    assert roster.lost() == ("the process of rank 0", "dori.log")


def test_where_all_live_nobody_is_named(other: "subprocess.Popen[bytes]") -> None:
    assert roster.lost() == ("another process of this run", "dori-RANK.log")
    roster.meet([roster.me(), Member(roster.me().host, other.pid, "1")])
    assert roster.lost() == ("another process of this run", "dori-RANK.log")
    assert roster.me().pid == os.getpid()
