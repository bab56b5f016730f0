"""Twins: tiny random models of the class of a given config, on which an architecture is derived and proven.

A twin has the config class and the switches of the original (biases, activation, tied head, scales, soft caps, kinds of
layers), two to four layers, and sizes that differ pairwise where the class allows it, so that no channel count is
mistaken for another. It takes milliseconds to run, and its weights are random: norms differ from one, biases from zero.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hfprune.models.groups import class_name
from hfprune.models.shrinking import shrink
from hfprune.models.twin_sizes import HEADS, LAYER_COUNTS, LAYERS, LAYERS_MOST, SIZES, Sizes
from hfprune.utils.compat import causal_lm_class
from hfprune.utils.errors import UnsupportedArchitectureError, first_line

_NOT_PASSED = (
    "transformers_version",
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "auto_map",
    "quantization_config",
)
"""Entries of ``config.to_dict()`` that a twin does not take over."""

_NOISE = 0.2


def twin_config(config: Any) -> Any:
    """Returns a tiny config of the same class, with the switches of ``config``.

    The sizes are those of the first set in ``hfprune.models.twin_sizes`` that the config class accepts.

    Args:
        config: A Hugging Face config; a default one (``config_class()``) is enough.

    Raises:
        UnsupportedArchitectureError: The config class accepts no set of sizes.

    Example:
        >>> from transformers import Qwen3Config
        >>> tiny = twin_config(Qwen3Config(tie_word_embeddings=True))
        >>> tiny.hidden_size, tiny.intermediate_size, tiny.num_hidden_layers, tiny.tie_word_embeddings
        (48, 37, 3, True)
    """
    return next(_configs(config))


def twin(
    config: Any, *, model_class: type[nn.Module] | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """Returns a tiny random model of ``config``'s class, in eval mode, that runs on token ids.

    Args:
        config: A Hugging Face config, of any size.
        model_class: Class of the model; defaults to the one that ``AutoModelForCausalLM`` chooses.
        seed: Seed of the weights.
        dtype: Type of the weights; float32 if the class does not run in float64.

    Raises:
        UnsupportedArchitectureError: No tiny config gives a model that runs; the message holds the first error.

    Example:
        >>> from transformers import LlamaConfig
        >>> model = twin(LlamaConfig())
        >>> model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits.shape
        torch.Size([1, 3, 101])
    """
    build = model_class or causal_lm_class(config)
    own = _config_of(build, config)
    first: Exception | None = None
    for precision in dict.fromkeys((dtype, torch.float32)):
        for tiny in _configs(own):
            try:
                return _built(build, shrink(build, tiny, known=SIZES[0].table()), seed, precision)
            except Exception as error:  # foreign code may raise anything; the next sizes may suit it
                first = first or error
    name, reason = build.__name__, first_line(first) if first else "its config class accepts no small sizes"
    raise UnsupportedArchitectureError(f"No tiny model of {name} runs on token ids alone: {reason}") from first


def twin_of(model: nn.Module, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Returns the twin of a model: its class and the switches of its config; its weights are not read.

    Args:
        model: A Hugging Face model of any size, also on the meta device, sharded or quantised.
        seed: Seed of the weights.
        dtype: Type of the weights.
    """
    return twin(model.config, model_class=own_class(model), seed=seed, dtype=dtype)


def own_class(model: nn.Module) -> type[nn.Module]:
    """Returns the class of a model, without the subclass that FSDP2 creates."""
    return next(kind for kind in type(model).__mro__ if kind.__name__ == class_name(model))


def random_weights(model: nn.Module, *, seed: int = 0) -> None:
    """Adds noise to all parameters and saved buffers of a model, in place, so that none has a special value.

    Args:
        model: The model.
        seed: Seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    saved = model.state_dict(keep_vars=True)
    with torch.no_grad():
        seen = set[int]()
        for tensor in saved.values():
            if tensor.is_floating_point() and id(tensor) not in seen:
                seen.add(id(tensor))
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_((_NOISE * noise).to(tensor.dtype))


def plain_experts(model: Any) -> None:
    """Makes the experts of a mixture run one after another: grouped products have no float64.

    Args:
        model: A Hugging Face model; others are left alone.
    """
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def _config_of(build: Any, config: Any) -> Any:
    """Returns the config that a class takes: ``config``, or the text config within it."""
    wanted = getattr(build, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    return next((value for value in vars(config).values() if isinstance(value, wanted)), config)


def _built(build: Any, config: Any, seed: int, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build(config).to(dtype).eval()
    random_weights(model, seed=seed)
    plain_experts(model)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 9).reshape(1, 6), use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise UnsupportedArchitectureError("its logits are not finite for random weights")
    built: nn.Module = model
    return built


def _configs(config: Any) -> Iterator[Any]:
    """Yields tiny configs of the class of ``config``, one for each set of sizes that it accepts."""
    first: Exception | None = None
    found = False
    for sizes in SIZES:
        try:
            tiny = _shrunk(config, sizes)
        except Exception as error:  # validators of foreign config classes raise anything
            first = first or error
            continue
        found = True
        yield tiny
    if not found:
        name = type(config).__name__
        raise UnsupportedArchitectureError(f"{name} accepts no small sizes: {first_line(first) if first else ''}")


def _shrunk(config: Any, sizes: Sizes) -> Any:
    """Returns a config of the same class with small sizes; nested configs are shrunk as well."""
    dense = {key: copy.deepcopy(value) for key, value in config.to_dict().items() if key not in _NOT_PASSED}
    dense = {key: value for key, value in dense.items() if _passed(type(config), key)}
    layers = _layer_count(dense)
    chosen = _chosen_layers(dense, layers)
    values = dense | {key: sizes.number(key, value) for key, value in dense.items() if _is_number(value)}
    values |= _heads(dense, sizes) | sizes.filled(dense) | dict.fromkeys(_counts(dense), len(chosen))
    for key, value in dense.items():
        if isinstance(value, list | tuple):
            if layers > 1 and len(value) == layers:
                values[key] = [sizes.number(key, v) if _is_number(v) else v for v in (value[i] for i in chosen)]
            elif key in sizes.lists:
                values[key] = sizes.lists[key]
    for key, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            values[key] = _shrunk(value, sizes).to_dict()
    if isinstance(dense.get("rope_parameters"), Mapping) and dense["rope_parameters"]:
        values["rope_parameters"] = _rotary(dense["rope_parameters"], sizes.rotary_pairs(values))
    if isinstance(dense.get("per_layer_config"), Mapping):
        values["per_layer_config"] = _per_layer(dense, values, chosen, sizes)
    return type(config)(**values)


def _passed(kind: type, key: str) -> bool:
    """Returns whether an entry is an argument of the config class, or free text that the class keeps."""
    descriptor = inspect.getattr_static(kind, key, None)
    return key == "per_layer_config" or (not isinstance(descriptor, property) and not key.startswith("_"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _counts(values: Mapping[str, Any]) -> list[str]:
    """Returns the config keys of the number of layers."""
    return [key for key in LAYER_COUNTS if _is_number(values.get(key))]


def _layer_count(values: Mapping[str, Any]) -> int:
    return next((values[key] for key in _counts(values)), 0)


def _heads(dense: Mapping[str, Any], sizes: Sizes) -> dict[str, int]:
    """Returns head counts and sizes that keep their relation: multi-head, grouped or multi-query attention."""
    found: dict[str, int] = {}
    for heads, keys_values in HEADS:
        queries, shared = dense.get(heads), dense.get(keys_values)
        if _is_number(queries) and _is_number(shared):
            found[keys_values] = sizes.heads if queries == shared else 1 if shared == 1 else sizes.keys_values
    rotary = dense.get("qk_rope_head_dim")
    if rotary and dense.get("head_dim") == rotary:
        found["head_dim"] = sizes.number("qk_rope_head_dim", rotary)
    return found


def _per_layer(
    dense: Mapping[str, Any], values: Mapping[str, Any], chosen: Sequence[int], sizes: Sizes
) -> dict[str, Any]:
    """Returns the entries of single layers: numbers that differ from those of the model are doubled in the twin."""
    found = {}
    for name, entries in dense["per_layer_config"].items():
        if str(name).isdigit() and int(name) in chosen:
            place = f"{chosen.index(int(name)):0{len(str(name))}d}"
            found[place] = {key: _own(key, value, dense, values, sizes) for key, value in entries.items()}
    return found


def _own(key: str, value: Any, dense: Mapping[str, Any], values: Mapping[str, Any], sizes: Sizes) -> Any:
    """Returns the small value of a key of one layer."""
    if not _is_number(value):
        return value
    if not _is_number(values.get(key)):
        return sizes.number(key, value)
    return values[key] * (1 if value == dense[key] else 2)


def _chosen_layers(values: Mapping[str, Any], layers: int) -> list[int]:
    """Returns the indices of the layers that a twin keeps: the first of each kind, at least two and at most four."""
    lists = [v for v in values.values() if isinstance(v, list | tuple) and layers > 1 and len(v) == layers]
    kinds = [tuple(str(entry[index]) for entry in lists) for index in range(layers)]
    chosen = [index for index in range(layers) if kinds.index(kinds[index]) == index][:LAYERS_MOST]
    for index in range(layers):
        if len(chosen) >= min(LAYERS, layers):
            break
        if index not in chosen:
            chosen.append(index)
    return sorted(chosen) or list(range(LAYERS))


def _rotary(parameters: Mapping[str, Any], pairs: int) -> dict[str, Any]:
    """Returns the parameters of rotary embeddings for ``pairs`` frequencies."""
    found = dict(parameters)
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            found[key] = _rotary(value, pairs)
        elif key in ("short_factor", "long_factor") and isinstance(value, Sequence):
            found[key] = (list(value) * pairs)[:pairs]
        elif key == "mrope_section" and isinstance(value, Sequence) and value:
            rest = pairs - (len(value) - 1) * (pairs // len(value))
            found[key] = [rest] + [pairs // len(value)] * (len(value) - 1)
    return found
