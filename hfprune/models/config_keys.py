"""Config keys: values of a config, and of the text config within the config of a multimodal model.

A dotted key names a value of a nested config: ``text_config.intermediate_size``.
"""

from typing import Any

_MISSING = object()


def config_value(config: Any, key: str, default: Any = _MISSING) -> Any:
    """Returns the value of a key.

    Args:
        config: A config.
        key: Key, dotted within nested configs.
        default: Returned for a missing key.

    Raises:
        AttributeError: The key is missing, and there is no default.

    >>> from transformers import Gemma3Config
    >>> config_value(Gemma3Config(), "text_config.head_dim"), config_value(Gemma3Config(), "head_dim", None)
    (256, None)
    """
    *path, name = key.split(".")
    for part in path:
        config = getattr(config, part, None)
    return getattr(config, name) if default is _MISSING else getattr(config, name, default)


def has_key(config: Any, key: str) -> bool:
    """Returns whether a config has a key, dotted within nested configs.

    >>> from transformers import Gemma3Config
    >>> has_key(Gemma3Config(), "text_config.head_dim"), has_key(Gemma3Config(), "head_dim")
    (True, False)
    """
    absent = object()
    return config_value(config, key, absent) is not absent


def set_config_value(config: Any, key: str, value: Any) -> None:
    """Sets the value of a key, dotted within nested configs."""
    *path, name = key.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, name, value)
