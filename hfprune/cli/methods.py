"""Names on the command line and in config files: methods, criteria, allocations and compensations by short names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from hfprune.cli.config_files import read_config, shipped_configs
from hfprune.cli.flags import objectives, short_names, sparse_methods
from hfprune.utils.errors import ConfigError
from hfprune.utils.spelling import nearest

_KINDS = ("criterion", "allocation", "compensation")
_ALSO = {"hfprune": "entropy", "wanda": "wanda_structured"}
"""Other words for structured methods; with ``--sparsity``, ``wanda`` is the sparse method."""


def plain(name: str) -> str:
    """Returns a name as tables of results write it.

    >>> plain("Activation-Norm")
    'activation_norm'
    """
    return name.strip().lower().replace("-", "_")


def class_named(kind: str, name: str) -> str:
    """Returns the class path that a short name stands for; any other text as it is.

    >>> class_named("compensation", "least_squares"), class_named("criterion", "my_project.MyCriterion")
    ('hfprune.compensation.LeastSquares', 'my_project.MyCriterion')
    """
    return short_names().get(kind, {}).get(plain(name), name)


def kind_of(flag: str) -> str | None:
    """Returns the kind of class that a dotted flag takes, None for flags that take no short names."""
    last = flag.rpartition(".")[2]
    if last not in _KINDS:
        return None
    return "sparse_allocation" if flag == "sparse.allocation" else last


def with_classes(value: Any, flag: str = "") -> Any:
    """Returns parsed YAML in which short names are class paths, and one kind of units is a list.

    Args:
        value: What the file or the flag holds.
        flag: The dotted flag that it is the value of.

    >>> with_classes({"importance": {"criterion": "fisher", "units": "heads"}})
    {'importance': {'criterion': 'hfprune.criteria.Fisher', 'units': ['heads']}}
    """
    kind = kind_of(flag)
    if isinstance(value, str):
        if kind is not None:
            return class_named(kind, value)
        return [value] if flag.rpartition(".")[2] == "units" else value
    if not isinstance(value, Mapping):
        return value
    found = {key: with_classes(item, _inner(flag, key)) for key, item in value.items()}
    if kind is not None and isinstance(path := found.get("class_path"), str):
        found["class_path"] = class_named(kind, path)
    return found


def _inner(flag: str, key: Any) -> str:
    if key == "init_args":
        return f"{flag}.init_args"
    return f"{flag}.{key}" if flag else str(key)


def sweep_methods(value: Any) -> Any:
    """Returns the methods of a sweep as options; text names one, or several separated by commas.

    >>> sweep_methods("entropy, magnitude")
    [{'name': 'entropy', 'objective': 'entropy'}, {'name': 'magnitude', 'criterion': 'hfprune.criteria.Magnitude'}]

    Raises:
        ConfigError: No structured method has a name.
    """
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if not isinstance(value, list):
        return value
    return [_sweep_method(item) if isinstance(item, str) else with_classes(item) for item in value]


def _sweep_method(name: str) -> dict[str, Any]:
    options, config = structured(name), config_of(name)
    if options is None and config is None:
        raise ConfigError(unknown(name, structured_only=True))
    if options is not None:
        return {"name": name, **options}
    found = read_config(str(shipped_configs()[config or ""]))
    settings: dict[str, Any] = {k: v for k, v in found.get("importance", {}).items() if k != "recovery"}
    objective = found.get("model", {}).get("objective")
    return {"name": name} | ({} if objective is None else {"objective": objective}) | settings


def structured(name: str) -> dict[str, str] | None:
    """Returns the options of ``importance`` that a structured method stands for, None for other names.

    >>> structured("entropy"), structured("wanda"), structured("sparsegpt")
    ({'objective': 'entropy'}, {'criterion': 'hfprune.criteria.WandaStructured'}, None)
    """
    criteria = short_names()["criterion"]
    word = _ALSO.get(plain(name), plain(name))
    if word in objectives():
        return {"objective": word}
    if word in criteria:
        return {"criterion": criteria[word]}
    same = [path for path in criteria.values() if name in (path, path.rpartition(".")[2])]
    return {"criterion": same[0]} if same else None


def config_of(name: str) -> str | None:
    """Returns the config of the package that holds the settings of a method or recipe, None for other names.

    >>> config_of("llm_pruner_first"), config_of("paper"), config_of("entropy")
    ('methods/llm_pruner_first', 'recipes/paper', None)
    """
    known = shipped_configs()
    return next((path for path in (f"methods/{plain(name)}", f"recipes/{plain(name)}") if path in known), None)


def method_names() -> list[str]:
    """Returns the names of all structured methods."""
    configs = [path.partition("/")[2] for path in shipped_configs() if path.startswith("methods/")]
    return sorted({*objectives(), *short_names()["criterion"], *configs})


def is_sparse(name: str) -> bool:
    """Returns whether a sparse method has this name."""
    return plain(name) in sparse_methods()


def _longer(name: str, known: Iterable[str]) -> list[str]:
    """Returns the names that begin with a shorter one: a family of methods."""
    return [other for other in known if other.startswith(f"{plain(name)}_")]


def unknown(name: str, *, structured_only: bool = False) -> str:
    """Returns the message for a name that no method has."""
    if structured_only and is_sparse(name):
        return f"'{name}' sets single weights to zero, and a sweep compares methods that remove units."
    known = method_names() if structured_only else sorted({*method_names(), *sparse_methods()})
    near = [nearest(name, known) or ""] if nearest(name, known) else _longer(name, known)
    question = f" Did you mean {' or '.join(repr(other) for other in near)}?" if near else ""
    if structured_only:
        return f"Unknown method '{name}'.{question} Known: {', '.join(known)}."
    if re.fullmatch(r"\d+:\d+|0?\.\d+", name):
        return f"'{name}' is a sparsity: give --sparsity {name}, and a method of {', '.join(sparse_methods())}."
    return (
        f"Unknown method '{name}'.{question} Methods that remove units: {', '.join(method_names())}. Methods that set "
        f"weights to zero: {', '.join(sparse_methods())}."
    )
