"""Saving: writes pruned models, and checks and measures the files.

``OUT/`` holds ``model/`` (config, safetensors, tokenizer, generation config, ``plan.json``), ``plan.json``,
``importance.safetensors``, ``report.json``, ``report.html``, ``figures/`` and, for ``fit``, ``checkpoints/``.
"""

import shlex
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hfprune.io.layouts import LAYOUTS, shapes
from hfprune.io.load import load_causal_lm, meta_model
from hfprune.io.load_sharded import whole_parameters
from hfprune.io.output_folder import IMPORTANCE_FILE, check_apart, check_replaceable, check_results, is_evaluation
from hfprune.io.progress import no_progress_bars
from hfprune.models.groups import class_name, mlp_widths, parameter_count
from hfprune.models.transformers4 import write_both_forms
from hfprune.plan import PLAN_FILE, PruningPlan
from hfprune.utils.errors import ConfigError, HFPruneError, OutputError
from hfprune.utils.files import FailedCheckError, replaced_folder, tidy, write_json, write_tensors
from hfprune.utils.progress import phase


def measure_saved(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Returns the contents of the weight files of ``folder``; raises ``OutputError`` unless they hold ``model``.

    Tied weights are stored once: the number of stored parameters equals the model's own count. Stored shapes are
    compared with those that config.json, with the plan where layers differ, says.
    """
    stored: dict[str, list[int]] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    count, expected = sum(torch.Size(shape).numel() for shape in stored.values()), parameter_count(model)
    if count != expected:
        raise OutputError(f"The saved files hold {count:,} parameters, the pruned model has {expected:,}.")
    described = meta_model(str(folder))
    expected_shapes = shapes(described.state_dict().items())
    for name, shape in stored.items():
        if expected_shapes.get(name, shape) != shape:  # some classes are saved under names of older versions
            raise OutputError(f"The saved {name} has shape {shape}; by the saved config it is {expected_shapes[name]}.")
    widths = list(mlp_widths(described))
    width = widths[0] if len(set(widths)) == 1 else None
    return {
        "parameters": count,
        "width": width,
        "widths": widths,
        "bytes": weight_bytes(folder),
    }


def weight_bytes(folder: Path) -> int:
    """Returns the size of the weight files in ``folder``."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def saved_line(folder: Path, saved: Mapping[str, Any]) -> str:
    """Returns where a model was saved, how large it is, how much of it is padding, and how many weights are zero.

    >>> saved = {"bytes": 3 * 2**20, "layout": "padded", "parameters": 1000, "parameters_needed": 900}
    >>> saved_line(Path("out/model"), saved)
    'Saved to out/model (3 MiB, layout padded: 100 of 1,000 parameters are padding, all zero)'
    """
    zeros = saved["parameters"] - saved["parameters_needed"]
    sparse = _sparse_line(saved["sparsity"]) if saved.get("sparsity") else ""
    padding = f": {zeros:,} of {saved['parameters']:,} parameters are padding, all zero" if zeros else ""
    return f"{sparse}Saved to {folder} ({saved['bytes'] / 2**20:,.0f} MiB, layout {saved['layout']}{padding})"


def _sparse_line(found: Mapping[str, Any]) -> str:
    groups = f", in {found['groups']:,} groups of n:m" if found["groups"] else ""
    zeros = f"{found['zeros']:,} of {found['weights']:,} weights are zero ({found['achieved']:.2%})"
    return f"In the saved projections {zeros}{groups}.\n"


@contextmanager
def checking() -> Iterator[None]:
    """Raises ``FailedCheckError`` where a check of complete files fails: they are kept then."""
    try:
        yield
    except HFPruneError as error:
        raise FailedCheckError(str(error)) from error


def check_reload(folder: Path, model: Any, *, written: Any = None, tolerance: float = 1e-5) -> float:
    """Loads ``folder`` and returns the largest difference of its logits to those of the model in memory.

    Weights must be equal. Logits are compared on the CPU, where equal weights give equal bits: which kernel an
    accelerator takes depends on where in its memory a weight lies. Where rounding alone may be larger than the
    tolerance, they are compared again in float64.

    A model with a stock config is loaded by stock transformers, others as by :func:`hfprune.load`.

    Args:
        folder: The saved model.
        model: The model in memory.
        written: The model whose weights are in ``folder``; ``model`` if not given.
        tolerance: Accepted difference, relative to the largest logit.

    Raises:
        OutputError: Weights or logits differ, or weights that were tied came apart.
    """
    written = model if written is None else written
    reloaded = load_causal_lm(str(folder), dtype=str(model.dtype).removeprefix("torch.")).eval()  # type: ignore[arg-type]
    if parameter_count(reloaded) != parameter_count(written):
        raise OutputError(
            f"The reloaded model has {parameter_count(reloaded):,} parameters, the saved one "
            f"{parameter_count(written):,}: tied weights came apart."
        )
    _check_weights(reloaded, written)
    difference, limit = _difference(model, reloaded, tolerance)
    if not difference <= limit:
        with _in_float64(model), _in_float64(reloaded):
            wide, limit = _difference(model, reloaded, tolerance)
        if not wide <= limit:
            raise OutputError(
                f"The reloaded model's logits differ from the one in memory by {wide:.2g} (> {limit:.2g})."
            )
    return difference


def _check_weights(reloaded: nn.Module, written: nn.Module) -> None:
    found = reloaded.state_dict()
    for name, tensor in written.state_dict().items():
        other = found.get(name)
        if other is None or not torch.equal(other, tensor.detach().to("cpu", other.dtype)):
            raise OutputError(f"The reloaded {name} is not the one in memory.")


def _difference(model: Any, reloaded: Any, tolerance: float) -> tuple[float, float]:
    """Returns the largest difference of the logits, and the largest that is accepted."""
    expected, found = _first_logits(model), _first_logits(reloaded)
    return float((expected - found).abs().max()), tolerance * max(1.0, float(expected.abs().max()))


@contextmanager
def _in_float64(model: nn.Module) -> Iterator[None]:
    """Converts a model to float64; the original tensors are restored at the end."""
    held = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    try:
        for tensor, data in held:
            tensor.data = data.double()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


def _first_logits(model: Any) -> torch.Tensor:
    """Returns the logits [1, 16, V] of the first token ids, float64, run on the CPU; the model stays where it was."""
    home, training = model.device, model.training
    try:
        model.to("cpu").eval()
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=torch.arange(16).unsqueeze(0) % model.config.vocab_size).logits
    finally:
        model.to(home).train(training)
    return logits.double()


def check_output_dir(output_dir: str | Path, *, overwrite: bool, need_bytes: int = 0) -> Path:
    """Returns the output folder after checking that results can be written there; leaves nothing behind.

    Args:
        output_dir: Where results will be written.
        overwrite: Accept a folder that is not empty: results that hfprune wrote stay until new ones replace them, other
            files stay.
        need_bytes: Expected size of the results.

    Raises:
        ConfigError: The folder is not empty, not a folder, not writable, or its disk too full; or something in it that
            hfprune did not write has the name of a result.
    """
    out = Path(output_dir)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output_dir='{out}' is a file, not a folder.")
    tidy(out)
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ConfigError(
            f"output_dir='{out}' is not empty. Choose another folder, or set overwrite=True to replace its results."
        )
    check_results(out)
    existing = check_writable(out, "output_dir")
    free = shutil.disk_usage(existing).free
    if free < need_bytes:
        raise ConfigError(
            f"output_dir='{out}' needs about {need_bytes / 2**20:,.0f} MiB, its disk has {free / 2**20:,.0f} MiB free."
        )
    return out


def check_writable(folder: Path, argument: str, *, name: str | Path | None = None) -> Path:
    """Returns the nearest folder that exists, ``folder`` or one above it, after a test write; leaves nothing behind.

    Args:
        folder: Where results will be written.
        argument: The argument that asked for it, for the message.
        name: Its value; ``folder`` if not given.

    Raises:
        ConfigError: It cannot be written.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{argument}='{name or folder}' cannot be written: {error.strerror or error}.") from error
    return existing


def check_output_file(path: str | Path, argument: str) -> None:
    """Raises ``ConfigError`` where the figures of an evaluation cannot be written; leaves nothing behind.

    A file there is replaced only when it holds such figures.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{argument}='{path}' is a folder; a file name is needed.")
    if path.exists() and not is_evaluation(path):
        raise ConfigError(f"{argument}='{path}' exists and is not the result of an evaluation. Choose another name.")
    check_writable(path.absolute().parent, argument, name=path)


def command_line() -> str:
    """Returns the command that is running, as one would type it again."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def save_importance(importance: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the scores of every group, [U] float64, in one step."""
    write_tensors(folder / IMPORTANCE_FILE, importance)


def load_importance(folder: str | Path) -> dict[str, Tensor]:
    """Returns group name -> scores [U] of a run's folder; empty when it holds none.

    Raises:
        ConfigError: The file is damaged.
    """
    path = Path(folder) / IMPORTANCE_FILE
    if not path.is_file():
        return {}
    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"'{path}' cannot be read: {error}.") from error
    return found


def export_model(
    model: Any,
    tokenizer: Any,
    plan: PruningPlan,
    target: str | Path,
    *,
    layout: str = "uniform",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes a pruned model as a folder, in one of the ``LAYOUTS``, and measures what was written.

    Args:
        model: The pruned Hugging Face model, without adapters.
        tokenizer: Its tokenizer, or None.
        plan: What was pruned; saved as ``plan.json``.
        target: The model folder. Nothing may be there, or an empty folder, or, with ``overwrite``, a model that hfprune
            wrote.
        layout: ``uniform`` (plain ``from_pretrained`` loads it), ``per_layer`` (:func:`hfprune.load` does),
            ``padded`` (plain ``from_pretrained``; layers of fewer units are filled up with zeros), or ``bitmask``
            (:func:`hfprune.load`; zeros of sparse models take no space).
        overwrite: Replace a model that hfprune wrote.

    Returns:
        ``layout``; ``parameters``, ``width`` (None where layers differ), ``widths``, ``bytes`` as measured on the saved
        files; ``parameters_needed``, those of ``model``; and ``max_logit_difference_after_reload``.

    Raises:
        ConfigError: The layout cannot express the model, or ``target`` may not be replaced; nothing was written.
        OutputError: Writing failed, or the files do not hold the model in memory; ``target`` is as it was. In
            the second case what was written is kept as ``TARGET.failed-check``.

    Example:
        >>> import tempfile
        >>> from hfprune.io.layouts import apply_plan
        >>> from hfprune.models import find_groups
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> groups = find_groups(model)
        >>> keep = {groups[0].name: range(12), groups[1].name: range(8)}
        >>> plan = PruningPlan(model_class="LlamaForCausalLM", groups=groups, keep=keep, config={})
        >>> apply_plan(model, plan)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = export_model(model, None, plan, Path(folder) / "model", layout="per_layer")
        >>> saved["layout"], saved["widths"], saved["max_logit_difference_after_reload"]
        ('per_layer', [12, 8], 0.0)
    """
    target = Path(target)
    _check_target(target, model, overwrite=overwrite)
    chosen = LAYOUTS.get(layout)
    written = chosen.written(model)
    with replaced_folder(target) as stage, no_progress_bars():
        with phase("saving"):
            written.save_pretrained(stage)
            if tokenizer is not None:
                tokenizer.save_pretrained(stage)
            plan.save(stage / PLAN_FILE)
            write_both_forms(stage)
        with checking():
            saved = {"layout": layout, **measure_saved(stage, written), "parameters_needed": parameter_count(model)}
        if chosen.compress(stage):
            saved["bytes"] = weight_bytes(stage)
        with phase("checking the reload"), checking():
            difference = check_reload(stage, model, written=written, tolerance=chosen.tolerance(model.dtype))
        return saved | {"max_logit_difference_after_reload": difference}


def _check_target(target: Path, model: Any, *, overwrite: bool) -> None:
    """Raises ``ConfigError`` where a model folder may not be replaced, or is what ``model`` was read from."""
    check_apart(target, {"the model's folder": getattr(model, "name_or_path", None)}, argument="target", names=None)
    check_replaceable(target, overwrite=overwrite, argument="target")


def export_sharded(
    model: Any,
    tokenizer: Any,
    plan: PruningPlan,
    target: str | Path,
    *,
    writer: bool,
    layout: str = "uniform",
    overwrite: bool = False,
    file_bytes: int = 2**30,
) -> dict[str, Any]:
    """Writes a pruned model whose weights are sharded over ranks: gathered one parameter at a time, in several files.

    Every rank must call it.

    Args:
        model: The sharded model, without adapters.
        tokenizer: Its tokenizer, or None.
        plan: What was pruned.
        target: The model folder, as in ``export_model``.
        writer: Whether this rank writes; exactly one does.
        layout: ``uniform`` or ``per_layer``.
        overwrite: Replace a model that hfprune wrote.
        file_bytes: Largest size of a file, unless a single tensor exceeds it.

    Returns:
        As ``export_model``, but no check of the logits; nothing on the ranks that do not write.

    Raises:
        ConfigError: The layout cannot express the model, or is not one that is written parameter by parameter, or
            ``target`` may not be replaced.
        OutputError: As in ``export_model``.
    """
    check_shards(layout)
    LAYOUTS.get(layout).check(model)
    parameters = whole_parameters(model)
    try:
        if not writer:
            return {}
        _check_target(Path(target), model, overwrite=overwrite)
        with phase("saving"), replaced_folder(Path(target)) as stage:
            _write_weights(model, parameters, stage, file_bytes=file_bytes)
            model.config.architectures = [class_name(model)]
            model.config.dtype = str(model.dtype).removeprefix("torch.")  # as save_pretrained does
            model.config.save_pretrained(stage)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(stage)
            if tokenizer is not None:
                tokenizer.save_pretrained(stage)
            plan.save(stage / PLAN_FILE)
            write_both_forms(stage)
            with checking():
                return {"layout": layout, **measure_saved(stage, model), "parameters_needed": parameter_count(model)}
    finally:
        deque(parameters, maxlen=0)  # also after an error: the other ranks go on gathering


def check_shards(layout: str) -> None:
    """Raises ``ConfigError`` unless a model that is spread over ranks can be written in ``layout``."""
    if not LAYOUTS.get(layout).shards:
        able = ", ".join(name for name in LAYOUTS if LAYOUTS.get(name).shards)
        raise ConfigError(
            f"layout='{layout}' needs the whole model on one rank; ModelParallelStrategy writes {able}. Write one of "
            f"these, then run hfprune export on the model folder with layout='{layout}'."
        )


def _write_weights(
    model: nn.Module, parameters: Iterator[tuple[str, Tensor]], folder: Path, *, file_bytes: int
) -> None:
    """Writes the files and the index that ``from_pretrained`` reads.

    Args:
        model: The model; sizes of its parameters, which may be sharded, decide what stands in which file.
        parameters: The same parameters, whole. Those of an unfinished file wait in memory.
        folder: The model folder.
        file_bytes: Size that a file does not exceed, unless a single tensor does.
    """
    split = split_state_dict_into_shards_factory(
        dict(model.named_parameters()),
        get_storage_size=lambda parameter: parameter.numel() * parameter.element_size(),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=file_bytes,
    )
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parameters:
        file = split.tensor_to_filename[name]
        waiting.setdefault(file, {})[name] = tensor.contiguous()
        if len(waiting[file]) == len(split.filename_to_tensors[file]):
            save_file(waiting.pop(file), folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
