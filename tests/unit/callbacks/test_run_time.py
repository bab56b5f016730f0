"""Time of a run that was interrupted: all attempts count, each once."""

import time

import pytest

from hfprune.callbacks import ReportCallback
from hfprune.callbacks.run_time import RunTime
from hfprune.utils import progress
from hfprune.utils.progress import phase


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress._state, "clock", clock)
    monkeypatch.setattr(time, "time", clock)
    progress._state._charge()
    yield clock
    monkeypatch.undo()
    progress._state._charge()


def test_a_resumed_run_counts_all_attempts(clock):
    first = RunTime()
    clock.now += 2
    with phase("calibrating"):
        clock.now += 30
    with phase("recovering"):
        clock.now += 5
        state = first.state_dict()  # a checkpoint within a phase
        clock.now += 100  # lost with the process
    second = RunTime()
    second.load_state_dict(state)
    with phase("recovering"):
        clock.now += 3
        assert second.state_dict()["timing"] == {"calibrating": 30, "recovering": 8}
    assert second.seconds == 40
    assert second.timing == {"calibrating": 30, "recovering": 8}
    third = RunTime()
    third.load_state_dict(second.state_dict())
    assert (third.seconds, third.timing) == (40, second.timing)


def test_an_attempt_does_not_count_its_own_checkpoint(clock):
    run = RunTime()
    with phase("calibrating"):
        clock.now += 30
    run.load_state_dict(run.state_dict())
    assert (run.seconds, run.timing) == (30, {"calibrating": 30})


def test_a_checkpoint_of_an_earlier_version_has_no_time(clock, tmp_path):
    report = ReportCallback(tmp_path / "out")
    old = {name: value for name, value in report.state_dict().items() if name != "time"}
    report.load_state_dict(old)
    clock.now += 3
    assert report.state_dict()["time"]["seconds"] == 3
