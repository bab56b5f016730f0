"""Progress bars of calibration and of layer-wise pruning."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int, float | None, float | None], None]
"""Called after each batch with its number of tokens, the mean objective so far (nats per token, or None), and the share
of the kept units that did not change since the last convergence check."""


@contextmanager
def calibration_progress(total: int | None, *, objective: str | None, enabled: bool) -> Iterator[Advance]:
    """Shows finished batches, tokens/s, remaining time, the objective and the stability of the kept units.

    Yields the function that advances the bar.

    Args:
        total: Number of batches, None if unknown.
        objective: Name of the objective, None to show no value.
        enabled: Whether to show the bar.
    """
    columns = (
        TextColumn("Calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[running]}"),
    )
    with Progress(*columns, disable=not enabled) as progress:
        task = progress.add_task("calibration", total=total, rate="", running="")
        tokens = 0

        def advance(num_tokens: int, running: float | None, stability: float | None) -> None:
            nonlocal tokens
            tokens += num_tokens
            elapsed = progress.tasks[0].elapsed or 0.0
            rate = f"{tokens / elapsed:,.0f} tokens/s" if elapsed else ""
            parts = [] if running is None else [f"{objective} {running:.3f} nats"]
            parts += [] if stability is None else [f"{stability:.1%} of the kept units stable"]
            progress.update(task, advance=1, rate=rate, running=", ".join(parts))

        yield advance


@contextmanager
def layer_progress(*, enabled: bool, text: str = "Layer by layer") -> Iterator[Callable[[int, int], None]]:
    """Shows finished layers (or groups); yields a function of the finished and the total number.

    Args:
        enabled: Whether to show the bar.
        text: Label of the bar.
    """
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not enabled) as progress:
        task = progress.add_task("layers", total=None)
        yield lambda layer, layers: progress.update(task, completed=layer, total=layers)


@contextmanager
def sparse_progress(layers: int, *, enabled: bool) -> Iterator[Callable[[int, float], None]]:
    """Shows finished layers and their output error; yields a function of a layer's index and its relative error.

    Args:
        layers: Number of layers.
        enabled: Whether to show the bar.
    """
    columns = (
        TextColumn("Layer by layer"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[error]}"),
    )
    with Progress(*columns, disable=not enabled) as progress:
        task = progress.add_task("layers", total=layers, error="")

        def done(layer: int, error: float) -> None:
            progress.update(task, completed=layer + 1, error=f"output error {error:.2%}")
            if enabled:
                progress.console.print(f"layer {layer}: relative error of its output {error:.4f}")

        yield done
