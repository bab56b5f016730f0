"""Architecture of a model: its units, which of them can be removed and why not, and what reads the result."""

from collections.abc import Mapping
from typing import Any

from hfprune.models.described import description
from hfprune.models.groups import find_groups
from hfprune.models.proof import CLAIMS, Proof
from hfprune.plan import LAYERS, UNIT_KINDS
from hfprune.publishing.engines import quantised_formats, splits
from hfprune.utils.errors import HFPruneError

_LAYOUTS = {"mlp": ("uniform", "padded", "per_layer"), "heads": ("uniform", "padded", "per_layer")}
_READERS = {
    "uniform": "transformers alone, and engines and converters that read the class from its config.json",
    "padded": "the same, with zeros in place of the units that narrower layers lack",
    "per_layer": "hfprune.load, and transformers after import hfprune.auto",
}
"""Layout -> what reads it."""


def inspect_architecture(model: Any) -> dict[str, Any]:
    """Returns the units of a model, what can be removed and why not, as plain data.

    Args:
        model: A Hugging Face model, also on the meta device; no weight is read.

    Returns:
        ``described_by`` (``table`` or ``derived``), ``layers``, ``units`` by kind, ``claims`` that do not hold with
        their reasons, ``layouts`` and ``engines``; or ``refused`` with the reason.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2)
        >>> found = inspect_architecture(LlamaForCausalLM(config))
        >>> found["described_by"], found["units"]["mlp"]["per_group"], found["units"]["mlp"]["layouts"]
        ('table', [16, 16], ['uniform', 'padded', 'per_layer'])
    """
    try:
        proof, source = description(model)
    except HFPruneError as error:
        return {"refused": str(error)}
    if not proof.usable:
        return {"described_by": source, "refused": proof.reason()}
    units = {kind: _units(model, proof, kind) for kind in proof.kind_claims()}
    layouts = dict.fromkeys(layout for entry in units.values() for layout in entry.get("layouts", ()))
    return {
        "described_by": source,
        "layers": len(proof.spec.find_layers(model)),
        "units": units,
        "claims": {name: proof.claims[name].reason for name in CLAIMS if proof.claims[name].reason},
        "layouts": {layout: _READERS[layout] for layout in layouts},
        "engines": _engines(model, units),
    }


def _units(model: Any, proof: Proof, kind: str) -> dict[str, Any]:
    """Returns the groups of one kind: how many, units per group, and whether and how they can be removed."""
    if kind not in proof.kinds():
        return {"removable": False, "reason": proof.claims[proof.kind_claims()[kind]].reason}
    try:
        groups = find_groups(model, (kind,), spec=proof.spec)
    except HFPruneError as error:  # the model is not the stock architecture, or its config fixes the layers
        return {"removable": False, "reason": str(error)}
    sizes = [group.num_units for group in groups]
    found: dict[str, Any] = {"removable": True, "groups": len(groups), "per_group": [min(sizes), max(sizes)]}
    stated = proof.stated.get(kind, "")
    if stated:
        return found | {"layouts": ["per_layer"], "reason": stated}
    return found | {"layouts": list(_LAYOUTS.get(kind, ("uniform", "per_layer")))}


def _engines(model: Any, units: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the present sizes fit: formats of quantisers, and devices of tensor parallelism."""
    config = model.config.get_text_config()
    widths = units["mlp"].get("per_group")
    if not widths:
        return {}
    heads = [getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")]
    return {
        "quantised_formats": quantised_formats(widths, config.hidden_size),
        "tensor_parallel": splits(widths, [number for number in heads if number]),
    }


def architecture_text(found: Mapping[str, Any]) -> list[str]:
    """Returns an architecture in words, one fact a line."""
    if "refused" in found:
        return ["architecture: nothing can be removed", f"  {found['refused']}"]
    by = {"table": "a table of hfprune", "derived": "derivation"}[found["described_by"]]
    lines = [f"architecture: {found['layers']} layers, described by {by}, proven on a tiny model of the class"]
    lines += [f"  {UNIT_KINDS[kind].plural}: {_unit_text(kind, entry)}" for kind, entry in found["units"].items()]
    others = {"head", "keep_all", "packing", "padding"} & set(found["claims"])
    lines += [f"  not proven: {name.replace('_', ' ')}: {found['claims'][name]}" for name in sorted(others)]
    lines += [f"  layout {layout}: {reader}" for layout, reader in found["layouts"].items()]
    engines = found["engines"]
    if engines:
        lines.append(f"  quantised formats of these sizes: {'; '.join(engines['quantised_formats']) or 'none'}")
        devices = ", ".join(map(str, engines["tensor_parallel"])) or "none"
        lines.append(f"  tensor parallelism over devices: {devices}")
    return lines


def _unit_text(kind: str, entry: Mapping[str, Any]) -> str:
    if not entry["removable"]:
        return f"cannot be removed: {entry['reason']}"
    least, most = entry["per_group"]
    per = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    where = "" if kind in (LAYERS, "channels") else f" in each of {entry['groups']} layers"
    how = f"; layouts {', '.join(entry['layouts'])}"
    why = f" ({entry['reason']})" if entry.get("reason") else ""
    return f"{per}{where}{how}{why}"
