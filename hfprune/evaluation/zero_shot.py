"""Zero-shot tasks of a model in memory, with lm-eval's Python API."""

import difflib
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfprune.evaluation.tasks import GROUPS_FOLDER, LOCAL_FOLDER
from hfprune.utils.errors import ConfigError, first_line
from hfprune.utils.files import user_path
from hfprune.utils.progress import phase
from hfprune.utils.random_numbers import isolated_rng

MAIN_METRICS = ("acc_norm", "acc", "pct_stereotype")
"""Metrics in order of preference; the first one of a task is used for the average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Results of one task.

    Attributes:
        metrics: Name -> value of all metrics (``acc``, ``acc_norm``, ``pct_stereotype``, ...), or ``name,filter`` for
            tasks with several filters.
        stderr: Name -> standard error, if available.
        num_items: Number of evaluated items.
        num_fewshot: Number of examples in the prompt.
        version: Version of the task in the harness.
    """

    metrics: dict[str, float]
    stderr: dict[str, float]
    num_items: int
    num_fewshot: int
    version: str

    @property
    def main(self) -> tuple[str, float] | None:
        """Metric used for the average: acc_norm, acc or pct_stereotype."""
        return next(((name, self.metrics[name]) for name in MAIN_METRICS if name in self.metrics), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShot:
    """Results of all tasks.

    Attributes:
        tasks: Task -> results.
        average: Mean over tasks of acc_norm, or of acc or pct_stereotype for tasks without it. The HFPrune paper
            includes pct_stereotype of CrowS-Pairs, which measures a bias: larger is not better.
        average_acc: Mean of acc over the tasks that have it.
        harness: Version of lm-eval.
        limit: Requested number of items per task; None for all.
        num_fewshot: Requested number of examples in the prompt; None for the default of each task.
        data_dir: Folder of local data sets; None for the hub.
        seconds: Duration of the evaluation.
    """

    tasks: dict[str, TaskResult]
    average: float | None
    average_acc: float | None
    harness: str
    limit: int | None
    num_fewshot: int | None
    data_dir: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the results as plain data, with ``acc`` and ``acc_stderr`` of a task on one level."""
        figures = asdict(self)
        for name, task in self.tasks.items():
            errors = {f"{metric}_stderr": value for metric, value in task.stderr.items()}
            facts = {"num_items": task.num_items, "num_fewshot": task.num_fewshot, "version": task.version}
            figures["tasks"][name] = {**task.metrics, **errors, **facts}
        return figures


class ZeroShotTasks:
    """Zero-shot tasks and their settings. Names are checked before a model is loaded, without reading data.

    Args:
        names: Tasks, groups and tags of the harness; also ``paper10``, ``llmpruner7`` and ``zpruner5``.
        data_dir: Folder of released data sets, which replace those of the hub.
        include_path: Folder of additional task files.
        limit: Number of items per task, the first ones; None for all.
        num_fewshot: Number of examples in the prompt; None for the default of each task, which is usually 0.
        batch_size: Number of requests per forward pass.
        share_prefixes: Whether common prefixes run once (see :mod:`hfprune.evaluation.prefix_lm`); False uses the model
            class of the harness. None for True on the CPU, where it is faster.

    Raises:
        ConfigError: A name is unknown, a folder is missing, a number is not positive, or lm-eval is not installed.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        data_dir: str | None = None,
        include_path: str | None = None,
        limit: int | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        share_prefixes: bool | None = None,
    ) -> None:
        _check_installed()
        data_dir = None if data_dir is None else user_path(data_dir, "data_dir")
        include_path = None if include_path is None else user_path(include_path, "include_path")
        for argument, folder in (("data_dir", data_dir), ("include_path", include_path)):
            if folder is not None and not Path(folder).is_dir():
                raise ConfigError(f"{argument}='{folder}' is not a folder.")
        if not names:
            raise ConfigError("tasks=[] must name at least one task.")
        _check_counts(limit=limit, batch_size=batch_size, num_fewshot=num_fewshot)
        if data_dir is not None and num_fewshot:
            raise ConfigError(
                f"num_fewshot={num_fewshot} must be 0 with data_dir, which only contains the evaluated items."
            )
        self.names, self.data_dir = list(dict.fromkeys(names)), data_dir
        self.limit, self.num_fewshot, self.batch_size = limit, num_fewshot, batch_size
        self.share_prefixes, self.include_path = share_prefixes, include_path
        paths = [str(GROUPS_FOLDER)]
        if data_dir is not None:
            paths.append(str(LOCAL_FOLDER))
        if include_path is not None:
            paths.append(include_path)
        self._manager = self._find(paths)
        self._objects: list[Any] | None = None

    def _find(self, paths: list[str]) -> Any:
        """Returns a task manager with all names; the tasks of the harness are only listed if needed."""
        from lm_eval.tasks import TaskManager

        metadata = {} if self.data_dir is None else {"data_dir": str(Path(self.data_dir).resolve())}
        with _quiet():
            if self.data_dir is not None:
                local = TaskManager(include_path=paths, include_defaults=False, metadata=metadata)
                if all(name in local.all_tasks for name in self.names):
                    return local
            every = TaskManager(include_path=paths, metadata=metadata)
        unknown = [name for name in self.names if name not in every.all_tasks]
        if unknown:
            guesses = difflib.get_close_matches(unknown[0], every.all_tasks, n=3, cutoff=0.5)
            guess = f" Nearest: {', '.join(guesses)}." if guesses else ""
            raise ConfigError(
                f"tasks: unknown task '{unknown[0]}'.{guess} Known are {len(every.all_tasks)} names of lm-eval "
                "(lm-eval ls tasks), paper10, llmpruner7, zpruner5, and those of include_path."
            )
        return every

    def settings(self) -> dict[str, Any]:
        """Returns the settings that determine the results, as plain data."""
        import lm_eval

        names = ("names", "data_dir", "include_path", "limit", "num_fewshot")
        return {name: getattr(self, name) for name in names} | {"harness": lm_eval.__version__}

    def load(self) -> list[Any]:
        """Reads the data of the tasks once and returns the task objects, in the order of their names.

        Raises:
            ConfigError: A data set cannot be read (no network, or a missing file).
        """
        if self._objects is None:
            objects: dict[str, Any] = {}  # a task with several names is listed once
            with _quiet():
                try:
                    for name in self.names:
                        objects |= {
                            k: task for k, task in self._manager.load([name])["tasks"].items() if k not in objects
                        }
                except ConfigError:
                    raise
                except Exception as error:  # datasets and the hub raise many kinds of errors
                    hint = "" if self.data_dir else " Without a network, use local copies with data_dir."
                    names = ", ".join(self.names)
                    raise ConfigError(
                        f"The data of the tasks {names} cannot be read: {first_line(error)}.{hint}"
                    ) from error
            self._objects = list(objects.values())
        return self._objects

    def run(self, model: Any, tokenizer: Any) -> ZeroShot:
        """Returns the results of ``model``.

        Args:
            model: A supported Hugging Face causal LM.
            tokenizer: Its tokenizer.

        Raises:
            ConfigError: The data cannot be read.
        """
        import lm_eval

        start = time.perf_counter()
        objects = self.load()
        with phase("running the zero-shot tasks"), _quiet(), isolated_rng():  # the harness seeds everything
            evaluated: Any = lm_eval.simple_evaluate(
                model=_harness_model(model, tokenizer, self.batch_size, self.share_prefixes),
                tasks=objects,
                task_manager=self._manager,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                bootstrap_iters=1000,
                log_samples=False,
            )
        results = {task.task_name: _result(evaluated, task.task_name) for task in objects}
        main = [task.main[1] for task in results.values() if task.main is not None]
        acc = [task.metrics["acc"] for task in results.values() if "acc" in task.metrics]
        return ZeroShot(
            tasks=results,
            average=sum(main) / len(main) if main else None,
            average_acc=sum(acc) / len(acc) if acc else None,
            harness=lm_eval.__version__,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            data_dir=self.data_dir,
            seconds=time.perf_counter() - start,
        )


def _harness_model(model: Any, tokenizer: Any, batch_size: int, share_prefixes: bool | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    from hfprune.evaluation.prefix_lm import PrefixLM

    share = model.device.type == "cpu" if share_prefixes is None else share_prefixes
    if share:
        return PrefixLM(model, tokenizer, batch_size=batch_size)
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _result(results: Any, name: str) -> TaskResult:
    """Returns the results of a task, which the harness names ``metric,filter``."""
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for key, value in results["results"][name].items():
        metric, comma, kind = key.partition(",")
        if not isinstance(value, int | float) or not comma:
            continue
        ending = "" if kind == "none" else f",{kind}"
        if metric.endswith("_stderr"):
            stderr[metric.removesuffix("_stderr") + ending] = float(value)
        else:
            metrics[metric + ending] = float(value)
    return TaskResult(
        metrics=metrics,
        stderr=stderr,
        num_items=results["n-samples"][name]["effective"],
        num_fewshot=int(results["n-shot"][name]),
        version=str(results["versions"].get(name)),
    )


def _check_counts(*, limit: int | None, batch_size: int, num_fewshot: int | None) -> None:
    for name, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value} must be at least {least}.")


def _check_installed() -> None:
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('Zero-shot tasks require lm-eval: pip install "hfprune[eval]".')


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides log messages of the harness about overridden tasks and the loaded model, progress bars and warnings."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    logger, bars = logging.getLogger("lm_eval"), is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lm_eval|datasets|fsspec")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            enable_progress_bar()
