"""Survey: which classes of the installed transformers are proven, in part or not at all, and why.

Every class is described by its table, or derived, and proven on a tiny model of its default config, in a process of its
own choosing: a class that hangs or crashes costs one row and not the survey.
"""

import contextlib
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from hfprune.models.proof import CLAIMS, Proof
from hfprune.utils.compat import causal_lm_class, causal_lm_classes, default_config
from hfprune.utils.errors import ConfigError
from hfprune.utils.spelling import nearest

UNITS = ("mlp", "heads", "experts", "layers", "channels")
"""Unit kinds, in the order of the table."""

VERDICTS = ("proven", "in part", "refused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What the survey found about one class.

    Attributes:
        model_class: Name of the class.
        model_type: Model type of the config that was tried.
        verdict: One of ``VERDICTS``.
        source: ``table`` or ``derived``.
        units: Unit kind -> reason why its units cannot be removed, empty if they can; kinds that a class does not have
            are left out.
        stated: Unit kind that can be removed -> reason why no stock config states the result, empty if one does.
        claims: Claim -> reason why it does not hold, empty if it does.
        reason: Why the class is refused.
        seconds: Duration.
    """

    model_class: str
    model_type: str
    verdict: str = "refused"
    source: str = ""
    units: dict[str, str] = field(default_factory=dict)
    stated: dict[str, str] = field(default_factory=dict)
    claims: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0

    @classmethod
    def of(cls, proof: Proof, *, model_type: str, source: str) -> "Row":
        """Returns the row of a proof."""
        claims = {name: proof.claims[name].reason for name in CLAIMS}
        units = {kind: claims[claim] for kind, claim in proof.kind_claims().items()}
        return cls(
            model_class=proof.spec.model_class,
            model_type=model_type,
            verdict=proof.verdict,
            source=source,
            units=units,
            stated=dict(proof.stated),
            claims=claims,
            reason=proof.reason(),
        )

    def removable(self, kind: str) -> bool:
        """Returns whether units of a kind can be removed from models of the class."""
        return self.verdict != "refused" and self.units.get(kind) == ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as plain data."""
        return asdict(self)


def survey(names: Sequence[str] = (), *, jobs: int = 1, time_limit: float = 300.0) -> Iterator[Row]:
    """Yields a row for every causal LM class of the installed transformers, as each is finished.

    Args:
        names: Class names or model types; empty for all.
        jobs: Number of processes.
        time_limit: Seconds for one class, after which its process is ended.

    Raises:
        ConfigError: A name is unknown, or a number is not positive.

    Example:
        >>> classes()["LlamaForCausalLM"], len(classes()) > 100
        ('llama', True)
    """
    if jobs < 1 or not time_limit > 0:
        raise ConfigError(f"jobs={jobs} and time_limit={time_limit} must be positive.")
    waiting = list(_chosen(names).items())[::-1]
    workers = [_Worker(limit=time_limit) for _ in range(min(jobs, len(waiting)))]
    try:
        while waiting or any(worker.busy for worker in workers):
            for worker in workers:
                if not worker.busy and waiting:
                    worker.start(*waiting.pop())
            yield from _finished(workers)
    finally:
        for worker in workers:
            worker.close()


def classes() -> dict[str, str]:
    """Returns class name -> model type, for every causal LM class.

    Of several types it is that of the text model, or that with the name of the class.
    """
    found: dict[str, str] = {}
    for model_type, name in causal_lm_classes().items():
        named = name.lower().startswith(model_type.replace("_", "").replace("-", ""))
        if name not in found or named or model_type.endswith("_text"):
            found[name] = model_type
    return found


def classify(model_class: str, model_type: str) -> Row:
    """Returns the row of one class.

    Args:
        model_class: Name of the class.
        model_type: Model type of a config of it.
    """
    from hfprune.models.described import class_description

    start = time.perf_counter()
    try:
        config = default_config(model_type)
        proof, source = class_description(causal_lm_class(config), config)
        row = Row.of(proof, model_type=model_type, source=source)
    except Exception as error:  # classes and their default configs are foreign code
        row = Row(model_class=model_class, model_type=model_type, reason=_in_one_line(error))
    return Row(**{**row.to_dict(), "model_class": model_class, "seconds": round(time.perf_counter() - start, 2)})


def _in_one_line(error: BaseException) -> str:
    r"""Returns the message of a foreign error, whose first line may only announce the second.

    >>> _in_one_line(ValueError("Validation failed:\n    hidden_size must be 0")), _in_one_line(KeyError())
    ('Validation failed: hidden_size must be 0', 'KeyError')
    """
    text = " ".join(str(error).split())
    return (text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...") or type(error).__name__


_LONGEST = 240
"""Letters of the longest reason."""


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """Returns verdict or unit kind -> number of classes."""
    found = dict.fromkeys((*VERDICTS, *UNITS), 0)
    for row in rows:
        found[row.verdict] += 1
        for kind in UNITS:
            found[kind] += row.removable(kind)
    return found


def _chosen(names: Sequence[str]) -> dict[str, str]:
    """Returns class name -> model type for the given classes or model types, sorted."""
    known, types = classes(), causal_lm_classes()
    if not names:
        return dict(sorted(known.items()))
    for name in names:
        if name not in known and name not in types:
            near = nearest(name, [*known, *types])
            guess = f" Did you mean '{near}'?" if near else ""
            raise ConfigError(f"names: '{name}' is neither a class nor a model type of this transformers.{guess}")
    return {types.get(name, name): name if name in types else known[name] for name in names}


class _Worker:
    """A process that classifies one class after another, and is replaced if it ends or takes too long."""

    def __init__(self, *, limit: float) -> None:
        self._limit = limit
        self._process: Any = None
        self._connection: Any = None
        self._task: tuple[str, str] | None = None
        self._deadline, self._started = 0.0, 0.0

    @property
    def busy(self) -> bool:
        """Whether a class is being tried."""
        return self._task is not None

    @property
    def connection(self) -> Any:
        """End of the pipe on which the row arrives."""
        return self._connection

    @property
    def left(self) -> float:
        """Seconds until the time limit."""
        return max(0.0, self._deadline - time.monotonic())

    def start(self, model_class: str, model_type: str) -> None:
        """Sends a class to the process."""
        self._task = (model_class, model_type)
        if self._process is None or not self._process.is_alive():
            self._launch()
        else:
            self._send()

    def take(self) -> Row | None:
        """Returns the row of the current class, None if the process has only just started.

        A process that ended or is late gives a refusal.
        """
        assert self._task is not None
        model_class, model_type = self._task
        try:
            if self._connection.poll():
                row: Row | None = self._connection.recv()
                if row is None:
                    self._send()
                else:
                    self._task = None
                return row
            reason = f"it took longer than {self._limit:g} s"
        except (EOFError, OSError):
            self._process.join(5)
            reason = f"its process ended with exit code {self._process.exitcode}"
        self._task = None
        self.close()
        seconds = round(time.monotonic() - self._started, 2)
        return Row(model_class=model_class, model_type=model_type, reason=reason, seconds=seconds)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None

    def _send(self) -> None:
        self._started = time.monotonic()
        self._deadline = self._started + self._limit
        self._connection.send(self._task)

    def _launch(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        self._process.start()
        self._started = time.monotonic()
        self._deadline = self._started + _START
        other.close()


_START = 300.0
"""Seconds in which a process must have imported its modules; the time of a class counts from then."""


def _finished(workers: Sequence[_Worker]) -> Iterator[Row]:
    """Waits for the next row or deadline, and yields the rows that are there."""
    busy = [worker for worker in workers if worker.busy]
    ready = wait([worker.connection for worker in busy], timeout=min(worker.left for worker in busy))
    for worker in busy:
        if worker.connection in ready or worker.left <= 0:
            row = worker.take()
            if row is not None:
                yield row


def _serve(connection: Connection) -> None:
    """Classifies what arrives, silently, until the pipe is closed."""
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    warnings.simplefilter("ignore")
    from hfprune.models import described  # noqa: F401  # before the time of the first class counts

    connection.send(None)
    with contextlib.suppress(EOFError):
        while True:
            connection.send(classify(*connection.recv()))
