"""vLLM plugin: serves ``per_layer`` folders, whose layers differ in size, with vLLM's own models.

vLLM calls :func:`register` at start (entry point ``vllm.general_plugins``). The config of a folder becomes the config
of its family with transformers' ``per_layer_config``, and each decoder layer is built from the values stated for it.
Weights, kernels and the key-value cache are vLLM's. The folders need no ``trust_remote_code``.

vLLM 0.32 asks for an older transformers than hfprune, so it needs a separate environment. Only this module is used
there, which needs neither torch nor other packages of hfprune: ``pip install --no-deps hfprune``.
"""

import functools
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "HFPrune"
"""Prefix of the stock class names in ``architectures`` of config.json."""


@dataclass(frozen=True, slots=True)
class Family:
    """A model class of vLLM.

    Attributes:
        module: Module in ``vllm.model_executor.models``.
        layer: Name of the decoder layer class.
        heads: Whether vLLM builds layers with different numbers of heads.
    """

    module: str
    layer: str
    heads: bool


FAMILIES = {
    "Gemma3ForCausalLM": Family("gemma3", "Gemma3DecoderLayer", heads=True),
    "LlamaForCausalLM": Family("llama", "LlamaDecoderLayer", heads=True),
    "MistralForCausalLM": Family("mistral", "MistralDecoderLayer", heads=True),
    "Phi3ForCausalLM": Family("llama", "LlamaDecoderLayer", heads=False),
    "Qwen2ForCausalLM": Family("qwen2", "Qwen2DecoderLayer", heads=False),
    "Qwen3ForCausalLM": Family("qwen3", "Qwen3DecoderLayer", heads=True),
}
"""Class of transformers -> where vLLM defines its decoder layer."""

_HEADS = ("num_attention_heads", "num_key_value_heads")
_BUILT = {"intermediate_size", "head_dim", *_HEADS}


def register() -> None:
    """Registers the config and the models of ``per_layer`` folders with transformers and vLLM."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    AutoConfig.register("hfprune", _config_class(), exist_ok=True)
    for name in FAMILIES:
        ModelRegistry.register_model(PREFIX + name, f"{__name__}:{PREFIX}{name}")


def refusal(name: str, layers: Mapping[Any, Mapping[str, int]], *, partial: bool = False) -> str:
    """Returns why vLLM does not serve a ``per_layer`` folder; empty if it does.

    Args:
        name: Name of the class of transformers.
        layers: ``per_layer_config`` of config.json.
        partial: Whether there are layers without attention or without MLP.

    >>> refusal("LlamaForCausalLM", {"0": {"num_key_value_heads": 1}})
    ''
    >>> refusal("Qwen2ForCausalLM", {"0": {"num_key_value_heads": 1}})
    'vLLM builds Qwen2ForCausalLM with one number of heads alone: use layout=padded'
    """
    if name not in FAMILIES:
        return f"the plugin serves {', '.join(FAMILIES)}, not {name}: use layout=padded"
    if partial:
        return "the plugin does not build layers without attention or MLP: use layout=padded"
    if not FAMILIES[name].heads and any(key in values for values in layers.values() for key in _HEADS):
        return f"vLLM builds {name} with one number of heads alone: use layout=padded"
    unknown = sorted({key for values in layers.values() for key in values} - _BUILT)
    if unknown:
        return f"the plugin does not build layers that differ in {unknown[0]}: use layout=padded"
    return ""


def _config_class() -> type:
    """Returns the config class of the model type ``hfprune``, which makes configs of the stock classes."""
    from transformers import PreTrainedConfig
    from transformers.models.auto import CONFIG_MAPPING

    class PerLayerConfig(PreTrainedConfig):
        """Entry point of ``AutoConfig``."""

        model_type = "hfprune"

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            """Returns the stock config, with the values of each layer."""
            data = dict(config_dict)
            section, layers = data.pop("hfprune"), data.pop("per_layer_config", None) or {}
            data.pop("auto_map", None)
            name = str((data.get("architectures") or [""])[0]).removeprefix(PREFIX)
            reason = refusal(name, layers, partial=bool(section.get("without")))
            if reason:
                raise ValueError(f"hfprune: {reason}.")
            found = CONFIG_MAPPING[section["family"]].from_dict(data | {"model_type": section["family"]}, **kwargs)
            config = found[0] if isinstance(found, tuple) else found
            config.per_layer_config = {int(index): dict(values) for index, values in layers.items()}
            return found

    return PerLayerConfig


def _build_from_own_values(layer: Any) -> None:
    """Makes a decoder layer class read the values of its own layer, where layers differ; once per class."""
    from vllm.model_executor.models.utils import extract_layer_index

    stock = layer.__init__
    if hasattr(stock, "_hfprune"):
        return
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        config = given.arguments.get("config") or given.arguments["vllm_config"].model_config.hf_config
        if getattr(config, "is_heterogeneous", False):
            given.arguments["config"] = config.per_layer_config[extract_layer_index(given.arguments["prefix"])]
        stock(*given.args, **given.kwargs)

    init._hfprune = True  # type: ignore[attr-defined]
    layer.__init__ = init


def __getattr__(name: str) -> Any:
    """Returns vLLM's model class for ``HFPruneLlamaForCausalLM`` and the others, at first use."""
    family = FAMILIES.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None
    if family is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"vllm.model_executor.models.{family.module}")
    _build_from_own_values(getattr(module, family.layer))
    models = importlib.import_module(f"vllm.model_executor.models.{_MODELS.get(name, family.module)}")
    return getattr(models, name.removeprefix(PREFIX))


_MODELS = {"HFPrunePhi3ForCausalLM": "phi3"}  # a subclass of the Llama model, in a module of its own
