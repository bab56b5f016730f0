"""Model cards, made from the report of a run with the classes of huggingface_hub."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from hfprune.io.output_folder import CARD_FILE
from hfprune.plan import UNIT_KINDS, skip_text
from hfprune.publishing.folder import PrunedFolder, hub_dataset, hub_id, open_folder
from hfprune.publishing.inspection import inspect_folder, is_metric
from hfprune.utils.errors import ConfigError

What = Literal["model", "plan", "adapter"]
"""What is published."""

_TAG = "hfprune"
_FIDELITY = {"kl": ("kl_divergence", "KL divergence to the dense model, nats per token")}
_LICENCE_KEYS = ("license", "license_name", "license_link")


def model_card(
    folder: str | Path,
    *,
    what: What = "model",
    base_model: str | None = None,
    license: str | None = None,
    repo: str | None = None,
) -> ModelCard:
    """Returns the model card of a pruned model, from the report of its run.

    Args:
        folder: ``OUT`` or ``OUT/model``.
        what: What the card describes: the model, the plan that makes it from its base, or the adapter.
        base_model: Hub id of the dense model; of an adapter the pruned model's. The run's own if not given.
        license: Identifier of the license; that of the base model's card if not given.
        repo: Hub id under which it will be found; the folder's name if not given.

    Returns:
        The card; ``card.data`` holds its metadata, ``card.save(path)`` writes it.

    Raises:
        ConfigError: The folder holds no model that hfprune wrote.

    Example:
        >>> import tempfile, hfprune
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...     num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)).eval()
        >>> plan = hfprune.make_plan(model, keep={"model.layers.0.mlp": range(20)})
        >>> hfprune.apply_plan(model, plan)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = hfprune.save(model, folder + "/model", plan=plan)
        ...     card = model_card(folder, license="mit", base_model="org/base")
        >>> card.data.base_model, card.data.license, card.data.tags
        ('org/base', 'mit', ['hfprune', 'pruning'])
    """
    found = open_folder(str(folder))
    if found.plan is None:
        raise ConfigError(f"folder='{folder}' has no plan.json: hfprune did not write this model.")
    if what == "adapter" and found.adapter is None:
        raise ConfigError(f"folder='{folder}' has no adapter: train with merge_adapters=False to keep it apart.")
    base = base_model or hub_id(found.base)
    name = repo or Path(found.given).absolute().name
    data = ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if what == "adapter" else "finetune") if base else None,
        datasets=_datasets(found) or None,
        eval_results=list(_results(found, adapter=what == "adapter")) or None,
        library_name="peft" if what == "adapter" else "transformers",
        model_name=name,
        pipeline_tag="text-generation",
        tags=_tags(found, what),
        **({"license": license} if license else _licence(found.base, base)),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(found, what, name, base)}")


def write_card(folder: str | Path, *, overwrite: bool = False, **settings: Any) -> Path:
    """Writes the card of a pruned model as ``README.md`` into the model's folder, and returns its path.

    Args:
        folder: ``OUT`` or ``OUT/model``.
        overwrite: Replace a README.md that is there.
        settings: See :func:`model_card`.

    Raises:
        ConfigError: There is a README.md, or no model that hfprune wrote.
    """
    card = model_card(folder, **settings)
    path = open_folder(str(folder)).model / CARD_FILE
    if path.exists() and not overwrite:
        raise ConfigError(f"'{path}' is there already: set overwrite=True to replace it.")
    card.save(path)
    return path


def _tags(found: PrunedFolder, what: What) -> list[str]:
    criterion = (found.provenance.get("criterion") or {}).get("name")
    sparse = "sparsity" if found.provenance.get("sparsity") else "pruning"
    extra = {"model": [], "plan": ["pruning-plan"], "adapter": ["lora"]}[what]
    return [_TAG, sparse, *([str(criterion).replace("_", "-").lower()] if criterion else []), *extra]


def _datasets(found: PrunedFolder) -> list[str]:
    """Returns the data sets of the hub that the run was calibrated and trained on."""
    roles = found.report.get("data") or {}
    sources = [(roles.get(role) or {}).get("source") for role in ("calibration", "recovery")]
    return list(dict.fromkeys(name for source in sources if source and (name := hub_dataset(str(source)))))


def _licence(path: str | None, base: str | None) -> dict[str, Any]:
    """Returns the license entries of the base model's card; empty where it has none or cannot be read."""
    places = [Path(path) / CARD_FILE] if path and (Path(path) / CARD_FILE).is_file() else []
    for place in (*places, base):
        try:
            card = ModelCard.load(place, ignore_metadata_errors=True) if place else None
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):  # no card, no such model, offline
            continue
        values = {} if card is None else {key: getattr(card.data, key, None) for key in _LICENCE_KEYS}
        if values.get("license"):
            return {key: value for key, value in values.items() if value}
    return {}


def _results(found: PrunedFolder, *, adapter: bool) -> Iterator[EvalResult]:
    """Yields the figures of the model for ``model-index``."""
    name = found.stage(adapter=adapter)
    figures = found.stages().get(name or "", {})
    perplexity, fidelity = figures.get("perplexity") or {}, figures.get("fidelity") or {}
    source = str(perplexity.get("source") or "evaluation text")
    text: dict[str, Any] = {"task_type": "text-generation", "dataset_type": hub_dataset(source) or "text"}
    text["dataset_name"] = Path(source).name
    if _finite(perplexity.get("value")):
        protocol = perplexity.get("protocol")
        yield EvalResult(
            **text, metric_type="perplexity", metric_name=f"Perplexity ({protocol})", metric_value=perplexity["value"]
        )
    for key, (kind, label) in _FIDELITY.items():
        if _finite(fidelity.get(key)):
            yield EvalResult(**text, metric_type=kind, metric_name=label, metric_value=fidelity[key])
    for task, values in ((figures.get("zero_shot") or {}).get("tasks") or {}).items():
        for metric, value in values.items():
            if is_metric(metric, value):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=str(task),
                    dataset_name=str(task),
                    metric_type=metric,
                    metric_name=f"{metric}, {values.get('num_fewshot', 0)}-shot (lm-eval)",
                    metric_value=value,
                )


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---- text -----------------------------------------------------------------------------------------------------------


def _body(found: PrunedFolder, what: What, name: str, base: str | None) -> str:
    stages = found.shown_stages(adapter=what == "adapter")
    trained = "recovered" in stages if stages else bool(found.report.get("recovery"))
    dense = f"[{base}](https://huggingface.co/{base})" if base and what != "adapter" else _named(found)
    kind = {"model": "A pruned version", "plan": "A pruning plan", "adapter": "LoRA adapters of a pruned version"}
    sections = [
        f"# {name.rpartition('/')[2]}",
        f"{kind[what]} of {dense}, made with hfprune.",
        "## Use",
        _use(found, what, name, base),
        "## What was removed",
        _removed(found),
        *(["## Figures", _table(stages)] if stages else []),
        "## Recipe",
        _recipe(found, trained=trained),
        "## Limits",
        _limits(found, what, trained=trained),
    ]
    return "\n\n".join(sections) + "\n"


def _named(found: PrunedFolder) -> str:
    return f"`{Path(found.base).name}`" if found.base else "a dense model"


def _use(found: PrunedFolder, what: What, name: str, base: str | None) -> str:
    dense = base or Path(found.base or "BASE").name
    stock = found.layout in ("uniform", "padded")
    if what == "plan":
        code = f'import hfprune\n\nmodel = hfprune.load("{dense}", plan="{name}")'
    elif what == "adapter" and stock:
        code = (
            f'from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained("{name}")'
        )
    elif what == "adapter":
        code = (
            "import hfprune\nfrom peft import PeftModel\n\n"
            f'model = PeftModel.from_pretrained(hfprune.load("{dense}"), "{name}")'
        )
    elif stock:
        code = (
            f'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("{name}")'
        )
    else:
        code = f'import hfprune\n\nmodel = hfprune.load("{name}")'
    return f"```python\n{code}\n```"


def _removed(found: PrunedFolder) -> str:
    lines = []
    for kind, row in (inspect_folder(str(found.model)).get("removed") or {}).items():
        share = row["removed"] / row["dense"]
        lines.append(f"- {UNIT_KINDS[kind].plural}: {row['removed']:,} of {row['dense']:,} ({share:.1%})")
    if sparsity := found.provenance.get("sparsity"):
        lines.append(f"- weights set to zero: {sparsity.get('zeros', 0):,} of {sparsity.get('weights', 0):,}")
    budget = found.provenance.get("budget") or {}
    if budget.get("dense_params") and budget.get("params"):
        lines.append(f"- parameters: {budget['dense_params']:,} to {budget['params']:,}")
    if found.plan is not None and found.plan.groups:
        lines += ["", "`plan.json` lists the kept units of every layer."]
    return "\n".join(lines)


def _table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the figures of every stage as a Markdown table."""
    rows: dict[str, list[str]] = {}
    for figures in stages.values():
        fidelity = figures.get("fidelity") or {}
        values = {
            "parameters": figures.get("parameters"),
            "perplexity": (figures.get("perplexity") or {}).get("value"),
            "KL to the dense model (nats per token)": fidelity.get("kl"),
            "top-1 agreement with the dense model": fidelity.get("top1_agreement"),
        }
        for task, metrics in ((figures.get("zero_shot") or {}).get("tasks") or {}).items():
            values |= {f"{task}, {name}": value for name, value in metrics.items() if is_metric(name, value)}
        for label, value in values.items():
            rows.setdefault(label, []).append(_cell(value))
    lines = [f"| | {' | '.join(stages)} |", f"|{'---|' * (len(stages) + 1)}"]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in rows.items() if set(cells) != {"-"}]
    protocols = dict.fromkeys(
        str(figures["perplexity"]["protocol"])
        for figures in stages.values()
        if (figures.get("perplexity") or {}).get("protocol")
    )
    return "\n".join([*lines, "", *(f"Perplexity: {text}." for text in protocols)])


def _cell(value: Any) -> str:
    if not isinstance(value, int | float):
        return "-" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _recipe(found: PrunedFolder, *, trained: bool) -> str:
    provenance, lines = found.provenance, []
    for label, value in (
        ("dense model", _dense(provenance.get("model") or {})),
        ("budget", (provenance.get("budget") or {}).get("asked")),
        ("criterion", provenance.get("criterion")),
        ("objective", provenance.get("objective")),
        ("allocation", provenance.get("allocation")),
        ("skipped", skip_text(provenance.get("skip_layers"))),
        ("compensation", provenance.get("compensation")),
        ("recovery", found.report.get("recovery") if trained else None),
        ("versions", provenance.get("versions")),
    ):
        if value:
            lines.append(f"- {label}: {_settings(value)}")
    for role, data in (found.report.get("data") or {}).items():
        if isinstance(data, Mapping) and data.get("source"):
            lines.append(f"- {role} data: {_source(str(data['source']))}, {data.get('tokens') or 0:,} tokens")
    if command := found.report.get("command"):
        lines += ["", "Command:", "", f"```bash\n{command}\n```"]
    return "\n".join(lines)


def _dense(model: Mapping[str, Any]) -> str:
    """Returns name, revision and commit of the dense model; empty for a folder without either."""
    named = [f"{key} {model[key]}" for key in ("revision", "commit", "subfolder") if model.get(key)]
    return ", ".join([hub_id(str(model.get("path"))) or "a local folder", *named]) if named else ""


def _settings(value: Any) -> str:
    if isinstance(value, Mapping):
        plain = (
            (key, item) for key, item in value.items() if item is not None and not isinstance(item, Mapping | list)
        )
        return ", ".join(str(item) if key == "name" else f"{key.replace('_', ' ')} {item}" for key, item in plain)
    return str(value)


def _source(source: str) -> str:
    return hub_dataset(source) or Path(source).name


def _limits(found: PrunedFolder, what: What, *, trained: bool) -> str:
    budget, lines = found.provenance.get("budget") or {}, []
    if share := budget.get("removed_share"):
        lines.append(f"{share:.1%} of the parameters were removed; quality below the dense model's is expected.")
    if not trained:
        lines.append("The model was not trained after pruning.")
    if found.stages():
        lines.append("The figures above are all that was measured; other texts, languages and tasks may lose more.")
    else:
        lines.append("No figures were recorded with this model.")
    lines.append("Safety and alignment were not evaluated; the limits of the dense model hold as well.")
    if found.layout not in ("uniform", "padded") and what == "model":
        lines.append("Plain transformers does not load this layout; see Use.")
    lines += [str(text) for text in found.report.get("warnings") or ()]
    return "\n".join(f"- {line}" for line in lines)
