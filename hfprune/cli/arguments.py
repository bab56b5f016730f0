"""What a command line means: aliases, short names, a recipe, and the mistakes that are seen without importing torch.

The result has one form, ``--flag=value``, which the parser reads.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hfprune.cli.config_files import config_path, read_config
from hfprune.cli.flags import Flag, Given, flags_of, known, new_name
from hfprune.cli.guesses import advice, guess, meant, not_used
from hfprune.cli.methods import class_named, kind_of, sweep_methods, with_classes
from hfprune.cli.recipes import check_budget, with_method, with_recipe, with_serving
from hfprune.utils.errors import ConfigError

_ALIASES = {
    "-c": ("config",),
    "-o": ("output_dir", "output"),
    "--output": ("output_dir",),
    "--ratio": ("pruning_ratio", "pruning_ratios"),
    "--ratios": ("pruning_ratios",),
    "--pruning_ratio": ("pruning_ratios",),
    "--model": ("model.path",),
    "--data": ("data.calibration",),
}
"""Short name -> the flags that it stands for, the first that a command has."""
_OF_COMMAND = {("evaluate", "--data"): "data.text"}
_LOGGERS = {
    "comet": "CometLogger",
    "csv": "CSVLogger",
    "mlflow": "MLFlowLogger",
    "tensorboard": "TensorBoardLogger",
    "wandb": "WandbLogger",
}
"""Short name -> logger of Lightning."""
_NO_VALUE = ("print_config", "debug")
_BOOL = ("true", "false", "yes", "no", "null", "on", "off")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def understood(command: str, args: Sequence[str]) -> list[str]:
    """Returns a command line in the parser's own words.

    A word without a flag is the model; ``--ratio``, ``--model``, ``--data``, ``-o`` and ``-c`` are short forms; short
    names stand for classes; a recipe is added where nothing of one is given. Understanding the result again changes
    nothing.

    Args:
        command: Name of the command; one that the table of flags does not list is returned unchanged.
        args: The command line without the command.

    Raises:
        ConfigError: A flag does not exist, a value is missing or of the wrong form, or a required flag is missing.
    """
    flags = flags_of(command)
    if not flags:
        return list(args)
    given = [_named(item) for item in split(command, args)]
    for item in given:
        _check_known(item, command, flags)
    given = [_valued(item, flags) for item in given]
    given = with_recipe(command, with_method(command, with_serving(command, given)))
    if not any(item.name.endswith(("print_config", "help")) for item in given):
        _check_required(given, flags)
        check_budget(command, given)
    return [item.argument() for item in given]


# ---- words -----------------------------------------------------------------------------------------------------------


def split(command: str, args: Sequence[str]) -> list[Given]:
    """Returns the flags of a command line by their full names, with their values.

    Args:
        command: Name of the command.
        args: The command line without it; a word that no flag takes is the model.

    Raises:
        ConfigError: A word belongs to no flag, or a value is missing.
    """
    flags = flags_of(command)
    found: list[Given] = []
    words = list(args)
    while words:
        word = words.pop(0)
        if not _is_flag(word):
            found.append(_model(word, found, command, flags))
            continue
        name, equals, value = word.partition("=")
        full = full_name(name, command, flags)
        if equals:
            found.append(Given(full, value))
        elif full.rpartition(".")[2] in _NO_VALUE:
            found.append(Given(full, None))
        else:
            found.append(Given(full, _value(full, words, flags)))
    return found


def _is_flag(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not _NUMBER.match(word)


def full_name(name: str, command: str, flags: Mapping[str, Flag]) -> str:
    """Returns the flag that a name or alias stands for."""
    plain = name.lstrip("-")
    dashed = plain.replace("-", "_")
    if plain not in flags and (dashed in flags or new_name(dashed) is not None):
        plain = dashed
    own = _OF_COMMAND.get((command, name))
    if own is not None:
        return own
    aliases = () if plain in flags and flags[plain].form != "group" else _ALIASES.get(name, ())
    return next((flag for flag in aliases if flag in flags), plain)


def _model(word: str, found: Sequence[Given], command: str, flags: Mapping[str, Flag]) -> Given:
    last = found[-1].name if found else ""
    if "model.path" not in flags or any(item.name == "model.path" for item in found):
        known_model = next((item.value for item in found if item.name == "model.path"), None)
        after = f" after --{last}" if last and last != "model.path" else ""
        ratio = f" Give --ratio {word}." if "pruning_ratio" in flags and _NUMBER.fullmatch(word) else ""
        raise ConfigError(f"'{word}'{after} belongs to no flag; the model is '{known_model}'.{ratio}")
    return Given("model.path", word)


def _value(name: str, words: list[str], flags: Mapping[str, Flag]) -> str | None:
    """Takes the value of a flag from the words that follow."""
    flag = flags.get(name.rstrip("+"))
    if name == "help" or name.endswith(".help"):
        return words.pop(0) if words and not _is_flag(words[0]) and name != "help" else None
    if flag is not None and flag.form == "bool":
        return words.pop(0) if words and words[0].lower() in _BOOL else "true"
    if not words or _is_flag(words[0]):
        if not known(name, dict(flags)):
            return None
        raise ConfigError(f"--{name} needs a value: {_kind(flag)}.")
    value = words.pop(0)
    if flag is not None and flag.form == "list" and _is_item(value, flag):
        values = [value]
        while words and _is_item(words[0], flag):
            values.append(words.pop(0))
        return ",".join(values)
    return value


def _is_item(word: str, flag: Flag) -> bool:
    """Returns whether a word is one of several values of a list: a number, or one of its words."""
    inner = flag.type.partition("[")[2].rstrip("]")
    return bool(_NUMBER.fullmatch(word)) if inner in ("int", "float") else word in inner.split("|")


def _kind(flag: Flag | None) -> str:
    return "a value" if flag is None or not flag.type else flag.type.removesuffix("|null").replace("|", " or ")


# ---- names and values ------------------------------------------------------------------------------------------------


def _named(item: Given) -> Given:
    """Returns a flag whose value shows what was meant: a file of options of a group, or a model."""
    value = item.value
    if value is None or item.name not in ("model.path", "data.calibration", "data.text", "dense"):
        return item
    if item.name != "dense" and (Path(value).suffix in (".yaml", ".yml") or value.lstrip().startswith("{")):
        return Given(item.name.partition(".")[0], value)
    return Given(item.name, value if item.name.startswith("data.") else _model_folder(value))


def _model_folder(path: str) -> str:
    """Returns the folder of the model where the output folder of a run was given."""
    folder = Path(os.path.expanduser(path))  # an unknown user stays: the model check names it
    inner = folder / "model"
    return str(Path(path) / "model") if not (folder / "config.json").exists() and _is_model(inner) else path


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _check_known(item: Given, command: str, flags: dict[str, Flag]) -> None:
    name = new_name(item.name) or item.name
    if name in ("help", "help_all", "print_config", "recipe") or known(name, flags):
        return
    others = flags_of("fit") | flags_of("sweep") | flags_of("evaluate")
    near = meant(item.name, {*flags, *(alias.lstrip("-") for alias in _ALIASES if alias.startswith("--"))})
    if known(item.name, others) and not near:
        raise ConfigError(not_used(item.name, command))
    value = "" if item.value is None else f" {item.value}"
    hint = advice(item.name)
    raise ConfigError(f"unrecognized arguments: --{item.name}{value}{'.' + hint if hint else guess(*near)}")


def _valued(item: Given, flags: Mapping[str, Flag]) -> Given:
    """Returns a flag with its value as the parser reads it.

    Raises:
        ConfigError: The value is not of the flag's form.
    """
    name, value = item.name.rstrip("+"), item.value
    flag = flags.get(name)
    if value is None:
        return item
    if name == "config":
        return Given(name, _config(value))
    if name.endswith(".help"):
        owner = name.removesuffix(".help")
        return Given(name, class_named(kind_of(owner) or "", value))
    if kind_of(name) is not None:
        return Given(item.name, _dumped(value, with_classes(_loaded(value), name)))
    if name == "trainer.logger":
        return Given(item.name, _LOGGERS.get(value.lower(), value))
    if flag is None:
        return item
    if flag.form == "list":
        return Given(item.name, _listed(value, flag))
    if flag.form in ("int", "float"):
        _check_number(value, flag)
    return item


def _listed(value: str, flag: Flag) -> str:
    """Returns the value of a list: one item, items separated by commas, or YAML."""
    loaded = _loaded(value)
    if flag.name == "methods":
        return _dumped(value, sweep_methods(loaded))
    if isinstance(loaded, list | dict) or loaded is None:
        return value
    items = [_loaded(part) for part in value.split(",") if part.strip()]
    return json.dumps(items)


def _check_number(value: str, flag: Flag) -> None:
    if value in ("null", "~") or value == "auto":
        return
    try:
        number = float(value)
    except ValueError:
        share = value.removesuffix("%")
        hint = f" {value} is {float(share) / 100:g}." if share != value and _NUMBER.fullmatch(share) else ""
        raise ConfigError(f"--{flag.name} {value}: expected {flag.form}.{hint}") from None
    if flag.name == "pruning_ratio" and not 0 < number < 1:
        raise ConfigError(
            f"--pruning_ratio {value} is not between 0 and 1 (both excluded): it is the share of all parameters to "
            "remove, for example 0.2."
        )


def _config(value: str) -> str:
    """Returns a config file, or its text where short names in it stand for classes."""
    path = config_path(value)
    found = read_config(path)
    named = with_classes(found)
    if "methods" in named:
        named["methods"] = sweep_methods(named["methods"])
    return path if named == found else yaml.safe_dump(named, sort_keys=False)


def _loaded(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _dumped(value: str, found: Any) -> str:
    if isinstance(found, str):
        return found
    return value if found is None or found == _loaded(value) else json.dumps(found)


def _check_required(given: Sequence[Given], flags: Mapping[str, Flag]) -> None:
    stated = {item.name for item in given}
    for item in given:
        if item.name == "config" and item.value is not None:
            stated |= read_config(item.value).keys()
    missing = [flag for flag in flags.values() if flag.required and flag.name not in stated]
    if missing:
        short = " (short: -o)" if missing[0].name == "output_dir" else ""
        raise ConfigError(f"--{missing[0].name} is required{short}: {missing[0].help}.")
