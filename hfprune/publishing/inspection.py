"""Inspection: what a folder holds, what was removed from it, by which recipe, and what loads it."""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfprune.io.loading import LoadingOptions
from hfprune.plan import LAYERS, SUBLAYERS, UNIT_KINDS, Group, PruningPlan, skip_text
from hfprune.publishing.engine_rules import engine_line, facts_of, verdicts
from hfprune.publishing.engines import largest_multiple
from hfprune.publishing.folder import BITMASK_FILE, PrunedFolder, hub_id, open_folder, read_object
from hfprune.utils.errors import ConfigError, first_line

_STOCK = "AutoModelForCausalLM.from_pretrained('{path}')"
LOADERS = {
    "uniform": f"transformers: {_STOCK}",
    "padded": f"transformers: {_STOCK} (narrower layers are filled up with zeros)",
    "per_layer": f"hfprune: hfprune.load('{{path}}'), or import hfprune.auto before {_STOCK}",
    "bitmask": "hfprune: hfprune.load('{path}')",
    "nemotron_nas": f"transformers: {_STOCK[:-1]}, trust_remote_code=True)",
    "plan": "hfprune: hfprune.load('{base}', plan='{path}')",
}
"""Layout -> what loads it."""

_SHOWN = ("criterion", "objective", "allocation", "compensation", "rounds", "distillation", "depth_scores")


def inspect_folder(path: str, *, loading: LoadingOptions | None = None) -> dict[str, Any]:
    """Returns what a folder holds, as plain data. No weights are read but the headers of their files.

    Args:
        path: ``OUT``, ``OUT/model``, any model folder, a plan package, or a hub id.
        loading: Revision, subfolder, token and others.

    Returns:
        ``model`` (class, layers, widths, parameters, bytes), ``layout``, ``loads_with``, ``engines`` (see
        :func:`hfprune.publishing.engine_rules.verdicts`), ``removed`` by unit kind, ``layers``, ``recipe`` and
        ``figures`` by stage; what is not known is left out. For a dense model ``architecture``: its units, and what can
        be removed.

    Raises:
        ConfigError: There is no model and no plan, or a file is damaged.
        PlanError: The plan is damaged.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LlamaForCausalLM(config).save_pretrained(folder)
        ...     found = inspect_folder(folder)
        >>> found["model"]["class"], found["model"]["parameters"], found["layout"], "removed" in found
        ('LlamaForCausalLM', 1832, 'uniform', False)
    """
    folder = open_folder(path, argument="path", loading=loading)
    shown = str(folder.model) if os.path.exists(os.path.expanduser(path)) else path  # the hub's cache is of no interest
    found: dict[str, Any] = {"path": shown, "model": _model(folder), "layout": folder.layout}
    found["loads_with"] = LOADERS[folder.layout].format(path=shown, base=hub_id(folder.base) or folder.base)
    found["engines"] = verdicts(facts_of(folder.config, found["model"].get("mlp_widths", []), layout=folder.layout))
    if folder.adapter is not None:
        found["adapter"] = f"hfprune: hfprune.load('{folder.adapter}')"
    if folder.plan is not None:
        found |= {"removed": _removed(folder.plan), "layers": _layers(folder.plan), "recipe": _recipe(folder)}
    elif folder.layout == "uniform":
        found["architecture"] = _architecture(str(folder.model))
    figures = {name: _figures(stage) for name, stage in folder.stages().items()}
    return found | ({"figures": figures} if figures else {})


def _architecture(path: str) -> dict[str, Any]:
    from hfprune.io.load import meta_model
    from hfprune.publishing.architecture import inspect_architecture

    try:
        return inspect_architecture(meta_model(path))
    except ConfigError as error:  # a config that no class of the installed transformers reads
        return {"refused": str(error)}


def _model(folder: PrunedFolder) -> dict[str, Any]:
    config, headers = folder.config, [_header(file) for file in sorted(folder.model.glob("*.safetensors"))]
    tensors = {name: entry["shape"] for header in headers for name, entry in header.items() if name != "__metadata__"}
    if folder.layout == "bitmask":
        tensors = _unpacked(tensors, read_object(folder.model / BITMASK_FILE).get("shapes") or {})
    metadata = next((header.get("__metadata__") for header in headers), None) or {}
    widths = _widths(tensors) if folder.config else []
    found = {
        "class": (config.get("architectures") or [folder.plan.model_class if folder.plan else None])[0],
        "layers": config.get("num_hidden_layers") or config.get("n_layer"),
        "hidden_size": config.get("hidden_size") or config.get("n_embd"),
        "mlp_widths": widths,
        "multiple_of": largest_multiple(widths) if widths else None,
        "attention_heads": config.get("num_attention_heads") or config.get("n_head"),
        "key_value_heads": config.get("num_key_value_heads"),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "parameters": sum(math.prod(shape) for name, shape in tensors.items() if not name.endswith(_BUFFER)) or None,
        "bytes": sum(file.stat().st_size for file in folder.model.glob("*.safetensors")) or None,
        "hfprune": {key.removeprefix("hfprune_"): text for key, text in metadata.items() if key.startswith("hfprune")},
    }
    return {key: value for key, value in found.items() if value not in (None, [], {})}


def _header(file: Path) -> dict[str, Any]:
    """Returns the header of a safetensors file: name -> dtype, shape and place of each tensor."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header: dict[str, Any] = json.loads(opened.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(f"'{file}' is damaged or cut off: {first_line(error)}.") from error
    return header


_DOWN = {"down_proj.weight": 1, "fc2.weight": 1, "dense_4h_to_h.weight": 1, "mlp.c_proj.weight": 0}
"""Projection that reads the neurons of an MLP -> the axis of the neurons."""


_BUFFER = ".e_score_correction_bias"
"""End of the names of saved buffers, which are no parameters: the correction biases of routers."""


def _unpacked(tensors: Mapping[str, list[int]], packed: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Returns the shapes of the matrices instead of those of their values and bits."""
    parts = {f"{name}.{part}" for name in packed for part in ("values", "bits")}
    return {name: shape for name, shape in tensors.items() if name not in parts} | dict(packed)


def _widths(tensors: Mapping[str, list[int]]) -> list[int]:
    """Returns the MLP width of each layer, read from the shapes of its down projection; experts have several."""
    found = []
    for name, shape in tensors.items():
        axis = next((axis for end, axis in _DOWN.items() if name.endswith(end)), None)
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        within = ".experts." in name or "shared_expert" in name
        if axis is not None and number is not None and not within and len(shape) == 2:
            found.append((number, int(shape[axis])))
    return [width for _, width in sorted(found)]


def _removed(plan: PruningPlan) -> dict[str, dict[str, int]]:
    """Returns unit kind -> units of the dense model, kept and removed ones; those of absent groups are removed."""
    found: dict[str, dict[str, int]] = {}
    for group in plan.groups:
        row = found.setdefault(group.kind, {"dense": 0, "kept": 0, "removed": 0})
        kept = _kept(plan, group)
        row["dense"] += group.num_units
        row["kept"] += kept
        row["removed"] += group.num_units - kept
    return found


def _kept(plan: PruningPlan, group: Group) -> int:
    return 0 if group.name in plan.absent() else len(plan.keep[group.name])


def _layers(plan: PruningPlan) -> list[dict[str, Any]]:
    """Returns, for each layer of the dense model, kind -> kept and dense units."""
    removed, rows = plan.removed_layers(), dict[int, dict[str, Any]]()
    for group in plan.groups:
        if group.kind == LAYERS:
            for layer in range(group.num_units):
                rows.setdefault(layer, {"layer": layer})["removed"] = layer in removed
        elif group.kind in SUBLAYERS and group.layer in removed:
            rows.setdefault(group.layer, {"layer": group.layer})["removed"] = True
        elif group.layer is not None:
            row = rows.setdefault(group.layer, {"layer": group.layer})
            before = row.get(group.kind, {}) if group.kind == "experts" else {}  # a router may have several groups
            found = {"kept": _kept(plan, group), "dense": group.num_units}
            row[group.kind] = {name: number + before.get(name, 0) for name, number in found.items()}
    return [rows[layer] for layer in sorted(rows)]


def _recipe(folder: PrunedFolder) -> dict[str, Any]:
    provenance, report = folder.provenance, folder.report
    budget = provenance.get("budget") or {}
    found = {
        "base_model": folder.base,
        "budget": budget.get("asked"),
        "removed_share": budget.get("removed_share"),
        **{key: provenance.get(key) for key in _SHOWN},
        "skipped": skip_text(provenance.get("skip_layers")) or None,
        "calibration": _data((provenance.get("calibration") or {}).get("data")),
        "recovery": report.get("recovery"),
        "recovery_data": _data((provenance.get("recovery") or {}).get("data")),
        "sparsity": {k: v for k, v in (provenance.get("sparsity") or {}).items() if k in ("weights", "zeros")},
        "command": report.get("command"),
        "versions": provenance.get("versions"),
        "warnings": report.get("warnings") or provenance.get("warnings"),
    }
    return {key: value for key, value in found.items() if value not in (None, [], {})}


def _data(data: Any) -> dict[str, Any] | None:
    if not isinstance(data, Mapping):
        return None
    return {key: data[key] for key in ("source", "sequences", "tokens") if data.get(key) is not None}


def _figures(stage: Mapping[str, Any]) -> dict[str, Any]:
    fidelity, tasks = stage.get("fidelity") or {}, (stage.get("zero_shot") or {}).get("tasks") or {}
    found = {
        "parameters": stage.get("parameters"),
        "perplexity": (stage.get("perplexity") or {}).get("value"),
        "kl": fidelity.get("kl"),
        "top1_agreement": fidelity.get("top1_agreement"),
        "tasks": {task: {k: v for k, v in figures.items() if is_metric(k, v)} for task, figures in tasks.items()},
    }
    return {key: value for key, value in found.items() if value not in (None, {})}


def is_metric(name: str, value: Any) -> bool:
    """Returns whether an entry of a task's figures is a metric: a number that is no error and no count.

    >>> is_metric("acc_norm", 0.5), is_metric("acc_stderr", 0.01), is_metric("num_items", 20)
    (True, False, False)
    """
    known = name.endswith("_stderr") or name in ("num_items", "num_fewshot", "version", "alias")
    return not known and isinstance(value, int | float) and math.isfinite(value)


def inspection_text(found: Mapping[str, Any]) -> str:
    """Returns an inspection in words, one fact a line."""
    model = found["model"]
    lines = [f"{found['path']}: {model.get('class', 'model')}, layout {found['layout']}"]
    lines += [f"  {label}: {text}" for label, text in _model_lines(model)]
    lines += [f"  loads with: {found['loads_with']}", f"  engines: {engine_line(found['engines'])}"]
    if "adapter" in found:
        lines.append(f"  adapter loads with: {found['adapter']}")
    for kind, row in (found.get("removed") or {}).items():
        share = f"{row['removed']:,} of {row['dense']:,} ({row['removed'] / row['dense']:.1%})"
        lines.append(f"removed {UNIT_KINDS[kind].plural}: {share}, kept {row['kept']:,}")
    lines += [f"  {_layer_text(row)}" for row in found.get("layers") or ()]
    recipe = found.get("recipe") or {}
    lines += ["recipe:"] if recipe else []
    lines += [f"  {key.replace('_', ' ')}: {_words(value)}" for key, value in recipe.items()]
    if "architecture" in found:
        from hfprune.publishing.architecture import architecture_text

        lines += architecture_text(found["architecture"])
    figures = found.get("figures") or {}
    lines += ["figures:"] if figures else []
    lines += [f"  {stage}: {_words(values)}" for stage, values in figures.items()]
    return "\n".join(lines)


def _model_lines(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    if "parameters" in model:
        lines.append(("parameters", f"{model['parameters']:,} ({model['bytes'] / 2**20:,.1f} MiB on disk)"))
    if widths := model.get("mlp_widths"):
        text = f"{widths[0]:,}" if len(set(widths)) == 1 else f"{min(widths):,} to {max(widths):,}"
        lines.append(("MLP width", f"{text} (multiple of {model['multiple_of']})"))
    shown = {"layers": "layers", "hidden_size": "hidden size", "attention_heads": "query heads"}
    shown |= {"key_value_heads": "key-value heads", "dtype": "type", "hfprune": "export"}
    return lines + [(label, _words(model[key])) for key, label in shown.items() if key in model]


def _layer_text(row: Mapping[str, Any]) -> str:
    if row.get("removed"):
        return f"layer {row['layer']}: removed"
    lost = [kind for kind in SUBLAYERS if kind in row and not row[kind]["kept"]]
    hidden = {*SUBLAYERS, *(part for kind in lost for part in UNIT_KINDS[kind].parts)}
    parts = [f"no {UNIT_KINDS[kind].plural.removesuffix(' sub-layers')}" for kind in lost]
    parts += [
        f"{UNIT_KINDS[kind].plural} {units['kept']:,} of {units['dense']:,}"
        for kind, units in row.items()
        if isinstance(units, Mapping) and kind not in hidden
    ]
    return f"layer {row['layer']}: {', '.join(parts) or 'kept'}"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k.replace('_', ' ')} {_words(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return "; ".join(map(_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
