"""Who is named when a connection between the processes of a run breaks."""

import os

import pytest

from dori_lightning.runtime import peers
from dori_lightning.runtime.peers import Peer
from support.processes import python


@pytest.fixture(autouse=True)
def _nobody_met(monkeypatch):
    monkeypatch.setattr(peers, "_peers", [])
    monkeypatch.setattr(peers, "_SECONDS", 0.3)


@pytest.fixture
def other():
    process = python("input()")
    yield process
    process.kill()
    process.communicate()


def test_a_process_that_was_killed_is_named_before_anybody_has_waited_for_it(other):
    here = peers.this_process().host
    peers.register_peers(
        [peers.this_process(), Peer(here, other.pid, "1"), Peer("elsewhere", 1, "2")]
    )
    assert peers.dead_peers() == ("another process of this run, on elsewhere,", "dori-RANK.log")
    other.kill()
    assert peers.dead_peers() == ("the process of rank 1", "dori-1.log")


def test_the_first_process_has_the_log_without_a_number(other):
    other.kill()
    other.wait()
    peers.register_peers([Peer(peers.this_process().host, other.pid, ""), peers.this_process()])
    assert peers.dead_peers() == ("the process of rank 0", "dori.log")


def test_where_all_live_nobody_is_named(other):
    assert peers.dead_peers() == ("another process of this run", "dori-RANK.log")
    peers.register_peers([peers.this_process(), Peer(peers.this_process().host, other.pid, "1")])
    assert peers.dead_peers() == ("another process of this run", "dori-RANK.log")
    assert peers.this_process().pid == os.getpid()
