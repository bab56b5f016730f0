"""Shrinking of configs whose size keys have unknown names: smaller values are tried on the meta device.

Which keys are sizes is not known. A value is taken if the class can then be built, runs, and has fewer parameters; keys
that only fit together (hidden size and heads) are tried in pairs and triples.
"""

import copy
from collections.abc import Container, Iterator, Mapping
from itertools import combinations, islice
from typing import Any

import torch
from torch import nn

LARGE = 1_000_000
"""Parameters above which a twin is shrunk further."""

_TRIALS = 200
_LAYERS = 3
_TARGETS = ((500, (48, 37, 64, 80, 56)), (17, (24, 6, 12, 10, 8, 4)), (5, (3, 2, 4)))
"""Least value -> small values to try."""

_Shapes = dict[str, torch.Size]


def shrink(build: Any, config: Any, *, known: Container[str] = ()) -> Any:
    """Returns a config with smaller sizes, if the class has more than ``LARGE`` parameters and accepts them.

    Args:
        build: Class of the model.
        config: A config of it.
        known: Keys that are small already.
    """
    shapes = _run(build, config)
    if shapes is None or _parameters(shapes) <= LARGE:
        return config
    values = {key: value for key, value in config.to_dict().items() if _is_size(key, value) and key not in known}
    tried = 0
    while _parameters(shapes) > LARGE // 10 and tried < _TRIALS:
        for changes in islice(_changes(values, _taken(config)), _TRIALS - tried):
            tried += 1
            other = _with(config, changes)
            found = None if other is None else _run(build, other)
            if found is not None and _parameters(found) < _parameters(shapes):
                if len(found) < len(shapes) and len(changes) == 1:  # a number of layers
                    other, found = _least_layers(build, config, next(iter(changes)), other, found)
                values = {key: value for key, value in values.items() if key not in changes}
                config, shapes = other, found
                break
        else:
            break
    return config


def _taken(config: Any) -> set[int]:
    return {value for value in config.to_dict().values() if type(value) is int}


def _changes(values: Mapping[str, int], taken: set[int]) -> Iterator[dict[str, int]]:
    """Yields small values for one key, then for pairs and triples of keys; none of them is taken by another key."""
    for number in (1, 2, 3):
        for keys in combinations(values, number):
            targets = [next(small for least, small in _TARGETS if values[key] >= least) for key in keys]
            for small in zip(*targets, strict=False):
                smaller = all(new < values[key] for key, new in zip(keys, small, strict=True))
                if smaller and not taken & set(small) and len(set(small)) == number:
                    yield dict(zip(keys, small, strict=True))


def _least_layers(build: Any, config: Any, key: str, other: Any, shapes: _Shapes) -> tuple[Any, _Shapes]:
    fewer = _with(config, {key: _LAYERS})
    found = None if fewer is None else _run(build, fewer)
    return (other, shapes) if found is None else (fewer, found)


def _is_size(key: str, value: Any) -> bool:
    number = isinstance(value, int) and not isinstance(value, bool)
    return number and value >= _TARGETS[-1][0] and not key.startswith("_") and not key.endswith(("_id", "_index"))


def _with(config: Any, changes: Mapping[str, int]) -> Any:
    """Returns a copy of a config with other values; None if its class refuses them."""
    values = {key: copy.deepcopy(value) for key, value in config.to_dict().items() if not key.startswith("_")}
    for key in ("transformers_version", "model_type", "architectures", "dtype"):
        values.pop(key, None)
    try:
        return type(config)(**values | dict(changes))
    except Exception:  # validators of foreign classes raise anything: a refusal is the answer
        return None


def _run(build: Any, config: Any) -> _Shapes | None:
    """Returns the shapes of the model's parameters; None if it cannot be built or does not run on the meta device."""
    try:
        with torch.device("meta"):
            model: nn.Module = build(copy.deepcopy(config)).eval()
            ids = torch.zeros(1, 4, dtype=torch.int64)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception:  # foreign code, as above
        return None
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _parameters(shapes: _Shapes) -> int:
    return sum(shape.numel() for shape in shapes.values())
