"""Flags in messages: the library names Python arguments, the command line adds the flag."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from jsonargparse import Namespace

_ARGUMENT = re.compile(
    r"https?://\S+"
    r"|[\w.]+\([^()]*\)"  # a call, in Python
    r"|(?<![\w=])(?:'[^']*'|\"[^\"]*\")"  # a value, or a file
    r"|(?<![\w.\-/=])(?P<name>[a-z]\w*(?:\.\w+)*)=(?=[^\s=])(?P<word>(?:True|False|None)\b)?"
    r"|(?P<ticks>`{1,2})(?P<ticked>[a-z]\w*(?:\.\w+)*)(?P=ticks)"
)

_WORDS = {"True": "true", "False": "false", "None": "null"}
"""Value in Python -> on the command line."""

_RENAMED = {"fresh": "overwrite"}
"""Argument -> flag, where the command line has another name."""


def with_flags(text: str, settings: Mapping[str, Any]) -> str:
    """Returns a message in which ``argument=value`` and `` `argument` `` are flags: ``--group.argument value``.

    An argument that no flag, or more than one flag, can stand for is left as it is. Among several flags of one name
    the one that has the value of the message is meant.

    Args:
        text: The message.
        settings: Every flag, dotted, with its value.

    Example:
        >>> with_flags("check_every=0 must be positive.", {"importance.check_every": 0, "seed": 1})
        '--importance.check_every 0 must be positive.'
        >>> with_flags("alpha=2.0 is not in [0, 1].", {"model.distillation.alpha": 2.0, "recovery.alpha": 64})
        '--model.distillation.alpha 2.0 is not in [0, 1].'
        >>> with_flags("depth=3 exceeds the limit.", {"seed": 1})
        'depth=3 exceeds the limit.'
    """

    def replaced(match: re.Match[str]) -> str:
        name, ticked = match["name"], match["ticked"]
        if ticked is not None:
            flag = _flag(ticked, settings)
            return match[0] if flag is None else f"--{flag}"
        if name is None:
            return match[0]
        flag = _flag(name, settings, text[match.end("name") + 1 :])
        return match[0] if flag is None else f"--{flag} {_WORDS.get(match['word'], '')}"

    return _ARGUMENT.sub(replaced, text)


def settings_of(
    config: Namespace | None, flags: Iterable[str] = (), *, without: Collection[str] = ()
) -> dict[str, Any]:
    """Returns every flag of a command with its value, those of nested classes included.

    Args:
        config: The parsed options, None before parsing.
        flags: Flags of the parser; None is the value of those that ``config`` does not have.
        without: Groups that the command does not use.
    """
    found: dict[str, Any] = dict.fromkeys(flags)
    found |= dict(_leaves(config, ""))
    groups = {flag.partition(".")[0] for flag in found if "." in flag}
    return {
        flag: value for flag, value in found.items() if flag.partition(".")[0] not in without and flag not in groups
    }


def _leaves(config: Any, flag: str) -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items() if isinstance(config, Namespace) else ():
        inner = f"{flag}{name}"
        if not isinstance(value, Namespace):
            yield inner, value
        elif "class_path" in value:
            yield inner, value["class_path"]
            yield from _leaves(value.get("init_args"), f"{inner}.")
        else:
            yield from _leaves(value, f"{inner}.")


def _flag(name: str, settings: Mapping[str, Any], after: str | None = None) -> str | None:
    """Returns the flag of an argument; ``after`` is the text behind ``argument=``, which begins with its value."""
    name = _RENAMED.get(name, name)
    if name in settings:
        return name
    found = [flag for flag in settings if flag.endswith(f".{name}")]
    if len(found) > 1 and after is not None:
        found = [flag for flag in found if _begins_with(after, settings[flag])]
    return found[0] if len(found) == 1 else None


def _begins_with(text: str, value: Any) -> bool:
    """Returns whether a text begins with a value, as Python or a shell writes it."""
    return any(re.match(rf"{re.escape(form)}(?![\w.]*\w)", text) for form in (repr(value), str(value)) if form)
