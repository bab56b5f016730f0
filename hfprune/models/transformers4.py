"""Config and tokenizer files that transformers 4 and 5 read, for older releases, converters and other engines.

transformers 5 writes rotary settings under ``rope_parameters``, the dtype of the weights under ``dtype``, and a generic
tokenizer class with a new name. Readers that expect ``rope_theta`` use their default base without an error and compute
different logits. Each setting is therefore written under both names; transformers 5 reads the same values from either.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CONFIG = "config.json"
_TOKENIZER = "tokenizer_config.json"
_GENERIC = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # both read tokenizer.json
_LAYER_TYPE = "full_attention"  # layer type whose rotary settings have plain names in transformers 4
_PLAIN = ("rope_theta", "partial_rotary_factor")  # rotary settings that are top-level keys in transformers 4

Config = dict[str, Any]


def write_both_forms(folder: Path) -> None:
    """Adds the keys of transformers 4 to the config and tokenizer config of a saved folder, in place.

    Args:
        folder: The folder; missing files are skipped.
    """
    for name, convert in ((_CONFIG, both_forms), (_TOKENIZER, generic_tokenizer)):
        path = folder / name
        if path.is_file():
            data = convert(json.loads(path.read_text(encoding="utf-8")))
            path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def both_forms(config: Mapping[str, Any]) -> Config:
    """Returns ``config`` with the keys of both transformers 4 and transformers 5.

    >>> found = both_forms({"dtype": "float32", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    >>> found["torch_dtype"], found["rope_theta"], "rope_scaling" in found
    ('float32', 500000.0, False)
    """
    found = {**config, **_rotary(config)}
    if config.get("dtype") is not None:
        found["torch_dtype"] = config["dtype"]
    if config.get("head_dim", 0) is None:
        del found["head_dim"]  # transformers 4 expects a number or no key
    if _family(config) == "qwen3_moe" and "num_local_experts" in config:
        found["num_experts"] = config["num_local_experts"]
    if _family(config) == "gpt2" and "n_positions" in config:
        found["n_ctx"] = config["n_positions"]
    pattern = config.get("_sliding_window_pattern")
    if pattern is not None and _repeats(config.get("layer_types") or (), pattern):
        found["sliding_window_pattern"] = pattern
    return found


def generic_tokenizer(config: Mapping[str, Any]) -> Config:
    """Returns a tokenizer config whose class and list of special tokens transformers 4 and 5 support.

    >>> generic_tokenizer({"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"]})
    {'tokenizer_class': 'PreTrainedTokenizerFast', 'additional_special_tokens': ['<x>']}
    """
    found = dict(config)
    name = found.get("tokenizer_class")
    if name in _GENERIC:
        found["tokenizer_class"] = _GENERIC[name]
    if isinstance(found.get("extra_special_tokens"), list):  # transformers 4 expects a mapping under this name
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


def _rotary(config: Mapping[str, Any]) -> Config:
    """Returns the rotary settings under the names of transformers 4."""
    settings = config.get("rope_parameters") or {}
    nested = _LAYER_TYPE in settings
    rope = settings[_LAYER_TYPE] if nested else settings
    found: Config = {}
    if rope.get("rope_theta") is None:
        return found
    if _family(config) == "gpt_neox":
        found |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    found |= {key: rope[key] for key in _PLAIN if key in rope}
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = _scaling(rope, None if nested else _family(config))
    local = settings.get("sliding_attention") if nested else None
    if local is not None:
        found["rope_local_base_freq"] = local["rope_theta"]
    return found


def _scaling(rope: Mapping[str, Any], family: str | None) -> Config:
    """Returns ``rope_scaling``; old releases refuse unknown keys, except in nested settings."""
    kind = rope["rope_type"]
    values = {key: value for key, value in rope.items() if key not in ("rope_type", "type", *_PLAIN)}
    if family == "phi3" and kind == "longrope":
        return {"type": kind, "short_factor": values["short_factor"], "long_factor": values["long_factor"]}
    old = family is not None and values.keys() == {"factor"}
    return {"type" if old else "rope_type": kind, **values}


def _family(config: Mapping[str, Any]) -> Any:
    """Returns the model type of the stock class, also for the layouts of hfprune."""
    return (config.get("hfprune") or {}).get("family") or config.get("model_type")


def _repeats(layer_types: list[str] | tuple[str, ...], pattern: int) -> bool:
    """Returns whether exactly every ``pattern``-th layer has full attention."""
    return all((kind == _LAYER_TYPE) == ((i + 1) % pattern == 0) for i, kind in enumerate(layer_types))
