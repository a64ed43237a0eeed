import logging

import pytest

from dori_lightning.runtime import logging as progress


def test_a_log_gets_a_line_now_and_then_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = iter([0.0, 10.0, 31.0, 40.0, 50.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress_bar("attack", 10) as advance:
        advance(2)
        advance(3)
        advance(1)
    assert [r.message for r in caplog.records] == [
        "attack: 5 of 10, about 31 s left",
        "attack: done in 50 s",
    ]


def test_other_processes_and_empty_stages_say_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    with monkeypatch.context() as patched:
        patched.setattr("dori_lightning.runtime.distributed.is_first", lambda: False)
        with progress.progress_bar("attack", 10) as advance:
            advance(1)
    with progress.progress_bar("attack", 0) as advance:
        advance(1)
    assert not caplog.records
