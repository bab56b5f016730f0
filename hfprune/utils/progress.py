"""Progress of a run: its phases, the lines and bars that show them, and the time that each takes.

Lines are log records of this module at level INFO, so whoever runs the library decides where they are written. On a
terminal a phase draws a bar instead. The command line starts :func:`reporting`, which also writes a line where a phase
takes no steps for a while.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch

INTERVAL = 10.0
"""Seconds between two lines."""

_log = logging.getLogger(__name__)
Facts = Callable[[], str]
Advance = Callable[[int, Callable[[], float | None], float | None], None]
"""Called after each batch with its number of tokens, a function that returns the objective so far (nats per token; None
without one), and the share of the kept units that the last comparison found unchanged. The function waits for the
device, and is called only when the figures are shown."""


@dataclass(slots=True)
class Phase:
    """A part of a run.

    Attributes:
        text: What is done, as ``calibrating``.
        done: Steps done.
        total: Steps in all; None when unknown.
        unit: What a step is.
        facts: Further figures, as text.
        before: Steps that were done before it began, in an earlier attempt.
        started: Clock at its start, in seconds.
        own: Seconds so far outside the phases within it.
    """

    text: str
    done: int = 0
    total: int | None = None
    unit: str = "step"
    facts: str = ""
    before: int = 0
    started: float = 0.0
    own: float = 0.0
    _read: float = field(default=-1e9, repr=False)
    _bar: Any = field(default=None, repr=False)

    def update(
        self, done: int, total: int | None = None, *, unit: str | None = None, facts: Facts | None = None
    ) -> None:
        """Notes steps that are done, and shows them where it is time.

        Args:
            done: Steps done.
            total: Steps in all; None keeps what is known.
            unit: What a step is; None keeps what is known.
            facts: Returns further figures as text; called about once a second.
        """
        self.done, self.total, self.unit = done, self.total if total is None else total, unit or self.unit
        now = _state.clock()
        if facts is not None and now - self._read >= min(1.0, _state.interval / 2):
            self._read, self.facts = now, facts()
        if self._bar is not None:
            self._bar.update(
                0, completed=done, total=self.total, shown=f"{self.unit} {self._count()}", facts=self.facts
            )
        _state.tick()

    def line(self, now: float) -> str:
        """Returns the phase as one line: steps, figures and the time that is left.

        >>> Phase(text="recovering", done=5, total=20, facts="loss 2.310").line(now=10.0)
        'recovering: step 5/20, loss 2.310, 30 s left'
        >>> Phase(text="measuring", done=2, total=2, unit="window").line(now=10.0)  # what follows takes no steps
        'measuring: window 2/2, 10 s so far'
        """
        elapsed = now - self.started
        parts = [f"{self.unit} {self._count()}"] if self.done or self.total else []
        parts += [self.facts] if self.facts else []
        if self.total is not None and self.before < self.done < self.total:
            left = elapsed / (self.done - self.before) * (self.total - self.done)
            parts.append(f"{duration(left)} left")
        else:
            parts.append(f"{duration(elapsed)} so far")
        return f"{self.text}: {', '.join(parts)}"

    def _count(self) -> str:
        return f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"


def duration(seconds: float) -> str:
    """Returns a time in words.

    >>> duration(4.25), duration(605), duration(7384)
    ('4.2 s', '10 min 5 s', '2 h 3 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


class Timings:
    """Seconds that phases take from now on; the time of a phase is without that of the phases within it.

    Attributes:
        seconds: Phase -> seconds, in the order of their ends.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        _state.timings.add(self)

    def so_far(self) -> dict[str, float]:
        """Returns :attr:`seconds` with the time that the phases which have not ended took until now."""
        found = dict(self.seconds)
        for text, seconds in _state.current():
            found[text] = found.get(text, 0.0) + seconds
        return found


class _State:
    """The phases that this process is in, innermost last, and when the last line was written."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.timings: WeakSet[Timings] = WeakSet()
        self.interval, self.bars = INTERVAL, True
        self.clock: Callable[[], float] = time.monotonic
        self.written = self.clock()
        self._changed = self.clock()
        self._lock = threading.Lock()

    def enter(self, phase: Phase, *, announce: bool) -> None:
        self._charge()
        phase.started = self.clock()
        self.phases.append(phase)
        if announce:
            self._write(f"{phase.text} ...")

    def leave(self, phase: Phase) -> None:
        self._charge()
        self.phases.remove(phase)
        for timings in self.timings:
            timings.seconds[phase.text] = timings.seconds.get(phase.text, 0.0) + phase.own
        _log.debug("%s: done in %s", phase.text, duration(self.clock() - phase.started))

    def current(self) -> list[tuple[str, float]]:
        """Returns the phases that have not ended, each with its own seconds so far."""
        self._charge()
        return [(phase.text, phase.own) for phase in self.phases]

    def tick(self) -> None:
        """Writes a line where the last one is ``interval`` old; nothing while a bar is drawn."""
        phases = list(self.phases)
        if not phases or any(phase._bar is not None for phase in phases):
            return
        with self._lock:
            now = self.clock()
            due = now - self.written >= self.interval
            if due:
                self.written = now
        if due:
            shown = [phase for phase in phases[:-1] if phase.total] + phases[-1:]
            self._write("; ".join(phase.line(now) for phase in shown))

    def _write(self, text: str) -> None:
        self.written = self.clock()
        if _first_rank():
            _log.info("%s", text)

    def _charge(self) -> None:
        """Adds the time since the last change to the innermost phase."""
        now = self.clock()
        if self.phases:
            self.phases[-1].own += now - self._changed
        self._changed = now


_state = _State()


def _first_rank() -> bool:
    """Returns whether this is process 0, also before the processes have found each other."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


@contextmanager
def phase(
    text: str, *, total: int | None = None, unit: str = "step", bar: bool = True, announce: bool = True
) -> Iterator[Phase]:
    """Announces a phase, shows its steps and times it; yields the phase, whose ``update`` takes the steps.

    Args:
        text: What is done, as ``calibrating``.
        total: Steps in all; None when unknown.
        unit: What a step is.
        bar: Draw a bar on a terminal.
        announce: Write a line at its start.
    """
    current = Phase(text=text, total=total, unit=unit)
    with ExitStack() as ends:
        _state.enter(current, announce=announce)
        ends.callback(_state.leave, current)
        if bar and _state.bars and _first_rank() and sys.stderr.isatty() and not any(p._bar for p in _state.phases):
            current._bar = ends.enter_context(_bar(text, total))
        yield current


def steps(done: int, total: int, unit: str) -> None:
    """Notes steps of the innermost phase; nothing outside of phases.

    Args:
        done: Steps done.
        total: Steps in all.
        unit: What a step is.
    """
    if _state.phases:
        _state.phases[-1].update(done, total, unit=unit)


def _bar(text: str, total: int | None) -> Any:
    """Returns a bar on standard error, with one task."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    progress.add_task(text, total=total, shown="", facts="")
    return progress


@contextmanager
def reporting(*, interval: float | None = None, bars: bool = True) -> Iterator[None]:
    """Writes a line at least every ``interval`` seconds inside the block, also where a phase takes no steps.

    Args:
        interval: Seconds between two lines; :data:`INTERVAL` if None.
        bars: Draw bars on a terminal.
    """
    before = _state.interval, _state.bars
    _state.interval, _state.bars = INTERVAL if interval is None else interval, bars
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_state.interval / 10):
            _state.tick()

    thread = threading.Thread(target=beat, name="hfprune-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _state.interval, _state.bars = before


@contextmanager
def calibration_progress(total: int | None, *, objective: str | None, enabled: bool) -> Iterator[Advance]:
    """Shows batches done, tokens/s, time left, the objective so far and how many kept units are stable.

    Yields the function that advances it.

    Args:
        total: Number of batches, None when unknown.
        objective: Name shown with its value; None without one.
        enabled: Draw a bar on a terminal.
    """
    with phase("calibrating", total=total, unit="batch", bar=enabled) as current:
        tokens = 0

        def advance(num_tokens: int, objective_so_far: Callable[[], float | None], stability: float | None) -> None:
            nonlocal tokens
            tokens += num_tokens

            def facts() -> str:
                elapsed, running = _state.clock() - current.started, objective_so_far()
                parts = [f"{tokens / elapsed:,.0f} tokens/s"] if elapsed and tokens else []
                parts += [] if running is None else [f"{objective} {running:.3f} nats"]
                parts += [] if stability is None else [f"{stability:.1%} of the kept units stable"]
                return ", ".join(parts)

            current.update(current.done + 1, facts=facts)

        yield advance


@contextmanager
def layer_progress(*, enabled: bool, text: str = "fitting layer by layer") -> Iterator[Callable[[int, int], None]]:
    """Shows layers (or groups) done; yields the function that takes the number done and the number in all.

    Args:
        enabled: Draw a bar on a terminal.
        text: What is done.
    """
    with phase(text, unit="layer", bar=enabled) as current:
        yield current.update


@contextmanager
def sparse_progress(layers: int, *, enabled: bool) -> Iterator[Callable[[int, float], None]]:
    """Shows layers done and the error of each; yields the function that takes a layer and its relative output error.

    Args:
        layers: Their number.
        enabled: Draw a bar on a terminal.
    """
    with phase("pruning layer by layer", total=layers, unit="layer", bar=enabled) as current:

        def done(layer: int, error: float) -> None:
            current.update(layer + 1, facts=lambda: f"output error {error:.2%}")
            _log.debug("layer %d: relative error of its output %.4f", layer, error)

        yield done
