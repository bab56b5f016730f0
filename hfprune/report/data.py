"""Report data: the content of a report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hfprune.evaluation.zero_shot import MAIN_METRICS

QUANTITIES = ("perplexity", "kl", "accuracy")
"""Measures of quality in a sweep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvergencePoint:
    """Agreement of an early ranking of the units with the final one.

    Attributes:
        tokens: Calibration tokens seen.
        overlap: Share of the finally kept units that would have been kept at this point, in [0, 1].
    """

    tokens: int
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """One model of a sweep; what was not measured is None.

    Attributes:
        label: The model, for example ``entropy, 20 %``.
        series: The method that made it; points of one series are joined. ``dense`` marks the dense model.
        parameters: Parameters, tied weights once.
        latency_ms: Prefill time.
        perplexity: On the evaluation windows.
        kl: KL(dense || model), nats per token.
        accuracy: Mean zero-shot accuracy, in [0, 1].
        spread: Field name -> lowest and highest value over seeds.
    """

    label: str
    series: str
    parameters: int | None = None
    latency_ms: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    accuracy: float | None = None
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How the model of each stage continues one prompt.

    Attributes:
        prompt: The prompt.
        texts: Stage -> continuation.
    """

    prompt: str
    texts: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTable:
    """A table whose cells are text.

    Attributes:
        title: What it shows.
        headings: One per column.
        rows: A text per column each; the first is the row's name.
        note: How to read it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """What a report shows; what is empty is left out of it.

    Attributes:
        title: Heading of the page.
        commands: What was typed, to be typed again.
        stages: Stage -> figures, as in ``report.json``; numbers that JSON has not are NaN, infinite, or text that says
            so.
        importance: Group -> score of every unit, groups in the order of the layers.
        kept: Group -> kept units and units of the dense model.
        convergence: Agreement of the choice of units during calibration with the final one.
        training: ``train`` and ``validation`` -> optimizer steps, tokens and loss of every point.
        training_loss: What the training loss is: ``cross-entropy`` or ``distillation``.
        frontier: The models of a sweep.
        recommendation: Which model of a sweep to take, one paragraph each.
        tables: Further tables of a sweep.
        generations: Sample continuations.
        timing: Phase of the run -> seconds.
        recipe: The configuration as YAML.
        facts: Label -> text: budget, data, seed, versions.
        warnings: What the reader must know first.
    """

    title: str
    commands: Sequence[str] = ()
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    importance: Mapping[str, Sequence[float]] = field(default_factory=dict)
    kept: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    convergence: Sequence[ConvergencePoint] = ()
    training: Mapping[str, Sequence[tuple[int, int, float]]] = field(default_factory=dict)
    training_loss: str = "cross-entropy"
    frontier: Sequence[FrontierPoint] = ()
    recommendation: Sequence[str] = ()
    tables: Sequence[TextTable] = ()
    generations: Sequence[Generation] = ()
    timing: Mapping[str, float] = field(default_factory=dict)
    recipe: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def number(value: Any) -> float | None:
    """Returns a figure as a number, also where a strict JSON file holds it as text; None when there is none.

    >>> number("inf"), number(3), number(None)
    (inf, 3.0, None)
    """
    if isinstance(value, str) and value.lower() in ("nan", "inf", "-inf", "infinity", "-infinity"):
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def look_up(value: Any, *path: str) -> Any:
    """Returns what nested mappings hold at ``path``; None when a step of it is missing."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def task_figures(data: ReportData) -> dict[tuple[str, str], dict[str, tuple[float, float | None]]]:
    """Returns (task, metric) -> stage -> value and standard error, of the first main metric that some stage has."""
    tasks = {name: look_up(stage, "zero_shot", "tasks") or {} for name, stage in data.stages.items()}
    figures: dict[tuple[str, str], dict[str, tuple[float, float | None]]] = {}
    for task in dict.fromkeys(name for names in tasks.values() for name in names):
        for metric in MAIN_METRICS:
            if any(look_up(names, task, metric) is not None for names in tasks.values()):
                figures[task, metric] = _stage_figures(tasks, task, metric)
                break
    return {key: row for key, row in figures.items() if row}


def _stage_figures(tasks: Mapping[str, Any], task: str, metric: str) -> dict[str, tuple[float, float | None]]:
    """Returns stage -> finite value of one task and its standard error, None if that is unknown."""
    row: dict[str, tuple[float, float | None]] = {}
    for stage, names in tasks.items():
        value, error = number(look_up(names, task, metric)), number(look_up(names, task, f"{metric}_stderr"))
        if value is not None and math.isfinite(value):
            row[stage] = (value, error if error is not None and math.isfinite(error) else None)
    return row
