"""Variants of a model: what changes if the value of a config key changes."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfprune.models.groups import class_name
from hfprune.models.twins import plain_experts

Shapes = dict[str, torch.Size]
"""Parameter name -> shape."""

_NOT_PASSED = ("transformers_version", "model_type", "architectures", "dtype", "torch_dtype", "_name_or_path")


class Variants:
    """Models of the class of a given one, with other config values.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._kind: Any = next(c for c in type(model).__mro__ if c.__name__ == class_name(model))
        config: Any = model.config
        self._nested, whole = _text_key(config), _passed(config.to_dict())
        inner = _passed(whole.pop(self._nested)) if self._nested else {}
        self.values: dict[str, Any] = whole | {f"{self._nested}.{key}": value for key, value in inner.items()}
        self.shapes: Shapes = _shapes(model)

    def text_key(self, name: str) -> str:
        """Returns the key of a value of the text config."""
        return f"{self._nested}.{name}" if self._nested else name

    def numbers(self, value: int) -> list[str]:
        """Returns the config keys with a whole number as value."""
        return [key for key, found in self.values.items() if type(found) is int and found == value]

    def unset(self) -> list[str]:
        """Returns the config keys without value."""
        return [key for key, found in self.values.items() if found is None and not key.endswith("_token_id")]

    def lists(self, length: int) -> list[str]:
        """Returns the config keys with a list of ``length`` values."""
        return [key for key, found in self.values.items() if isinstance(found, list | tuple) and len(found) == length]

    def config(self, changes: Mapping[str, Any]) -> Any:
        """Returns the config with other values, or None if its class refuses them."""
        config: Any = self._model.config
        changed = copy.deepcopy(self.values) | dict(changes)
        prefix = f"{self._nested}." if self._nested else None
        values = {key: value for key, value in changed.items() if prefix is None or not key.startswith(prefix)}
        try:
            if prefix is not None:
                inner = {key.removeprefix(prefix): value for key, value in changed.items() if key.startswith(prefix)}
                values[self._nested] = type(config.get_text_config())(**inner)
            return type(config)(**values)
        except Exception:  # validators of foreign classes raise anything: a refusal is the answer
            return None

    def build(
        self, changes: Mapping[str, Any], *, state: Mapping[str, Tensor] | None = None, real: bool = False
    ) -> Any:
        """Returns a model with other config values in eval mode, or None if its class refuses them.

        Args:
            changes: Config key -> value.
            state: State that the model loads; None is returned if it does not fit.
            real: Whether the model has weights without a state, too; it is on the meta device otherwise.
        """
        config = self.config(changes)
        if config is None:
            return None
        config._attn_implementation = self._model.config._attn_implementation
        try:
            with torch.device("cpu" if real or state is not None else "meta"), torch.random.fork_rng(devices=[]):
                model = self._kind(config)
            if real or state is not None:
                model.to(next(self._model.parameters()).dtype)
            if state is not None:
                model.load_state_dict(state)
        except Exception:  # as above
            return None
        plain_experts(model)
        return model.eval()

    def changed(self, changes: Mapping[str, Any]) -> Shapes | None:
        """Returns the shapes of a model with other config values, or None if its class refuses them."""
        model = self.build(changes)
        return None if model is None else _shapes(model)


def _passed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of a config's dictionary that its class takes."""
    return {key: value for key, value in values.items() if key not in _NOT_PASSED and not key.startswith("_")}


def _text_key(config: Any) -> str:
    """Returns the key of the text config within the config of a multimodal model, or an empty string."""
    text = config.get_text_config()
    return next((key for key, value in vars(config).items() if value is text and text is not config), "")


def attributes(module: nn.Module, value: int) -> list[str]:
    """Returns the attributes of a module and those inside it that hold a whole number, as ``module.attribute``.

    Attributes of projections, which surgery rewrites itself, and of configs are left out.
    """
    found = []
    for name, inner in module.named_modules():
        if isinstance(inner, nn.Linear | nn.Embedding) or type(inner).__name__ == "Conv1D":
            continue
        held = [key for key, known in vars(inner).items() if type(known) is int and known == value]
        found += [f"{name}.{key}".removeprefix(".") for key in held]
    return found


def cut_lists(values: Mapping[str, Any], keys: Iterable[str], index: int) -> dict[str, Any]:
    """Returns the values of config lists without the entry of a layer."""
    return {key: [entry for i, entry in enumerate(values[key]) if i != index] for key in keys}


def _shapes(model: nn.Module) -> Shapes:
    return {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
