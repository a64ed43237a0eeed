import os
import signal

import pytest

from dori_lightning.runtime import distributed, signals
from dori_lightning.runtime.signals import Interrupted
from support.processes import python

TWICE = """
import os, signal, time
from dori_lightning.runtime import signals
with signals.handling():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.fixture
def as_usual():
    """Handlers as Python starts with; what runs in the background may ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("as_usual")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_flag_that_the_next_step_sees(signum, code):
    before = signal.getsignal(signum)
    with signals.handling():
        distributed.check()
        os.kill(os.getpid(), signum)
        assert signals.received() == signum
        with pytest.raises(Interrupted) as caught:
            distributed.check()
    assert caught.value.code == code
    assert signal.getsignal(signum) is before
    with signals.handling():
        distributed.check()  # a new run begins without the old one's


def test_the_second_signal_leaves_at_once():
    ended = python(TWICE)
    _, said = ended.communicate(timeout=50)
    assert ended.returncode == 143
    assert "SIGTERM: leaving after this step" in said
    assert "leaving at once" in said


def test_submitits_signal_is_handed_on_when_the_work_is_safe():
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda signum, _: seen.append(signum))
    ignored = signal.signal(signal.SIGTERM, lambda *_: seen.append(-1))
    try:
        with signals.handling():
            os.kill(os.getpid(), signal.SIGUSR2)
            assert signals.received() == signal.SIGUSR2
            assert seen == []
            signals.hand_on(signal.SIGUSR2)
            assert seen == [signal.SIGUSR2]
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen[-1] == -1, "under submitit SIGTERM stays with it"
    finally:
        signal.signal(signal.SIGUSR2, before)
        signal.signal(signal.SIGTERM, ignored)


def test_what_is_raised_is_no_error_that_could_be_handled():
    assert not issubclass(Interrupted, Exception)
