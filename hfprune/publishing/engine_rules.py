"""Rules of engines: which software loads a folder, and why other software does not.

The table :data:`ENGINES` holds what was found by running each engine on small models of every family (docs/serving.md).
What was not run is "not tested", never assumed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hfprune.vllm_plugin import PREFIX, refusal

State = Literal["loads", "refused", "untested"]

_LLAMA, _MISTRAL, _QWEN2, _QWEN3 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
_GEMMA3, _PHI3, _GPT2, _NEOX = "Gemma3ForCausalLM", "Phi3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"
_MAIN = frozenset({_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _GEMMA3, _PHI3})


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What engines need to know of a folder.

    Attributes:
        layout: Name of the layout.
        model_class: Name of the stock class of transformers.
        layers: ``per_layer_config`` of config.json.
        partial: Whether there are layers without attention or without MLP.
        has_code: Whether the folder has code for transformers without hfprune.
        own_head_size: Whether the size of a head differs from hidden size / query heads.
        wide: Whether the MLP is four times as wide as the hidden size in every layer.
    """

    layout: str
    model_class: str
    layers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    partial: bool = False
    has_code: bool = False
    own_head_size: bool = False
    wide: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What an engine loads.

    Attributes:
        title: Name and the version that was run.
        families: Classes whose pruned ``uniform`` and ``padded`` folders were run.
        fails: Class -> why the engine cannot load it with a pruned MLP.
        derives_head_size: Classes whose heads the engine takes to be of size hidden size / query heads.
        per_layer: What a ``per_layer`` folder needs in this engine; empty if the engine does not load one.
        per_layer_reason: Why not.
        nemotron_nas: As ``per_layer``, for ``nemotron_nas`` folders.
    """

    title: str
    families: frozenset[str] | None = None
    fails: Mapping[str, str] = field(default_factory=dict)
    derives_head_size: frozenset[str] = frozenset()
    per_layer: str = ""
    per_layer_reason: str = "one size for all layers: use layout=padded"
    nemotron_nas: str = ""


_CODE = "with trust_remote_code=True"
_FOUR = "takes an MLP of 4 x hidden size for granted"

ENGINES: dict[str, Engine] = {
    "transformers": Engine(title="transformers 5.23", per_layer=_CODE, nemotron_nas=_CODE),
    "transformers4": Engine(title="transformers 4.57", per_layer=_CODE),
    "vllm": Engine(
        title="vLLM 0.32",
        families=_MAIN | {_GPT2, _NEOX},
        derives_head_size=frozenset({_QWEN2}),
        per_layer="with hfprune's plugin",
        nemotron_nas=_CODE,
    ),
    "llama_cpp": Engine(
        title="llama.cpp's converter b11434",
        families=_MAIN,
        fails={_GPT2: _FOUR, _NEOX: "its converter needs transformers 4"},
        derives_head_size=frozenset({_QWEN2, _PHI3}),
        per_layer_reason="its converter does not know the class: use hfprune export --to gguf",
    ),
    "onnxruntime": Engine(
        title="ONNX Runtime 1.32",
        families=frozenset({_LLAMA}),
        per_layer="after torch.onnx.export of hfprune.load(folder)",
    ),
    "openvino": Engine(
        title="OpenVINO 2026.4",
        families=frozenset({_LLAMA, _QWEN2, _QWEN3, _PHI3, _GPT2, _NEOX}),
        fails={_GEMMA3: "optimum-intel 2.2 refuses it under transformers 5"},
    ),
    "ctranslate2": Engine(
        title="CTranslate2 4.8",
        families=frozenset({_LLAMA, _QWEN2, _QWEN3, _GEMMA3, _GPT2}),
        fails={_PHI3: "KeyError 'type'", _NEOX: "its converter needs transformers 4"},
        derives_head_size=frozenset({_LLAMA, _QWEN2}),
    ),
    "mlx": Engine(
        title="mlx-lm 0.32",
        families=frozenset({_LLAMA, _QWEN2, _QWEN3, _GEMMA3, _PHI3, _GPT2}),
        fails={_NEOX: _FOUR},
        derives_head_size=frozenset({_QWEN2, _PHI3}),
        nemotron_nas="without code",
    ),
}
"""Name -> engine."""


def facts_of(config: Mapping[str, Any], widths: Sequence[int], *, layout: str) -> Facts:
    """Returns the facts of a folder.

    Args:
        config: Content of config.json.
        widths: MLP width of each layer.
        layout: Name of the layout.

    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "head_dim": 8}
    >>> found = facts_of({"architectures": ["HFPruneLlamaForCausalLM"], **sizes}, [3, 4], layout="per_layer")
    >>> found.model_class, found.own_head_size, found.wide
    ('LlamaForCausalLM', True, False)
    """
    hidden = config.get("hidden_size") or config.get("n_embd") or 0
    heads, size = config.get("num_attention_heads") or config.get("n_head") or 0, config.get("head_dim")
    layers = config.get("per_layer_config") or {}
    own = {(values.get("num_attention_heads", heads), values.get("head_dim", size)) for values in layers.values()}
    names = config.get("architectures") or [""]
    return Facts(
        layout=layout,
        model_class=str(names[0]).removeprefix(PREFIX),
        layers=layers,
        partial=bool((config.get("hfprune") or {}).get("without")),
        has_code=bool(config.get("auto_map")),
        own_head_size=any(dim is not None and count * dim != hidden for count, dim in own | {(heads, size)}),
        wide=all(width == 4 * hidden for width in widths),
    )


def verdict(engine: str, facts: Facts) -> tuple[State, str]:
    """Returns whether an engine loads a folder, with what it needs, or why it does not.

    Args:
        engine: Name in :data:`ENGINES`.
        facts: The folder.

    >>> verdict("mlx", Facts(layout="uniform", model_class="LlamaForCausalLM"))
    ('loads', '')
    >>> verdict("mlx", Facts(layout="per_layer", model_class="LlamaForCausalLM"))
    ('refused', 'one size for all layers: use layout=padded')
    """
    rules = ENGINES[engine]
    if facts.layout == "bitmask":
        return "refused", "only hfprune reads bitmask: use layout=uniform"
    if facts.layout == "plan":
        return "refused", "a plan without weights: hfprune rebuilds the model"
    if facts.layout == "nemotron_nas":
        if rules.nemotron_nas:
            return "loads", rules.nemotron_nas
        return "refused", "does not know model type nemotron-nas"
    if facts.layout == "per_layer":
        return _per_layer(engine, rules, facts)
    return _stock(rules, facts)


def _per_layer(engine: str, rules: Engine, facts: Facts) -> tuple[State, str]:
    if not rules.per_layer:
        return "refused", rules.per_layer_reason
    if engine == "vllm":
        reason = refusal(facts.model_class, facts.layers, partial=facts.partial)
        return ("refused", reason) if reason else ("loads", rules.per_layer)
    if rules.per_layer == _CODE and not facts.has_code:
        return "refused", "the folder has no code for it: run hfprune export --layout per_layer"
    if rules.families is not None and facts.model_class not in rules.families:
        return "untested", ""
    return "loads", rules.per_layer


def _stock(rules: Engine, facts: Facts) -> tuple[State, str]:
    reason = rules.fails.get(facts.model_class)
    if reason == _FOUR and facts.wide:
        reason = None
    if reason is not None:
        return "refused", reason
    if rules.families is not None and facts.model_class not in rules.families:
        return "untested", ""
    if facts.own_head_size and facts.model_class in rules.derives_head_size:
        return "refused", "takes the size of a head to be hidden size / heads: prune no heads or channels"
    return "loads", ""


def verdicts(facts: Facts) -> dict[str, dict[str, str]]:
    """Returns engine -> ``engine`` (name and version), ``state`` and ``note``, JSON-able; hfprune is the first."""
    own: tuple[State, str] = ("loads", "")
    if facts.layout == "nemotron_nas":
        own = ("refused", "written for other software: keep the model from which it was exported")
    found = {"hfprune": own} | {name: verdict(name, facts) for name in ENGINES}
    titles = {"hfprune": "hfprune"} | {name: rules.title for name, rules in ENGINES.items()}
    return {name: {"engine": titles[name], "state": state, "note": note} for name, (state, note) in found.items()}


def engine_line(found: Mapping[str, Mapping[str, str]]) -> str:
    """Returns the outcome of :func:`verdicts` as one line; engines that share a reason share an entry.

    >>> engine_line({"a": {"engine": "A", "state": "loads", "note": ""}, "b": {"engine": "B", "state": "refused",
    ...     "note": "no"}, "c": {"engine": "C", "state": "refused", "note": "no"}})
    'loads in: A; not in: B, C because no'
    """
    groups: dict[str, list[str]] = {"loads": [], "refused": [], "untested": []}
    reasons: dict[str, list[str]] = {}
    for entry in found.values():
        note = f" ({entry['note']})" if entry["note"] else ""
        if entry["state"] == "refused":
            reasons.setdefault(entry["note"], []).append(entry["engine"])
        else:
            groups[entry["state"]].append(entry["engine"] + note)
    groups["refused"] = [f"{', '.join(names)} because {reason}" for reason, names in reasons.items()]
    titles = {"loads": "loads in: ", "refused": "not in: ", "untested": "not tested in: "}
    return "; ".join(titles[key] + ", ".join(names) for key, names in groups.items() if names)
