"""Lines of progress: written on time, flushed by the handler, timed by phase."""

import io
import logging
import subprocess
import sys
import threading

import pytest

from hfprune.utils import progress
from hfprune.utils.progress import Timings, calibration_progress, phase, reporting, sparse_progress, steps


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves, in the place of the process's."""

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    found = Clock()
    state = progress._State()
    state.clock = found
    state.written = state._changed = 0.0
    monkeypatch.setattr(progress, "_state", state)
    return found


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="hfprune")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_is_written_once_per_interval(clock, lines):
    with phase("recovering", total=10) as current:
        for step in range(10):
            clock.now += 4
            current.update(step + 1, facts=lambda: "loss 2.0")
    assert lines() == [
        "recovering ...",
        "recovering: step 3/10, loss 2.0, 28 s left",
        "recovering: step 6/10, loss 2.0, 16 s left",
        "recovering: step 9/10, loss 2.0, 4.0 s left",
    ]


def test_a_resumed_phase_does_not_count_earlier_steps_as_its_own(clock, lines):
    with phase("recovering", total=100) as current:
        current.before = current.done = 90
        clock.now = 20
        current.update(92)
    assert lines()[-1] == "recovering: step 92/100, 1 min 20 s left"


def test_an_outer_count_is_shown_with_the_inner_phase(clock, lines):
    with phase("sweep", total=4, unit="model") as outer:
        outer.update(1)
        with phase("measuring entropy-0.2"):
            clock.now = 12
            steps(3, 6, "window")
    assert lines()[-1] == "sweep: model 1/4, 36 s left; measuring entropy-0.2: window 3/6, 12 s left"


def test_calibration_and_layers_use_the_same_lines(clock, lines):
    with calibration_progress(4, objective="entropy", enabled=True) as advance:
        clock.now = 10
        advance(1000, lambda: 1.5, None)
    with sparse_progress(2, enabled=False) as done:
        clock.now = 20
        done(0, 0.125)
    assert lines() == [
        "calibrating ...",
        "calibrating: batch 1/4, 100 tokens/s, entropy 1.500 nats, 30 s left",
        "pruning layer by layer ...",
        "pruning layer by layer: layer 1/2, output error 12.50%, 10 s left",
    ]


def test_the_objective_is_read_only_when_it_is_shown(clock):
    read = []
    with calibration_progress(100, objective="entropy", enabled=False) as advance:
        for clock.now in (10, 10.1, 10.2, 10.3, 12):
            advance(10, lambda: read.append(clock.now) or 1.5, None)
    assert read == [10, 12]


def test_a_phase_without_steps_is_reported_by_the_thread(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="hfprune")
    seen = threading.Event()

    class Watch(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("loading the model: ") and "so far" in record.getMessage():
                seen.set()

    watch = Watch()
    logging.getLogger("hfprune").addHandler(watch)
    try:
        with reporting(interval=0.01), phase("loading the model"):
            assert seen.wait(60)
    finally:
        logging.getLogger("hfprune").removeHandler(watch)
    assert not any(thread.name == "hfprune-progress" for thread in threading.enumerate())


def test_time_belongs_to_the_innermost_phase(clock):
    timings = Timings()
    with phase("measuring"):
        clock.now += 2
        with phase("timing"):
            clock.now += 5
        clock.now += 1
    with phase("timing"):
        clock.now += 1
    assert timings.seconds == {"timing": 6.0, "measuring": 3.0}


def test_an_exception_ends_the_phase(clock):
    with pytest.raises(KeyError), phase("calibrating"):
        raise KeyError
    assert progress._state.phases == []


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_other_processes_write_nothing(clock, lines, monkeypatch, variable):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(variable, "1")
    with phase("calibrating", total=2) as current:
        clock.now = 100
        current.update(1)
    assert lines() == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_has_a_bar_in_the_place_of_lines(clock, lines, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with phase("calibrating", total=2, unit="batch") as current:
        clock.now = 100
        current.update(1, facts=lambda: "5 tokens/s")
        with phase("saving"):  # no second bar
            pass
    assert "calibrating" in terminal.getvalue()
    assert [line for line in lines() if "left" in line] == []
    with reporting(bars=False), phase("calibrating"):
        assert progress._state.phases[-1]._bar is None


def test_importing_the_library_configures_no_logging_and_prints_nothing():
    code = (
        "import logging, threading, hfprune, hfprune.trainer, hfprune.sweep\n"
        "assert not logging.getLogger('hfprune').handlers and not logging.root.handlers\n"
        "assert not any(t.name == 'hfprune-progress' for t in threading.enumerate())"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
