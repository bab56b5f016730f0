"""Layout ``per_layer``: config and model classes for models whose layers differ in width or lack attention or MLP.

In memory, such a model is an instance of its stock class. Its config belongs to a subclass of the stock config class,
holds the plans that cut the dense model, and lists the differences in transformers' own ``per_layer_config``.
``save_pretrained`` therefore writes ``config.json``, with ``model_type`` ``hfprune``, and the plans.

To load it, transformers' ``from_pretrained`` builds the dense model without weights, the plans cut it, and the weights
are read into the result. Importing this module registers the classes with transformers' Auto classes.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hfprune.io.layouts.base import LAYOUTS, Cut, Layout, implied_values, layer_overrides
from hfprune.io.layouts.custom_config import HUB, CustomConfig, check_weights, register, stock_model
from hfprune.models import find_spec
from hfprune.models.config_keys import set_config_value
from hfprune.models.sublayers import missing_sublayers
from hfprune.models.surgery import apply_plan
from hfprune.utils.errors import PlanError


class PerLayerConfig(CustomConfig):
    """Additions to the stock config class for models whose layers differ in width."""

    auto_type = "hfprune"
    adjective = "pruned"
    note = (
        "Layers differ in width, or lack attention or MLP. Load with hfprune.load(folder), or import hfprune.auto "
        "before AutoModelForCausalLM."
    )
    _hfprune: Cut

    @classmethod
    def restore(cls, config: Any, section: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]]) -> None:
        """Converts a stock config in place; the plans are read later."""
        layers = {int(index): values for index, values in overrides.items()}
        cut = Cut(dense=section["dense"], count=section["plans"], without=section.get("without", {}))
        to_per_layer(config, cut, layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as plain data, with a section ``hfprune``."""
        data: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        cut: Cut = data.pop("_hfprune")
        section = self.section(self.stock.model_type) | {"plans": cut.count, "dense": dict(cut.dense)}
        without = {kind: list(layers) for kind, layers in cut.without.items()}
        return data | {"hfprune": section | ({"without": without} if without else {})}

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the content of config.json."""
        return self.described(super().to_diff_dict())  # type: ignore[misc]

    def validate(self) -> None:
        """Does nothing: the stock checks expect one value per key, and loading checks every shape."""

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Writes config.json and the plans.

        Raises:
            PlanError: The plans have not been read yet and cannot be found in the config's folder.
        """
        plans = cut_of(self).plans
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        for file, plan in zip(self._hfprune.files(), plans, strict=True):
            plan.save(Path(save_directory) / file)


def is_per_layer(config: Any) -> bool:
    """Returns whether ``config`` belongs to a model whose layers differ in width."""
    return isinstance(config, PerLayerConfig)


def cut_of(config: Any, *, path: str | None = None, **hub: Any) -> Cut:
    """Returns the pruning history of a per-layer config; its plans are read at the first call.

    Args:
        config: The config, which stores the plans.
        path: Folder or hub id of the plans; that of the config if not given.
        hub: Hub arguments of ``from_pretrained``: ``revision``, ``token``, ``subfolder`` and others.

    Raises:
        PlanError: A plan is missing or damaged.
    """
    if not config._hfprune.plans:
        config._hfprune = config._hfprune.read(path or config.name_or_path, **hub)
    found: Cut = config._hfprune
    return found


def dense_config(config: Any) -> Any:
    """Returns a copy of ``config`` in its stock class, with the values of the dense model."""
    dense = stock_config(config)
    for key, value in config._hfprune.dense.items() if is_per_layer(config) else ():
        set_config_value(dense, key, value)
    return dense


def stock_config(config: Any) -> Any:
    """Returns a copy of ``config`` in its stock class, without the values per layer."""
    found = copy.deepcopy(config)
    to_stock(found)
    return found


def to_stock(config: Any) -> None:
    """Changes the class of ``config`` to its stock class, in place."""
    if is_per_layer(config):
        config.per_layer_config = None
        del config._hfprune
        config.__class__ = config.stock


def to_per_layer(config: Any, cut: Cut, overrides: Mapping[int, Mapping[str, Any]]) -> None:
    """Changes ``config`` to a per-layer config with the history ``cut``, in place.

    Args:
        config: Stock or per-layer config; every module of the model refers to it.
        cut: The pruning history.
        overrides: Layer index -> config key -> value.
    """
    PerLayerConfig.adopt(config)
    config._hfprune = cut
    # transformers omits the values that are common to all layers
    config.per_layer_config = {index: dict(values) for index, values in overrides.items()} or None


def finish(model: Any, dense: Any, cut: Cut) -> None:
    """Sets the per-layer config of a model that was cut by ``cut.plans``.

    Args:
        model: The model, with a stock or per-layer config.
        dense: The dense config.
        cut: The pruning history.
    """
    spec = find_spec(model)
    for key, value in implied_values(dense, spec, cut.plans).items():
        set_config_value(model.config, key, value)
    overrides = layer_overrides(dense, spec, cut.plans)
    to_per_layer(model.config, replace(cut, without=missing_sublayers(model, spec)), overrides)


class HFPruneForCausalLM:
    """Entry point of ``AutoModelForCausalLM`` that returns models of the stock class."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: Any, **kwargs: Any) -> Any:
        """Returns the model saved at ``path``, an instance of its stock class.

        Args:
            path: Folder or hub id.
            args: Positional arguments of transformers.
            config: Config of the saved model.
            kwargs: Keyword arguments of transformers.

        Raises:
            PlanError: A plan is missing, damaged, or does not fit config.json or the weights.
        """
        cut = cut_of(config, path=str(path), **{key: kwargs[key] for key in HUB if key in kwargs})
        dense, wants_info = dense_config(config), kwargs.pop("output_loading_info", False)
        stock = stock_model(dense)
        kwargs |= {"config": dense, "output_loading_info": True, "ignore_mismatched_sizes": True}
        model, info = _cutting(stock, cut).from_pretrained(path, *args, **kwargs)
        check_weights(str(path), info, described_by="config.json and plan.json", error=PlanError)
        model.__class__ = stock
        finish(model, dense, cut)
        stated, expected = (found.to_dict().get("per_layer_config") or {} for found in (config, model.config))
        renumbered = any(plan.removed_layers() for plan in cut.plans)  # earlier exports stated no values then
        if stated != expected and (stated or not renumbered):
            raise PlanError(f"'{path}': the widths in per_layer_config of config.json differ from those of the plan.")
        if model.config._hfprune.without != cut.without:
            raise PlanError(f"'{path}': 'without' in config.json lists other missing sub-layers than the plan.")
        return (model, info) if wants_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Returns a model with the shapes described by ``config`` and random weights."""
        cut, dense = cut_of(config), dense_config(config)
        model = stock_model(dense)._from_config(dense, **kwargs)
        _apply(model, cut)
        finish(model, dense_config(config), cut)
        return model


def _cutting(stock: Any, cut: Cut) -> Any:
    """Returns a subclass, with the same name, whose instances are cut at construction."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        _apply(self, cut)

    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (stock,), names | {"__init__": init})


def _apply(model: Any, cut: Cut) -> None:
    with torch.device("cpu"):  # for index tensors; the model may be on the meta device
        for plan in cut.plans:
            apply_plan(model, plan)


register(PerLayerConfig, HFPruneForCausalLM)


class PerLayerLayout(Layout):
    """``per_layer``: ``per_layer_config`` in config.json and the plans, or a stock folder if all layers are equal.

    Example:
        >>> import hfprune
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=2, num_attention_heads=2))
        >>> hfprune.apply_plan(model, hfprune.make_plan(model, keep={"model.layers.0.mlp": range(12)}))
        >>> type(model).__name__, type(model.config).__name__
        ('LlamaForCausalLM', 'PerLayerLlamaConfig')
        >>> [layer.mlp.down_proj.in_features for layer in model.model.layers]
        [12, 16]
    """

    name = "per_layer"

    def check(self, model: Any) -> None:
        """Accepts every model."""

    def written(self, model: Any) -> Any:
        """Returns ``model``, whose config writes the differences."""
        return model

    def complete(self, folder: Path, model: Any) -> None:
        """Adds code for transformers without hfprune."""
        from hfprune.io.layouts.remote_code import add_remote_code  # which imports this module

        if is_per_layer(model.config):
            add_remote_code(folder, model)


LAYOUTS.add(PerLayerLayout.name, PerLayerLayout())
