"""Custom configs for models that stock config classes cannot describe, registered with transformers' Auto classes.

In memory, such a model is an instance of its stock class. The class of its config is created at run time from a
:class:`CustomConfig` and the stock config class. config.json has a ``model_type`` and class names of hfprune and a
section ``hfprune``, so that other software raises an error instead of loading wrong weights.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from hfprune.utils.errors import ConfigError, HFPruneError

VERSION = 1
PREFIX = "HFPrune"
"""Prefix of the stock class names in ``architectures`` of config.json."""

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that locate files."""


class CustomConfig:
    """Base class of the additions to a stock config class; subclasses are registered with :func:`register`.

    Attributes:
        stock: The stock config class; set in the classes created at run time.
        auto_type: ``model_type`` in config.json.
        adjective: Adjective for models of this kind in messages.
        note: How to load such a model, written to config.json.
    """

    stock: ClassVar[type[PreTrainedConfig]]
    auto_type: ClassVar[str]
    adjective: ClassVar[str]
    note: ClassVar[str]

    @classmethod
    def restore(cls, config: Any, section: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]]) -> None:
        """Converts a stock config read from config.json, in place.

        Args:
            config: Config of the stock class.
            section: Section ``hfprune`` of config.json.
            overrides: Section ``per_layer_config``, empty if missing.
        """
        cls.adopt(config)

    @classmethod
    def adopt(cls, config: Any) -> None:
        """Changes the class of ``config`` to this kind, in place: every module of the model refers to it."""
        if not isinstance(config, cls):
            config.__class__ = _subclass(cls, type(config))

    @classmethod
    def described(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the stock config ``data`` with the ``model_type`` and the class names of this kind."""
        names = [PREFIX + name for name in data.get("architectures") or ()]
        return {**data, "model_type": cls.auto_type, "architectures": names}

    @classmethod
    def section(cls, family: str) -> dict[str, Any]:
        """Returns the section ``hfprune`` of config.json for a model of the ``model_type`` ``family``."""
        return {"version": VERSION, "family": family, "note": cls.note}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Returns the config described by config.json.

        Args:
            config_dict: Content of config.json.
            kwargs: Arguments of the stock class's ``from_dict``.

        Raises:
            ConfigError: It was written by another version, or its model type is unknown to the installed transformers.
        """
        data = dict(config_dict)
        section, overrides = data.pop("hfprune", None), data.pop("per_layer_config", None) or {}
        data.pop("auto_map", None)  # code for readers without hfprune, which save_pretrained does not write
        if not isinstance(section, dict) or section.get("version") != VERSION:
            raise ConfigError(
                f"config.json has model_type '{cls.auto_type}', but no section 'hfprune' of version {VERSION}. It is "
                "damaged, or was written by another version of hfprune."
            )
        family: Any = section.get("family")
        if family not in CONFIG_MAPPING:
            raise ConfigError(
                f"config.json describes a {cls.adjective} '{family}', which the installed transformers does not know."
            )
        names = [str(name).removeprefix(PREFIX) for name in data.get("architectures") or ()]
        found = CONFIG_MAPPING[family].from_dict(data | {"model_type": family, "architectures": names}, **kwargs)
        cls.restore(found[0] if isinstance(found, tuple) else found, section, overrides)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the kind and the stock class: the subclass is created at run time."""
        return _blank, (_kind(type(self)), self.stock), self.__dict__


_MODELS: dict[type[CustomConfig], Any] = {}
_SUBCLASSES: dict[tuple[type[CustomConfig], type[PreTrainedConfig]], Any] = {}


def register(kind: type[CustomConfig], models: type) -> None:
    """Registers a kind of custom config with ``AutoConfig`` and ``AutoModelForCausalLM``.

    Args:
        kind: The kind.
        models: Class with ``from_pretrained`` and ``_from_config`` that makes models of the stock class.
    """

    class Entry(PreTrainedConfig):
        """Entry point of ``AutoConfig``."""

        model_type = kind.auto_type

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return kind.from_dict(config_dict, **kwargs)

    _MODELS[kind] = models
    AutoConfig.register(kind.auto_type, Entry, exist_ok=True)


def stock_model(config: Any) -> Any:
    """Returns the model class of a stock config."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def check_weights(
    path: str, info: Mapping[str, Any], *, described_by: str, error: type[HFPruneError] = ConfigError
) -> None:
    """Raises an error unless the weight files held every parameter in the shape described by the config.

    Args:
        path: The model, for the message.
        info: Result of transformers' ``output_loading_info``.
        described_by: The files that describe the shapes, for the message.
        error: Class of the error.
    """
    for name, saved, expected in sorted(info["mismatched_keys"]):
        raise error(
            f"'{path}': {name} has the shape {list(saved)} in the weight files and {list(expected)} in {described_by}. "
            "Copy all files of one export."
        )
    for key, verb in (("missing_keys", "lack"), ("unexpected_keys", "hold unexpected tensors:")):
        if info[key]:
            raise error(f"'{path}': its weight files {verb} {', '.join(sorted(info[key])[:3])}.")


def _subclass(kind: type[CustomConfig], stock: type[PreTrainedConfig]) -> Any:
    """Returns the subclass of a stock config class, registered with ``AutoModelForCausalLM``."""
    if (kind, stock) not in _SUBCLASSES:
        names = {"stock": stock, "__module__": kind.__module__}
        name = kind.__name__.removesuffix("Config") + stock.__name__
        _SUBCLASSES[kind, stock] = type(name, (kind, stock), names)
        AutoModelForCausalLM.register(_SUBCLASSES[kind, stock], _MODELS[kind])
    return _SUBCLASSES[kind, stock]


def _kind(subclass: type) -> type[CustomConfig]:
    return next(base for base in subclass.__mro__ if base in _MODELS)


def _blank(kind: type[CustomConfig], stock: type[PreTrainedConfig]) -> Any:
    subclass = _subclass(kind, stock)
    return subclass.__new__(subclass)
