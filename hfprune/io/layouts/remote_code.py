"""Remote code: a modeling file in ``per_layer`` folders with which transformers loads them without hfprune.

``auto_map`` in config.json names the classes of ``modeling_hfprune.py``. They are subclasses of the stock classes whose
layers are built from the values in ``per_layer_config``. The file imports torch and transformers alone, runs only where
a user sets ``trust_remote_code=True``, and is ignored by :func:`hfprune.load` and ``hfprune.auto``.

Classes that derive the size of a head from the number of heads cannot be built with fewer heads. Their layers are built
with the dense heads and then resized to the shapes in the section ``hfprune`` of config.json.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import MODEL_MAPPING

from hfprune.io.layouts.custom_config import PREFIX
from hfprune.io.layouts.per_layer import cut_of, dense_config, stock_config
from hfprune.models import find_spec
from hfprune.models.groups import attention_table, find_layers
from hfprune.models.spec import ArchSpec
from hfprune.models.sublayers import missing_sublayers
from hfprune.version import __version__

MODULE = "modeling_hfprune"
"""Name of the modeling file, without ``.py``."""

RESIZED = "resized"
"""Key of the section ``hfprune`` of config.json: attention that the stock class cannot build with fewer heads."""

_SIZES = ("in_features", "out_features", "nf", "nx")

_TEMPLATE = Template('''\
"""$causal_lm whose layers differ in size, by hfprune $version. Needs torch and transformers alone."""

import transformers
from torch import nn

ALIASES = $aliases


class LayerConfig:
    """Config of one layer: its own values, and those of the model's config for all other keys."""

    def __init__(self, config, values):
        self._hfprune_shared = config
        self.__dict__.update(values)
        for alias, key in ALIASES.items():
            if key in values:
                self.__dict__[alias] = values[key]

    def __getattr__(self, key):
        if key.startswith("__") or key == "_hfprune_shared":
            raise AttributeError(key)
        return getattr(self._hfprune_shared, key)


class $prefix$config(transformers.$config):
    """Stock config, with the values of single layers in `hfprune_layers`."""

    model_type = "hfprune"

    def __init__(self, hfprune=None, per_layer_config=None, **kwargs):
        super().__init__(**kwargs)
        self.hfprune, self.hfprune_layers = hfprune or {}, per_layer_config or {}
        for key, value in self.hfprune.get("$resized", {}).get("built_with", {}).items():
            setattr(self, key, value)
        self.model_type = "$family"  # stock classes look up the format of their checkpoints by it

    def validate(self):
        """Does nothing: the stock checks expect one value per key."""

    def to_dict(self):
        return self._written(super().to_dict())

    def to_diff_dict(self):
        return self._written(super().to_diff_dict())

    def _written(self, data):
        layers = data.pop("hfprune_layers", None)
        names = ["$prefix" + name.removeprefix("$prefix") for name in data.get("architectures") or ()]
        own = {"model_type": "hfprune", "architectures": names, **({"per_layer_config": layers} if layers else {})}
        return {**data, **own}


def build_layers(layers, config):
    """Replaces the layers whose values differ from the config's by layers of their own size."""
    resized = config.hfprune.get("$resized", {})
    fixed = resized.get("built_with", {})
    for index, values in config.hfprune_layers.items():
        values = {key: value for key, value in values.items() if key not in fixed}
        if values:
            layers[int(index)] = type(layers[int(index)])(LayerConfig(config, values), int(index))
    for name, shape in resized.get("shapes", {}).items():
        module, _, key = name.rpartition(".")
        module = layers.get_submodule(module)
        setattr(module, key, nn.Parameter(getattr(module, key).new_empty(shape)))
    for name, value in resized.get("attributes", {}).items():
        module, _, key = name.rpartition(".")
        setattr(layers.get_submodule(module), key, value)


class Layered:
    """Stock classes, with layers of different sizes, and with the checkpoint format of their stock class."""

    config_class = $prefix$config

    @classmethod
    def is_custom_code(cls):
        return False


class $model(Layered, transformers.$model):
    def __init__(self, config):
        super().__init__(config)
        build_layers(self.get_submodule("$inner"), config)
        self.post_init()


class $causal_lm(Layered, transformers.$causal_lm):
    def __init__(self, config):
        super().__init__(config)
        build_layers(self.get_submodule("$layers"), config)
        self.post_init()
''')


def add_remote_code(folder: Path, model: Any) -> str | None:
    """Adds the modeling file and ``auto_map`` to a ``per_layer`` folder, if its classes build the model's shapes.

    Args:
        folder: The folder, with its config.json.
        model: The model, whose layers differ; only shapes are read.

    Returns:
        None, or the reason why the folder has no remote code: then it is unchanged.
    """
    path, spec = folder / "config.json", find_spec(model)
    data = json.loads(path.read_text(encoding="utf-8"))
    stock = type(stock_config(model.config))
    if stock not in MODEL_MAPPING or not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} is not a class of transformers"
    if missing_sublayers(model, spec):
        return "layers without attention or MLP are built by hfprune alone"
    names = _names(model, stock, spec)
    resized = _resized(model, spec)
    if resized:
        data["hfprune"] = data["hfprune"] | {RESIZED: resized}
    file = folder / f"{MODULE}.py"
    file.write_text(_TEMPLATE.substitute(names), encoding="utf-8")
    classes = {"AutoModel": names["model"], "AutoModelForCausalLM": names["causal_lm"]}
    classes["AutoConfig"] = PREFIX + names["config"]
    data["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in classes.items()}
    reason = _not_built(file, data, names, model)
    if reason is not None:
        file.unlink()
        return reason
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return None


def _names(model: Any, stock: Any, spec: ArchSpec) -> dict[str, str]:
    """Returns the words that the template needs."""
    base, inner = f"{type(model).base_model_prefix}.", cast(Any, MODEL_MAPPING[stock])
    return {
        "aliases": json.dumps(dict(stock.attribute_map)),
        "causal_lm": type(model).__name__,
        "config": stock.__name__,
        "family": stock.model_type,
        "inner": spec.layers.removeprefix(base),
        "layers": spec.layers,
        "model": inner.__name__,
        "prefix": PREFIX,
        "resized": RESIZED,
        "version": __version__,
    }


def _resized(model: Any, spec: ArchSpec) -> dict[str, Any]:
    """Returns shapes and sizes of attention whose class derives the size of a head; empty if it has a key for it."""
    if spec.attention is None or spec.attention.size_key is not None:
        return {}
    table, dense = attention_table(spec), dense_config(model.config)
    keys = [key for key in (table.heads_key, table.keys_values_key) if key is not None]
    changed = [
        key for plan in cut_of(model.config).plans for group in plan.groups if group.kind == "heads" for key in keys
    ]
    if not changed:
        return {}
    found: dict[str, Any] = {"built_with": {key: getattr(dense, key) for key in keys}, "shapes": {}, "attributes": {}}
    for index, layer in enumerate(find_layers(model, spec)):
        for name in {template.module: None for template in table.heads}:
            module = layer.get_submodule(name)
            for key, parameter in module.named_parameters(recurse=False):
                found["shapes"][f"{index}.{name}.{key}"] = list(parameter.shape)
            sizes = {key: getattr(module, key) for key in _SIZES if hasattr(module, key)}
            found["attributes"] |= {f"{index}.{name}.{key}": size for key, size in sizes.items()}
        attention = layer.get_submodule(table.module)
        for key, _ in table.attributes:
            found["attributes"][f"{index}.{table.module}.{key}"] = getattr(attention, key)
    return found


def _not_built(file: Path, data: Mapping[str, Any], names: Mapping[str, str], model: nn.Module) -> str | None:
    """Returns how the shapes that the modeling file builds differ from those of ``model``; None if they are equal."""
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    try:
        built = _built(file, data, names)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        return f"{names['causal_lm']} cannot be built layer by layer: {' '.join(str(error).split())}"
    found = {name: list(tensor.shape) for name, tensor in built.state_dict().items()}
    name = next((name for name in wanted | found if wanted.get(name) != found.get(name)), None)
    return None if name is None else f"{name} would be {found.get(name)}, it is {wanted.get(name)}"


def _built(file: Path, data: Mapping[str, Any], names: Mapping[str, str]) -> PreTrainedModel:
    """Returns the model of the modeling file, on the meta device."""
    name = f"_{MODULE}_check"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up the module of a config class
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
        config = getattr(module, PREFIX + names["config"]).from_dict(dict(data))
        with torch.device("meta"):
            found: PreTrainedModel = getattr(module, names["causal_lm"])(config)
        return found
    finally:
        sys.dont_write_bytecode = written
        del sys.modules[name]
