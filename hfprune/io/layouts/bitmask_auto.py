"""What transformers' Auto classes call for models in the layout ``bitmask``; importing this registers it.

The config is one of the stock class, which also knows how it was stored; the model is a stock one, with a stock config.
"""

import copy
from typing import Any, ClassVar

from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from hfprune.io.layouts.base import HUB
from hfprune.io.layouts.bitmask import MODEL_TYPE, PREFIX, VERSION, described, stored_tensors
from hfprune.utils.compat import cached_file_or_none
from hfprune.utils.errors import ConfigError


class BitmaskConfig:
    """What the config of a model on disk without its zeros adds to its stock config class."""

    stock: ClassVar[type[PreTrainedConfig]]

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns what config.json holds: no model type or class that other software takes for the stock one."""
        return described(super().to_diff_dict(), self.stock.model_type)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Returns the config that config.json described."""
        return BitmaskEntry.from_dict(config_dict, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by the stock class: the subclass is made at run time."""
        return _blank, (self.stock,), self.__dict__


def bitmask_stock(config: Any) -> Any:
    """Returns a copy of a config, in its stock class where it is that of a model without its zeros."""
    found: Any = copy.deepcopy(config)
    if isinstance(found, BitmaskConfig):
        stock: Any = found.stock
        found.__class__ = stock
    return found


def _blank(stock: type[PreTrainedConfig]) -> Any:
    packed = _subclass(stock)
    return packed.__new__(packed)


_SUBCLASSES: dict[type[PreTrainedConfig], Any] = {}


def _subclass(stock: type[PreTrainedConfig]) -> Any:
    """Returns the subclass of a stock config class, known to ``AutoModelForCausalLM``."""
    if stock not in _SUBCLASSES:
        names = {"stock": stock, "__module__": __name__}
        _SUBCLASSES[stock] = type(f"Bitmask{stock.__name__}", (BitmaskConfig, stock), names)
        AutoModelForCausalLM.register(_SUBCLASSES[stock], BitmaskForCausalLM)
    return _SUBCLASSES[stock]


class BitmaskEntry(PreTrainedConfig):
    """The entry point of ``AutoConfig``: makes configs of the model's own family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Returns the config that ``config_dict`` describes, of a subclass of its family's config class.

        Raises:
            ConfigError: It was written by another version, or for a family that this transformers does not know.
        """
        data = dict(config_dict)
        section = data.pop("hfprune", None)
        if not isinstance(section, dict) or section.get("version") != VERSION:
            raise ConfigError(
                f"config.json has model_type '{MODEL_TYPE}' but no section 'hfprune' of version {VERSION}: it is "
                "damaged, or was written by another version of hfprune."
            )
        family: Any = section.get("family")
        if family not in CONFIG_MAPPING:
            raise ConfigError(f"config.json describes a sparse '{family}', which this transformers does not know.")
        names = [str(name).removeprefix(PREFIX) for name in data.get("architectures") or ()]
        found = CONFIG_MAPPING[family].from_dict(data | {"model_type": family, "architectures": names}, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config.__class__ = _subclass(type(config))
        return found


class BitmaskForCausalLM:
    """The entry point of ``AutoModelForCausalLM``: makes models of the stock class."""

    @classmethod
    def from_pretrained(cls, path: str, *args: Any, config: Any, **kwargs: Any) -> Any:
        """Returns the model saved at ``path``, an instance of its stock class with a stock config.

        Beside the model, one matrix is in memory at a time; where its type changes, up to four.

        Raises:
            ConfigError: A file is missing or damaged, or config and weights do not belong together.
        """
        hub = {key: kwargs.pop(key) for key in HUB if key in kwargs}
        wants_info = kwargs.pop("output_loading_info", False)
        plain = bitmask_stock(config)
        kwargs |= {"config": plain, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if all(kwargs.get(key) in (None, "auto") for key in ("dtype", "torch_dtype")) and plain.dtype is None:
            raise ConfigError(f"'{path}': config.json has no dtype. Copy all files of one export, or give dtype.")
        with stored_tensors(str(path), **hub) as state:
            model, info = _stock_model(plain).from_pretrained(None, *args, state_dict=state, **kwargs)
        _check_weights(str(path), info)
        model.config.name_or_path = model.name_or_path = str(path)
        if model.can_generate() and kwargs.get("generation_config") is None:
            _read_generation(model, str(path), hub)
        return (model, info) if wants_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        """Returns a model of the stock class with random weights; on the meta device none."""
        return _stock_model(bitmask_stock(config))._from_config(bitmask_stock(config), **kwargs)


def _stock_model(config: Any) -> Any:
    """Returns the model class of a stock config."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _check_weights(path: str, info: dict[str, Any]) -> None:
    """Raises ``ConfigError`` unless the weight files held every parameter in the shape that the config says."""
    for name, saved, expected in sorted(info["mismatched_keys"]):
        raise ConfigError(
            f"'{path}': {name} is {list(saved)} in the weight files and {list(expected)} by config.json: they do not "
            "belong together. Copy all files of one export."
        )
    for key, text in (("missing_keys", "lack"), ("unexpected_keys", "hold, against the config,")):
        if info[key]:
            raise ConfigError(f"'{path}': its weight files {text} {', '.join(sorted(info[key])[:3])}.")


def _read_generation(model: Any, path: str, hub: dict[str, Any]) -> None:
    """Gives the model the generation config beside it; transformers reads it only with weights that it finds itself."""
    if cached_file_or_none(path, "generation_config.json", **hub) is not None:
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)


AutoConfig.register(MODEL_TYPE, BitmaskEntry, exist_ok=True)
