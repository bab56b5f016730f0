"""Saving of pruned models, with checks and measurements of the written files.

``OUT/`` holds ``model/`` (config, safetensors, tokenizer, generation config, ``plan.json``), ``plan.json``,
``importance.safetensors``, ``report.json``, ``report.html``, ``figures/`` and, for ``fit``, ``checkpoints/``.
"""

import re
import shlex
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
from hfprune.utils.compat import attention_implementation, safetensors_metadata
from hfprune.utils.errors import ConfigError, HFPruneError, OutputError
from hfprune.utils.files import FailedCheckError, replaced_folder, sort_metadata, tidy, write_json, write_tensors
from hfprune.utils.progress import phase
from hfprune.version import __version__


def measure_saved(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Returns parameters, widths and size of a saved model, measured on its weight files.

    The number of stored parameters (tied weights count once) is compared with that of ``model``, and the stored shapes
    with those described by the saved config.

    Args:
        folder: The saved model.
        model: The model in memory.

    Raises:
        OutputError: The files do not hold the model.
    """
    stored: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    buffers = {name for name, _ in model.named_buffers()}  # the correction bias of a router is saved
    sizes = [torch.Size(shape).numel() for name, shape in stored.items() if name not in buffers]
    count, expected = sum(sizes), parameter_count(model)
    if count != expected:
        raise OutputError(f"The saved files hold {count:,} parameters, the pruned model has {expected:,}.")
    described = meta_model(str(folder))
    expected_shapes = shapes(described.state_dict().items())
    for name, shape in stored.items():
        if expected_shapes.get(name, shape) != shape:  # some classes are saved with names of older versions
            raise OutputError(f"The saved {name} has shape {shape}; by the saved config it is {expected_shapes[name]}.")
    widths = list(mlp_widths(described))
    width = widths[0] if len(set(widths)) == 1 else None
    return {"parameters": count, "width": width, "widths": widths, "bytes": weight_bytes(folder)}


def weight_bytes(folder: Path) -> int:
    """Returns the size of the weight files in ``folder``, in bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def saved_line(folder: Path, saved: Mapping[str, Any]) -> str:
    """Returns a summary of a saved model: folder, size, padding and zero weights.

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
    """Context that raises ``FailedCheckError`` if a check of complete files fails, so that they are kept."""
    try:
        yield
    except HFPruneError as error:
        raise FailedCheckError(str(error)) from error


def check_reload(folder: Path, model: Any, *, written: Any = None, tolerance: float = 1e-5) -> float:
    """Loads ``folder`` and returns the largest difference between its logits and those of the model in memory.

    Weights must be equal. Logits are compared on the CPU, where equal weights give the same bits; kernels of an
    accelerator depend on the memory alignment of a weight. Logits that differ by more than the tolerance are compared
    again in float64.

    Args:
        folder: The saved model.
        model: The model in memory.
        written: The model whose weights are in ``folder``; ``model`` if not given.
        tolerance: Accepted difference, relative to the largest logit.

    Raises:
        OutputError: Weights or logits differ, or tied weights were separated.
    """
    written = model if written is None else written
    reloaded = load_causal_lm(str(folder), dtype=str(model.dtype).removeprefix("torch.")).eval()  # type: ignore[arg-type]
    if parameter_count(reloaded) != parameter_count(written):
        raise OutputError(
            f"The reloaded model has {parameter_count(reloaded):,} parameters, the saved one "
            f"{parameter_count(written):,}: tied weights were separated."
        )
    _check_weights(reloaded, written)
    with _same_attention(model, reloaded):
        difference, limit = _difference(model, reloaded, tolerance)
        if not difference <= limit:
            with _in_float64(model), _in_float64(reloaded):
                wide, limit = _difference(model, reloaded, tolerance)
            if not wide <= limit:
                raise OutputError(
                    f"The reloaded model's logits differ from those in memory by {wide:.2g} (> {limit:.2g})."
                )
    return difference


@contextmanager
def _same_attention(model: Any, reloaded: Any) -> Iterator[None]:
    """Lets both models run the attention of ``model``; ``sdpa`` in place of kernels that need an accelerator."""
    own = attention_implementation(model.config)
    shared = own if own in ("eager", "sdpa") else "sdpa"
    if attention_implementation(reloaded.config) != shared:
        reloaded.set_attn_implementation(shared)
    if shared == own:
        yield
        return
    model.set_attn_implementation(shared)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _check_weights(reloaded: nn.Module, written: nn.Module) -> None:
    found = reloaded.state_dict()
    for name, tensor in written.state_dict().items():
        other = found.get(name)
        if other is None or not torch.equal(other, tensor.detach().to("cpu", other.dtype)):
            raise OutputError(f"The reloaded {name} differs from the one in memory.")


def _difference(model: Any, reloaded: Any, tolerance: float) -> tuple[float, float]:
    """Returns the largest difference of the logits and the accepted difference."""
    expected, found = _first_logits(model), _first_logits(reloaded)
    return float((expected - found).abs().max()), tolerance * max(1.0, float(expected.abs().max()))


@contextmanager
def _in_float64(model: nn.Module) -> Iterator[None]:
    """Converts a model to float64 inside the block, and restores the original tensors."""
    held = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    try:
        for tensor, data in held:
            tensor.data = data.double()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data


def _first_logits(model: Any) -> torch.Tensor:
    """Returns the logits [1, 16, V], float64, of the first 16 token ids, computed on the CPU."""
    home, training = model.device, model.training
    try:
        model.to("cpu").eval()
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=torch.arange(16).unsqueeze(0) % model.config.vocab_size).logits
    finally:
        model.to(home).train(training)
    return logits.double()


def check_output_dir(output_dir: str | Path, *, overwrite: bool, need_bytes: int = 0) -> Path:
    """Returns the output folder after checking that results can be written to it; writes no files.

    Args:
        output_dir: The output folder.
        overwrite: Whether the folder may hold files; empty subfolders are none. Existing results are kept until new
            ones replace them, and other files are not changed.
        need_bytes: Expected size of the results.

    Raises:
        ConfigError: The path is not a folder, not empty or not writable, its disk is too full, or it holds a file with
            the name of a result that hfprune did not write.
    """
    out = Path(output_dir)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"output_dir='{out}' is a file, not a folder.")
    tidy(out)
    if not overwrite and _holds_files(out):
        raise ConfigError(
            f"output_dir='{out}' is not empty. Choose another folder, or set overwrite=True to replace its results."
        )
    check_results(out)
    existing = check_writable(out, "output_dir")
    free = shutil.disk_usage(existing).free
    if free < need_bytes:
        raise ConfigError(
            f"output_dir='{out}' needs about {need_bytes / 2**20:,.0f} MiB, but its disk has only "
            f"{free / 2**20:,.0f} MiB free."
        )
    return out


def _holds_files(folder: Path) -> bool:
    """Returns whether a file or a link is anywhere in a folder."""
    return any(path.is_symlink() or not path.is_dir() for path in folder.rglob("*"))


def check_writable(folder: Path, argument: str, *, name: str | Path | None = None) -> Path:
    """Returns ``folder`` or its nearest existing parent after a test write to it.

    Args:
        folder: The output folder.
        argument: Name of the argument that gave it, for the message.
        name: Value of that argument; ``folder`` if not given.

    Raises:
        ConfigError: The folder is not writable.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{argument}='{name or folder}' cannot be written: {error.strerror or error}.") from error
    return existing


def check_output_file(path: str | Path, argument: str) -> None:
    """Raises ``ConfigError`` if the results of an evaluation cannot be written to ``path``.

    An existing file is only replaced if it holds such results.

    Args:
        path: The output file.
        argument: Name of the argument that gave it, for the message.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{argument}='{path}' is a folder; a file name is needed.")
    if path.exists() and not is_evaluation(path):
        raise ConfigError(f"{argument}='{path}' exists and is not the result of an evaluation. Choose another name.")
    check_writable(path.absolute().parent, argument, name=path)


def command_line() -> str:
    """Returns the running command, quoted for a shell; access tokens are replaced."""
    return shlex.join([Path(sys.argv[0]).name, *without_tokens(sys.argv[1:])])


def without_tokens(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line with ``TOKEN`` in place of access tokens.

    >>> without_tokens(["prune", "--model.token", "hf_a", "--token=hf_b", "--ratio", "0.2"])
    ['prune', '--model.token', 'TOKEN', '--token=TOKEN', '--ratio', '0.2']
    >>> without_tokens(["--model={path: M, token: hf_a}"])
    ['--model={path: M, token: TOKEN}']
    """
    found: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, _ = word.partition("=")
        if _is_token_flag(before):
            found.append("TOKEN")
        else:
            found.append(f"{flag}=TOKEN" if equals and _is_token_flag(flag) else _TOKEN_ENTRY.sub(r"\1TOKEN", word))
    return found


_TOKEN_ENTRY = re.compile(r"""(["']?\btoken["']?\s*:\s*["']?)[^\s"',}]+""")
"""The entry of a token in options that are written as YAML or JSON."""


def _is_token_flag(word: str) -> bool:
    return word.startswith("-") and word.lstrip("-").rpartition(".")[2] == "token"


def save_importance(importance: Mapping[str, Tensor], folder: str | Path) -> None:
    """Writes the scores of every group, [U] float64, atomically."""
    write_tensors(Path(folder) / IMPORTANCE_FILE, importance)


def load_importance(folder: str | Path) -> dict[str, Tensor]:
    """Returns the scores in an output folder, group name -> [U]; empty if there are none.

    Args:
        folder: Output folder of a run.

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
    """Writes a pruned model to a folder in one of the ``LAYOUTS``, and checks the written files.

    Args:
        model: The pruned Hugging Face model, without adapters.
        tokenizer: Its tokenizer, or None.
        plan: The pruning plan, saved as ``plan.json``.
        target: The model folder. It must not exist or be empty, unless ``overwrite`` is set.
        layout: ``uniform`` (loads with stock transformers), ``per_layer`` (loads with :func:`hfprune.load`), ``padded``
            (stock; layers with fewer units are padded with zeros), or ``bitmask`` (:func:`hfprune.load`; zeros of
            sparse models take no space).
        overwrite: Whether to replace a model written by hfprune.

    Returns:
        ``layout``; ``parameters``, ``width`` (None if layers differ), ``widths`` and ``bytes``, measured on the files;
        ``parameters_needed``, the number of parameters of ``model``; and ``max_logit_difference_after_reload``.

    Raises:
        ConfigError: The layout cannot express the model, or ``target`` may not be replaced; nothing was written.
        OutputError: Writing failed, or the files do not hold the model in memory; ``target`` is unchanged. In the
            second case, the files are kept as ``TARGET.failed-check``.

    Example:
        >>> import tempfile
        >>> import hfprune
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> plan = hfprune.make_plan(model, keep={"model.layers.0.mlp": range(12)})
        >>> hfprune.apply_plan(model, plan)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = export_model(model, None, plan, Path(folder) / "model", layout="per_layer")
        >>> saved["layout"], saved["widths"], saved["max_logit_difference_after_reload"]
        ('per_layer', [12, 16], 0.0)
    """
    target = Path(target)
    _check_target(target, model, overwrite=overwrite)
    chosen = LAYOUTS.get(layout)
    written = chosen.written(model)
    with replaced_folder(target) as stage, no_progress_bars():
        with phase("saving"):
            with safetensors_metadata(export_facts(plan)):
                written.save_pretrained(stage)
            for file in stage.glob("*.safetensors"):
                sort_metadata(file)
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
            chosen.complete(stage, written)
        return saved | {"max_logit_difference_after_reload": difference}


def export_facts(plan: PruningPlan) -> dict[str, str]:
    """Returns the metadata of exported safetensors files: version, plan, and the model that was pruned.

    Of a model in a folder the folder's name is given, not its place on this machine.

    >>> plan = PruningPlan(model_class="X", groups=(), keep={}, config={}, provenance={"model": {"path": "org/base"}})
    >>> sorted(export_facts(plan))
    ['hfprune_base_model', 'hfprune_plan', 'hfprune_version']
    """
    base = (plan.provenance.get("model") or {}).get("path")
    facts = {"hfprune_version": __version__, "hfprune_plan": plan.digest()}
    return facts | ({"hfprune_base_model": Path(base).name if Path(base).is_dir() else str(base)} if base else {})


def _check_target(target: Path, model: Any, *, overwrite: bool) -> None:
    """Raises ``ConfigError`` if a model folder may not be replaced, or ``model`` was loaded from it."""
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
    """Writes a pruned model whose weights are sharded over ranks, gathered one parameter at a time.

    Every rank must call this function.

    Args:
        model: The sharded model, without adapters.
        tokenizer: Its tokenizer, or None.
        plan: The pruning plan.
        target: The model folder, as in :func:`export_model`.
        writer: Whether this rank writes; exactly one rank does.
        layout: ``uniform`` or ``per_layer``.
        overwrite: Whether to replace a model written by hfprune.
        file_bytes: Maximum size of a file, unless a single tensor is larger.

    Returns:
        As :func:`export_model`, without a comparison of logits; empty on ranks that do not write.

    Raises:
        ConfigError: The layout cannot express a sharded model, or ``target`` may not be replaced.
        OutputError: As in :func:`export_model`.
    """
    check_shards(layout)
    LAYOUTS.get(layout).check(model)
    parameters = whole_parameters(model)
    try:
        if not writer:
            return {}
        _check_target(Path(target), model, overwrite=overwrite)
        with phase("saving"), replaced_folder(Path(target)) as stage:
            _write_weights(model, parameters, stage, file_bytes=file_bytes, facts=export_facts(plan))
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
                saved = {"layout": layout, **measure_saved(stage, model), "parameters_needed": parameter_count(model)}
                LAYOUTS.get(layout).complete(stage, model)
            return saved
    finally:
        deque(parameters, maxlen=0)  # after an error, too: the other ranks continue to gather


def check_shards(layout: str) -> None:
    """Raises ``ConfigError`` unless a model sharded over ranks can be written in ``layout``."""
    if not LAYOUTS.get(layout).shards:
        able = ", ".join(name for name in LAYOUTS if LAYOUTS.get(name).shards)
        raise ConfigError(
            f"layout='{layout}' needs the whole model on one rank; ModelParallelStrategy writes {able}. Write one of "
            f"these, then run hfprune export on the model folder with layout='{layout}'."
        )


def _write_weights(
    model: nn.Module,
    parameters: Iterator[tuple[str, Tensor]],
    folder: Path,
    *,
    file_bytes: int,
    facts: Mapping[str, str],
) -> None:
    """Writes the weight files and their index for ``from_pretrained``.

    Args:
        model: The model; its parameters may be sharded.
        parameters: The gathered parameters. Those of an incomplete file are held in memory.
        folder: The model folder.
        file_bytes: Maximum size of a file, unless a single tensor is larger.
        facts: Metadata of every file.
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
            save_file(waiting.pop(file), folder / file, metadata={"format": "pt", **facts})
            sort_metadata(folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
