"""One-line errors of the argument parser: the flag, the reason and the nearest valid name."""

import ast
import importlib
import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from hfprune.cli.guesses import guess, meant
from hfprune.criteria import Criterion
from hfprune.utils.compat import parser_actions
from hfprune.utils.errors import ConfigError
from hfprune.utils.spelling import nearest

_NOT_PLAIN = "cannot represent an object"
"""What YAML says of an enumeration among the defaults of a class."""

_IN_PYTHON = (
    "A class that was given has a default which no file of options can hold, as Timer has: give it in Python. For a "
    "limit of time there is --trainer.max_time."
)


def one_line(error: ArgumentError, parser: LightningArgumentParser) -> str:
    """Returns the parser's complaint in one line, with the nearest option when one is not known."""
    text = " ".join(str(error).split())
    if _NOT_PLAIN in text:
        return _IN_PYTHON
    known = {name.lstrip("-") for action in parser_actions(parser) for name in (*action.option_strings, action.dest)}
    for pattern in (r"unrecognized arguments: (?:[^-]\S* )*--([\w.-]+)", r"[Oo]ption '([\w.-]+)' is not accepted$"):
        if (unknown := re.search(pattern, text)) and "class_path" not in text:
            return text + guess(*meant(unknown[1], known))
    return _of_class(text) or _of_value(text) or _of_group(text) or text


def refused(text: str) -> str | None:
    """Returns why a nested class refused its options when it was made, None if ``text`` says something else."""
    text = " ".join(text.split())
    if _NOT_PLAIN in text:
        return _IN_PYTHON
    found = re.search(r"^Does not validate against any of the Union subtypes .*?Errors: - (.*?) - Expected a ", text)
    return found[1] if found else None


def first_cause(error: BaseException) -> BaseException:
    """Returns the error that others were raised from."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def not_built(error: Exception, cause: BaseException) -> str:
    """Returns which class cannot be built, and why, in one line."""
    known = re.findall(r"class_path='([\w.]+)'", str(error)) or re.findall(r"class_path '([\w.]+)'", str(error))
    name = known[0].rpartition(".")[2] if known else "A class"
    lines = str(cause).split("HINT:")
    hint = lines[1].strip() if len(lines) > 1 else ""
    return f"{name} cannot be built: {' '.join(lines[0].split())}{' ' + hint if hint else ''}"


def _of_class(text: str) -> str | None:
    """Returns the error in the options of a class, of the innermost class that has one."""
    key = re.search(r'Parser key "([\w.]+)"', text)
    ends = " - Expected a | - Problem with | - Not a valid | - Import path |$"
    found = re.findall(rf"Problem with given class_path '([\w.]+)': (.*?)(?={ends})", text)
    if key is None or not found:
        return None
    path, reason = found[-1]
    if failed := import_error(path):
        return f"--{key[1]} {path}: {failed}"
    name = path.rpartition(".")[2]
    if option := re.search(r"[Oo]ption '([\w.]+)' is not accepted", reason):
        return f"--{key[1]}: {name} has no option '{option[1]}'" + guess(nearest(option[1], _options(path)))
    if re.fullmatch(r"'\w+' object has no attribute '\w+'", reason):
        reason = "init_args is not a mapping of options"
    if wrong := re.match(r'Parser key "([\w.]+)": (.*)', reason):
        reason = f"{wrong[1]}: {_short(wrong[2])}"
    return f"--{key[1]}: {name}: {reason}"


def _of_value(text: str) -> str | None:
    """Returns what kinds of values a flag takes."""
    value = re.search(r'Parser key "([\w.]+)": .*?Subtypes: \[(.*?)\] Errors: .*Given value: (.*)$', text)
    if value is None:
        plain = re.fullmatch(r'Parser key "([\w.]+)": (Expected a .*)', text)
        return f"--{plain[1]} {_short(plain[2])}" if plain else None
    if failed := import_error(class_path_of(value[3])):
        return f"--{value[1]} {class_path_of(value[3])}: {failed}"
    extra = _key_next_to_class_path(value[3])
    if extra:
        return f"--{value[1]}: '{extra}' is not accepted next to class_path: options of the class belong in init_args."
    return f"--{value[1]} {value[3]}: expected {_kinds(value[2])}."


def _of_group(text: str) -> str | None:
    """Returns which file of the model's options cannot be read."""
    found = re.match(r"""Parser key "model": Unable to load config ['"]([^'"]*)['"]""", text)
    return f"--model {found[1]}: this YAML file of options cannot be read." if found else None


def _short(text: str) -> str:
    """Returns ``Expected a <class 'int'>. Got value: abc`` as ``abc: expected int``."""
    union = re.search(r"Subtypes: \[(.*?)\] Errors: .*Given value: (.*)$", text)
    if union:
        return f"{union[2]}: expected {_kinds(union[1])}."
    found = re.fullmatch(r"Expected an? (.*?)\.? Got value: (.*)", text)
    if found is None:
        return text
    return f"{found[2]}: expected {_kinds(found[1])}."


def _kinds(listed: str) -> str:
    """Returns the types that the parser lists, without their modules; concrete classes for a criterion.

    >>> _kinds("Literal['alpaca', 'chat']"), _kinds("<class 'int'>, <class 'NoneType'>")
    ('alpaca or chat', 'int')
    """
    if words := re.fullmatch(r"(?:typing\.)?Literal\[('[^\]]*')\]", listed):
        return " or ".join(re.findall(r"'([^']*)'", words[1]))
    kinds = [kind.rpartition(".")[2] for kind in re.findall(r"<class '([\w.]+)'>", listed)]
    kinds = [kind for kind in kinds if kind != "NoneType"]
    if kinds == ["Criterion"]:
        kinds = sorted(_concrete(Criterion))
    return " or ".join({"Sequence": "a list"}.get(kind, kind) for kind in kinds) or listed.removeprefix("typing.")


def import_error(path: str) -> str | None:
    """Returns why a class cannot be imported, None for a class that can and for a name without a module.

    >>> import_error("hfprune.criteria.Magnitude"), import_error("Magnitude")
    (None, None)
    >>> import_error("no_such_project.MyCriterion")
    "there is no module 'no_such_project' in the current folder or among the installed packages"
    """
    module, _, name = path.rpartition(".")
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module):
        return None
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return f"there is no module '{error.name}' in the current folder or among the installed packages"
        return f"'{module}' cannot be imported: {error}"
    except Exception as error:  # importing runs the user's code
        return f"'{module}' cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"
    if hasattr(found, name):
        return None
    classes = {other for other, value in vars(found).items() if inspect.isclass(value)}
    return "there is no such class" + guess(nearest(name, classes))


def class_path_of(value: str) -> str:
    """Returns the class that a value names: by its path alone, or as ``class_path`` of a mapping."""
    stated = re.search(r"class_path['\"]?\s*[:=]\s*['\"]?([\w.]+)", value)
    return stated[1] if stated else value


def _key_next_to_class_path(value: str) -> str | None:
    """Returns a key next to ``class_path`` that is not allowed there."""
    try:
        given = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return None
    if not isinstance(given, Mapping) or "class_path" not in given:
        return None
    return next((str(key) for key in given if key not in ("class_path", "init_args", "dict_kwargs")), None)


def _options(path: str) -> list[str]:
    """Returns the names of the arguments of a class; none where it cannot be found."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)  # the parser has imported it
    return list(inspect.signature(found).parameters) if inspect.isclass(found) else []


def _concrete(kind: type[Any]) -> set[str]:
    """Returns the names of all classes below ``kind`` that objects can be made of."""
    found: set[str] = set()
    for c in kind.__subclasses__():
        found |= _concrete(c)
    return found if inspect.isabstract(kind) else found | {kind.__name__}


def check_nulls(config: Namespace, classes: Mapping[str, type[Any]], defaults: Mapping[str, Any]) -> None:
    """Raises ``ConfigError`` for an option that is null and takes no null.

    Args:
        config: What was parsed.
        classes: Group of options -> the class that takes them.
        defaults: Default of each option that is in no group.
    """
    for name, default in defaults.items():
        if default is not None and config.get(name, default) is None:
            raise ConfigError(f"--{name} null: it takes a value, {default!r} by default.")
    for group, kind in classes.items():
        for flag, hint in _nulls(config.get(group), kind, group):
            raise ConfigError(f"--{flag} null: expected {getattr(hint, '__name__', hint)}.")


def _nulls(options: Any, kind: type[Any], flag: str) -> Iterator[tuple[str, Any]]:
    """Yields the flags of a class's options that are null and may not be, with what they take."""
    hints = _hints(kind)
    for name, value in vars(options).items() if isinstance(options, Namespace) else ():
        hint = hints.get(name, Any)
        if value is None:
            if not _takes_none(hint):
                yield f"{flag}.{name}", hint
        elif isinstance(value, Namespace):
            inner = _class_of(value, hint)
            if inner is not None:
                yield from _nulls(value.get("init_args", value), inner, f"{flag}.{name}")


def _class_of(value: Namespace, hint: Any) -> type[Any] | None:
    """Returns the class that takes the options in ``value``: the one that it names, else the one of the hint."""
    if "class_path" in value:
        module, _, name = value.class_path.rpartition(".")
        found = getattr(sys.modules.get(module), name, None)
        return found if inspect.isclass(found) else None
    kinds = [kind for kind in (get_args(hint) or (hint,)) if inspect.isclass(kind) and kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else None


def _takes_none(hint: Any) -> bool:
    if hint is Any or hint is None or hint is type(None):
        return True
    return get_origin(hint) in (Union, types.UnionType) and any(_takes_none(part) for part in get_args(hint))


def _hints(kind: type[Any]) -> dict[str, Any]:
    """Returns the types of a class's arguments; none where they cannot be read."""
    try:
        return get_type_hints(kind.__init__)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers alone
        return {}
