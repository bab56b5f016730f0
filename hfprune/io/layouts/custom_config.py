"""Custom configs: models that stock config classes cannot describe, registered with transformers' Auto classes.

In memory such a model is an instance of its stock class. Its config belongs to a subclass of the stock config class,
made at run time: a :class:`CustomConfig` and the stock class. config.json has a ``model_type`` and class names that
other software does not know, so that it stops instead of loading wrong weights, and a section ``hfprune``.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from hfprune.utils.errors import ConfigError, HFPruneError

VERSION = 1
PREFIX = "HFPrune"
"""Stands before the name of the stock class in config.json's ``architectures``."""

HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where files are."""


class CustomConfig:
    """What one kind of custom config adds to a stock config class.

    Subclasses set the three class variables below, implement :meth:`restore`, and are registered with :func:`register`.

    Attributes:
        stock: The stock config class; set in the classes that are made at run time.
        auto_type: ``model_type`` in config.json; software that does not know hfprune names it in its message.
        adjective: What models of this kind are called in messages.
        note: How to load such a model; stands in config.json.
    """

    stock: ClassVar[type[PreTrainedConfig]]
    auto_type: ClassVar[str]
    adjective: ClassVar[str]
    note: ClassVar[str]

    @classmethod
    def restore(cls, config: Any, section: Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]]) -> None:
        """Turns a stock config that was read from config.json, in place, into one of this kind.

        Args:
            config: Of the stock class.
            section: The section ``hfprune`` of config.json.
            overrides: The section ``per_layer_config``; empty where there is none.
        """
        cls.adopt(config)

    @classmethod
    def adopt(cls, config: Any) -> None:
        """Makes ``config``, in place (every module of a model refers to it), one of this kind."""
        if not isinstance(config, cls):
            config.__class__ = _subclass(cls, type(config))

    @classmethod
    def described(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what config.json holds where a stock config holds ``data``: a type and class names of its own."""
        names = [PREFIX + name for name in data.get("architectures") or ()]
        return {**data, "model_type": cls.auto_type, "architectures": names}

    @classmethod
    def section(cls, family: str) -> dict[str, Any]:
        """Returns the section ``hfprune`` of config.json for a model of the ``model_type`` ``family``."""
        return {"version": VERSION, "family": family, "note": cls.note}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Returns the config that config.json describes, of a subclass of its family's config class.

        Raises:
            ConfigError: It was written by another version, or for a family that this transformers does not know.
        """
        data = dict(config_dict)
        section, overrides = data.pop("hfprune", None), data.pop("per_layer_config", None) or {}
        if not isinstance(section, dict) or section.get("version") != VERSION:
            raise ConfigError(
                f"config.json has model_type '{cls.auto_type}' but no section 'hfprune' of version {VERSION}: it is "
                "damaged, or was written by another version of hfprune."
            )
        family: Any = section.get("family")
        if family not in CONFIG_MAPPING:
            raise ConfigError(
                f"config.json describes a {cls.adjective} '{family}', which this transformers does not know."
            )
        names = [str(name).removeprefix(PREFIX) for name in data.get("architectures") or ()]
        found = CONFIG_MAPPING[family].from_dict(data | {"model_type": family, "architectures": names}, **kwargs)
        cls.restore(found[0] if isinstance(found, tuple) else found, section, overrides)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by the kind and the stock class: the subclass is made at run time."""
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
        """The entry point of ``AutoConfig``: makes configs of the model's own family."""

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
    """Raises unless the weight files held every parameter, in the shape that the config describes.

    Args:
        path: The model, for the message.
        info: What transformers returns for ``output_loading_info``.
        described_by: The files that describe the shapes, for the message.
        error: What is raised.
    """
    for name, saved, expected in sorted(info["mismatched_keys"]):
        raise error(
            f"'{path}': {name} is {list(saved)} in the weight files and {list(expected)} by {described_by}: they do "
            "not belong together. Copy all files of one export."
        )
    for key, verb in (("missing_keys", "lack"), ("unexpected_keys", "hold unexpected tensors:")):
        if info[key]:
            raise error(f"'{path}': its weight files {verb} {', '.join(sorted(info[key])[:3])}.")


def _subclass(kind: type[CustomConfig], stock: type[PreTrainedConfig]) -> Any:
    """Returns the subclass of a stock config class, known to ``AutoModelForCausalLM``."""
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
