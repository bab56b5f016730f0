"""The beginning-of-sequence token (BOS): whether it is added, and how that is reported."""

import warnings
from typing import Any, Literal, get_args

from hfprune.utils.errors import ConfigError

BosSetting = Literal["auto", "always", "never"]
"""``auto``: as the tokenizer does by itself; ``always``: before every sequence; ``never``: none is added."""

NO_BOS = "no BOS added"
EACH_BOS = "each begins with BOS"
CROPPED_BOS = "BOS before each document, so only crops from its beginning have one"
TEMPLATE_BOS = "BOS as the chat template writes it"
"""Protocol lines."""


def check_bos(setting: str) -> None:
    """Raises ``ConfigError`` for an unknown setting."""
    if setting not in get_args(BosSetting):
        raise ConfigError(f"bos='{setting}' must be one of {', '.join(get_args(BosSetting))}.")


def windows_bos(setting: BosSetting, eval_bos: bool | None) -> BosSetting:
    """Returns the setting of evaluation windows: ``setting``, or what the former argument says.

    Raises:
        ConfigError: The setting is unknown, or both are given.
    """
    check_bos(setting)
    if eval_bos is None:
        return setting
    new: BosSetting = "always" if eval_bos else "never"
    if setting not in ("auto", new):
        raise ConfigError(f"bos='{setting}' contradicts eval_bos={eval_bos}: give bos alone.")
    warnings.warn(
        f"eval_bos is replaced by bos, which applies to all text. Until the next release eval_bos={eval_bos} means "
        f"bos='{new}' for evaluation windows alone.",
        FutureWarning,
        stacklevel=3,
    )
    return new


def adds_bos(tokenizer: Any) -> bool:
    """Returns whether the tokenizer puts BOS before a text by itself."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    own = tokenizer("a", verbose=False)["input_ids"]
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    return bool(own) and own[0] == bos and plain[:1] != [bos]


def bos_id(tokenizer: Any, setting: BosSetting) -> int | None:
    """Returns the BOS id to begin sequences with, None where none is added.

    Raises:
        ConfigError: ``always``, and the tokenizer has no BOS token.
    """
    if setting == "never" or (setting == "auto" and not adds_bos(tokenizer)):
        return None
    if tokenizer.bos_token_id is None:
        raise ConfigError("bos='always': the tokenizer has no BOS token. Give bos='never'.")
    return int(tokenizer.bos_token_id)


def with_bos(ids: list[int], bos: int | None) -> list[int]:
    """Returns ``ids`` with BOS before them, unless there is none to add or they begin with it."""
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
