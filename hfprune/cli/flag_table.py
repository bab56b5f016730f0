"""Writes ``flags.json``, the table of flags, from the parsers: ``python -m hfprune.cli.flag_table``."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from hfprune.allocation import Allocation
from hfprune.cli.base import BaseCLI
from hfprune.cli.flags import FILE, OLD_FLAGS
from hfprune.cli.launch import CLASSES
from hfprune.compensation import Compensation
from hfprune.criteria import CRITERIA
from hfprune.objectives import OBJECTIVES
from hfprune.sparse import METHODS, SparseAllocation
from hfprune.utils.compat import parser_actions, type_hint
from hfprune.utils.settings import snake_case

_LISTS = (list, Sequence, tuple)


class _ParserFoundError(Exception):
    """Ends the construction of a command when its parser is complete."""


def parser_of(command: str) -> LightningArgumentParser:
    """Returns the complete parser of a command; nothing is parsed."""
    found: list[LightningArgumentParser] = []

    def stop(self: BaseCLI, parser: LightningArgumentParser, args: Any) -> None:
        found.append(parser)
        raise _ParserFoundError

    kind = type("ParserOnly", (CLASSES[command],), {"parse_arguments": stop})
    with suppress(_ParserFoundError):
        kind(command, [])
    return found[0]


def table() -> dict[str, Any]:
    """Returns the table: flags, the flags of each command, and the names that stand for classes."""
    flags: dict[str, dict[str, Any]] = {}
    commands: dict[str, dict[str, dict[str, Any]]] = {}
    for command, kind in CLASSES.items():
        rows = {row.pop("name"): row for row in _rows(parser_of(command)) if kind.uses(row["name"])}
        rows = {name: row for name, row in rows.items() if name not in OLD_FLAGS}
        commands[command] = {}
        for name, row in rows.items():
            shared = flags.setdefault(name, row)
            commands[command][name] = {key: value for key, value in row.items() if shared[key] != value}
    return {
        "lightning": version("lightning"),
        "flags": flags,
        "commands": commands,
        "names": {
            "criterion": {name: _path(kind) for name, kind in CRITERIA.items()},
            "allocation": _names(Allocation),
            "compensation": _names(Compensation),
            "sparse_allocation": _names(SparseAllocation),
        },
        "objectives": list(OBJECTIVES),
        "sparse_methods": list(METHODS),
    }


def text() -> str:
    """Returns the table as the file holds it."""
    return json.dumps(table(), indent=1, ensure_ascii=False) + "\n"


def _rows(parser: LightningArgumentParser) -> Iterator[dict[str, Any]]:
    for action in parser_actions(parser):
        name = action.dest
        if name in ("help", "print_config") or name.endswith(".help"):
            continue
        hint = type_hint(action)
        group = hint is None and name != "config"
        yield {
            "name": name,
            "type": "" if group else _type(hint) if hint is not None else "FILE",
            "form": "group" if group else _form(hint),
            "default": "" if group else _default(action.default),
            "help": " ".join(re.split(r"\n*Default: ", action.help or "")[0].split()),
            "required": bool(getattr(action, "required", False)),
        }


def _form(hint: Any) -> str:
    kinds = [kind for kind in _flat(hint) if kind is not NoneType]
    if kinds and all(get_origin(kind) in _LISTS for kind in kinds):
        return "list"
    if any(_holds_options(kind) for kind in kinds):
        return "class"
    for kind in (bool, int, float):
        if kinds == [kind]:
            return kind.__name__
    return "any"


def _flat(hint: Any) -> list[Any]:
    """Returns the members of a union, and of the unions in it."""
    if get_origin(hint) is None or get_origin(hint) in (*_LISTS, dict, Mapping, Literal) or not _is_union(hint):
        return [hint]
    return [kind for part in get_args(hint) for kind in _flat(part)]


def _is_union(hint: Any) -> bool:
    return getattr(get_origin(hint), "__name__", "") in ("Union", "UnionType")


def _holds_options(kind: Any) -> bool:
    """Returns whether dotted flags may follow: a class, classes in a list, or a mapping."""
    if get_origin(kind) is not None:
        return get_origin(kind) is dict or any(_holds_options(part) for part in get_args(kind))
    return inspect.isclass(kind) and kind.__module__ not in ("builtins", "jsonargparse.typing", "pathlib", "datetime")


def _type(hint: Any) -> str:
    if hint is NoneType:
        return "null"
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "|".join(map(str, args))
    if _is_union(hint):
        # typing caches unions: which of int | float and float | int comes back depends on what was imported before
        return "|".join(sorted({_type(part) for part in args}, key=lambda part: (part == "null", part)))
    if origin is not None and args:
        inner = ", ".join(_type(part) for part in args if part is not ...)
        return f"{'list' if origin in _LISTS else getattr(origin, '__name__', str(origin))}[{inner}]"
    return str(getattr(hint, "__name__", hint))


def _default(value: Any) -> str:
    if value is None or value == "==SUPPRESS==":
        return ""
    if not isinstance(value, str | int | float | bool | list | tuple | dict):
        return str(value)
    dumped: str = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
    return dumped.removesuffix("\n...\n").strip()


def _names(base: type[Any]) -> dict[str, str]:
    """Returns the snake_case names of the classes below ``base``, without the last word of the base."""
    found = {snake_case(kind.__name__).removesuffix(f"_{base.__name__.lower()}"): _path(kind) for kind in _below(base)}
    return dict(sorted(found.items()))


def _path(kind: type[Any]) -> str:
    return f"{'.'.join(kind.__module__.split('.')[:2])}.{kind.__name__}"  # the room exports it


def _below(base: type[Any]) -> list[type[Any]]:
    found = [kind for child in base.__subclasses__() for kind in (child, *_below(child))]
    return [kind for kind in found if not inspect.isabstract(kind) and kind.__module__.startswith("hfprune.")]


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
