"""Recipes: settings that belong together under one word, and the methods that ``--method`` names."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from hfprune.cli.config_files import BUDGETS, read_config, shipped_configs
from hfprune.cli.flags import Given, sparse_methods
from hfprune.cli.methods import config_of, is_sparse, structured, unknown
from hfprune.publishing.engines import SERVING
from hfprune.utils.errors import ConfigError
from hfprune.utils.spelling import nearest

DEFAULT = "fast"
"""Recipe of ``prune`` and ``fit`` where nothing of a recipe is given."""
_CHOSEN = (
    "model.objective",
    "importance.criterion",
    "importance.objective",
    "importance.compensation",
    "importance.allocation",
    "importance.self_distillation",
    "importance.distillation",  # its old name
)
"""Flags that choose a method: with one of them, no recipe is added."""
_SPARSE = ("sparsity", "update", "sparse")
_FITTED = {"mlp", "heads"}
"""Units that the default recipe can fit the kept weights of."""


def recipes() -> list[str]:
    """Returns the names of the recipes.

    >>> recipes()
    ['best', 'fast', 'paper']
    """
    return sorted(path.partition("/")[2] for path in shipped_configs() if path.startswith("recipes/"))


def default_round_to(units: Collection[str]) -> int | Literal["auto"]:
    """Returns the ``round_to`` of ``prune`` where no method is chosen: that of the default recipe, if it applies.

    >>> default_round_to(["mlp"]), default_round_to(["layers"])
    ('auto', 1)
    """
    found: int | Literal["auto"] = 1
    if _FITTED.issuperset(units):
        found = read_config(str(shipped_configs()[f"recipes/{DEFAULT}"])).get("round_to", found)
    return found


def with_recipe(command: str, given: Sequence[Given]) -> list[Given]:
    """Returns the flags with the config of their recipe in front: the one of ``--recipe``, or the default.

    Args:
        command: Name of the command; only ``fit`` and ``prune`` have recipes.
        given: The flags.

    Raises:
        ConfigError: There is no such recipe, or the command has none.
    """
    asked = [item for item in given if item.name == "recipe"]
    others = [item for item in given if item.name != "recipe"]
    if asked and command not in ("fit", "prune"):
        raise ConfigError(f"--recipe belongs to prune and fit: {command} has no recipes.")
    if asked:
        return [_config(_recipe(asked[-1].value or "")), *others]
    if command not in ("fit", "prune") or not _open(others):
        return others
    return [_config(DEFAULT), *others]


def with_serving(command: str, given: Sequence[Given]) -> list[Given]:
    """Returns the flags with the ``--round_to`` that ``--serve`` needs, unless one is given.

    Args:
        command: Name of the command.
        given: The flags, before a recipe is added.

    Raises:
        ConfigError: ``--serve`` has another value, or pruning changes no widths.
    """
    stated = dict(_statements(given)) if command in ("fit", "prune") else {}
    serve = stated.get("serve")
    if serve is None:
        return list(given)
    if serve not in SERVING:
        raise ConfigError(f"--serve '{serve}' is not known. Known: {', '.join(SERVING)}.")
    sparse = next((flag for flag in stated if flag.partition(".")[0] in _SPARSE), None)
    if sparse is not None:
        raise ConfigError(f"--serve sets MLP widths, and --{sparse} removes no units: leave --serve out.")
    if "round_to" in stated:
        return list(given)
    return [*given, Given("round_to", str(SERVING[serve]))]


def recipe_line(args: Sequence[str]) -> str | None:
    """Returns the line that names the recipe of a command line; None if the method was chosen otherwise."""
    files = {str(path): name for name, path in shipped_configs().items() if name.startswith("recipes/")}
    used = [
        files[arg.partition("=")[2]] for arg in args if arg.startswith("--config=") and arg.partition("=")[2] in files
    ]
    if not used:
        return None
    name = used[-1].partition("/")[2]
    return f"Recipe {name} (of {', '.join(recipes())}); --print_config shows its settings."


def with_method(command: str, given: Sequence[Given]) -> list[Given]:
    """Returns the flags with a structured ``--method`` replaced by the settings that it stands for.

    Args:
        command: Name of the command.
        given: The flags.

    Raises:
        ConfigError: No method has this name, or it does not go with the budget.
    """
    method = next((item for item in given if item.name == "method"), None)
    if command not in ("fit", "prune") or method is None or method.value is None:
        return list(given)
    name, flags = method.value, set(_stated(given))
    sparse = any(flag.partition(".")[0] in _SPARSE for flag in flags)
    budget = next((flag for flag in flags if flag in BUDGETS or flag.startswith("importance.")), None)
    options, config = structured(name), config_of(name)
    if _is_class(name) and options is None:
        return list(given)
    if options is None and config is None and not is_sparse(name):
        raise ConfigError(unknown(name))
    if is_sparse(name) and (sparse or budget is None):
        return list(given)
    if options is None and config is None:
        raise ConfigError(f"--method {name} sets single weights to zero: give --sparsity 0.5 in place of --{budget}.")
    if sparse:
        raise ConfigError(f"--method {name} removes units: give --pruning_ratio 0.2 in place of --sparsity.")
    return _replaced(given, method, options, config)


def check_budget(command: str, given: Sequence[Given]) -> None:
    """Raises ``ConfigError`` where a budget or its method is missing: the parser would notice only after seconds.

    Args:
        command: Name of the command.
        given: The flags, with recipes and methods replaced.
    """
    stated = dict(_statements(given))
    if command in ("fit", "prune") and not stated.keys() & set(BUDGETS):
        _check_sparse(stated.keys())
    other = any(flag.partition(".")[0] in (*_SPARSE, "method", "lora_prune") for flag in stated)
    own = any(flag.startswith("importance.allocation") for flag in stated)  # it may set the number of units itself
    if command in ("fit", "prune") and not other and not own and not stated.keys() & set(BUDGETS):
        raise ConfigError(
            f"Give exactly one of {', '.join('--' + name for name in BUDGETS)}; none was given. For example: "
            "--ratio 0.2."
        )


def _check_sparse(flags: Collection[str]) -> None:
    """Raises ``ConfigError`` where one of ``method`` and ``sparsity`` is given without the other."""
    if "sparsity" in flags and "method" not in flags:
        raise ConfigError(
            f"--method is required with --sparsity: a name ({', '.join(sparse_methods())}). To remove whole units, "
            "give --ratio in place of --sparsity."
        )
    if "method" in flags and "sparsity" not in flags:
        raise ConfigError(
            "--sparsity is required with --method: share of zeros (0.5) or N:M (2:4). To remove whole units, give "
            "--ratio."
        )


def _replaced(
    given: Sequence[Given], method: Given, options: Mapping[str, str] | None, config: str | None
) -> list[Given]:
    """Returns the flags with ``--method`` as options of ``importance``, and those of the method as the criterion's."""
    kind = type(method)
    found = [] if options is not None else [kind("config", str(shipped_configs()[config or ""]))]
    for item in given:
        if item is method:
            found += [kind(f"importance.{name}", value) for name, value in (options or {}).items()]
        elif item.name.startswith("method."):
            found.append(kind(f"importance.criterion.{item.name.removeprefix('method.')}", item.value))
        else:
            found.append(item)
    return found


def _is_class(name: str) -> bool:
    """Returns whether a method is written as a class, its path, or a mapping."""
    return "." in name or name.lstrip().startswith("{") or name[:1].isupper()


def _recipe(name: str) -> str:
    known = recipes()
    if name.lower() not in known:
        near = nearest(name, known)
        question = f" Did you mean '{near}'?" if near else ""
        raise ConfigError(f"Unknown recipe '{name}'.{question} Recipes: {', '.join(known)}.")
    return name.lower()


def _config(recipe: str) -> Given:
    return Given("config", str(shipped_configs()[f"recipes/{recipe}"]))


def _open(given: Sequence[Given]) -> bool:
    """Returns whether nothing chooses a method: neither a flag nor a config file."""
    stated = dict(_statements(given))
    closed = (*_CHOSEN, "method", "sparsity", "update", "sparse", "lora_prune")
    if any(flag == name or flag.startswith(f"{name}.") for flag in stated for name in closed):
        return False
    if any(flag.startswith("trainer.strategy") and "ModelParallel" in str(value) for flag, value in stated.items()):
        return False  # layers are not fitted one by one where each process has a part of the weights
    units = str(stated.get("importance.units", "mlp"))
    return set(units.replace('"', "").replace("'", "").strip("[]").replace(" ", "").split(",")) <= _FITTED


def _stated(given: Sequence[Given]) -> list[str]:
    return [flag for flag, _ in _statements(given)]


def _statements(given: Sequence[Given]) -> Iterator[tuple[str, Any]]:
    """Yields each flag that the command line or one of its files gives, dotted, with its value; null is not given."""
    for item in given:
        if item.name == "config" and item.value is not None:
            yield from _leaves(read_config(item.value))
        elif item.value not in (None, "null"):
            yield item.name, item.value


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping) and "class_path" not in value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value
