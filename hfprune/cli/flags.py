"""The table of flags: every flag of every command with its type, default and help, without importing torch.

``flags.json`` is written by ``python -m hfprune.cli.flag_table``, and a test holds it against the parsers.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("flags.json")


OLD_FLAGS = {
    "importance.look_every": "importance.check_every",
    "importance.stop_when_settled": "importance.early_stop_overlap",
    "importance.distillation": "importance.self_distillation",
}
"""Old flag -> its name now. Command lines and config files may use the old one for one release."""


def new_name(name: str) -> str | None:
    """Returns the flag that an old one, or an option below an old one, is now; None for others.

    >>> new_name("importance.distillation.alpha"), new_name("importance.exact")
    ('importance.self_distillation.alpha', None)
    """
    for old, new in OLD_FLAGS.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return None


@dataclass(slots=True)
class Given:
    """A flag as given.

    Attributes:
        name: Dotted name, without dashes.
        value: Its value, None for a flag without one.
    """

    name: str
    value: str | None

    def argument(self) -> str:
        """Returns it as one argument."""
        return f"--{self.name}" if self.value is None else f"--{self.name}={self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """One flag.

    Attributes:
        name: Its dotted name, without dashes.
        type: What it takes, for people: ``float``, ``auto|float32``, ``Criterion``.
        form: ``bool``, ``int``, ``float``, ``list``, ``class`` (options of its own may follow), ``group``, or ``any``.
        default: Its default as YAML, empty for none.
        help: One sentence or more.
        required: Whether it has to be given.
    """

    name: str
    type: str = ""
    form: str = "any"
    default: str = ""
    help: str = ""
    required: bool = False


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return table


@cache
def flags_of(command: str) -> dict[str, Flag]:
    """Returns the flags of a command by name, empty for a command that the table does not list.

    >>> flags_of("prune")["pruning_ratio"].form
    'float'
    """
    table = _table()
    rows = table["commands"].get(command, {})
    return {name: Flag(name=name, **(table["flags"][name] | differs)) for name, differs in rows.items()}


@cache
def short_names() -> dict[str, dict[str, str]]:
    """Returns the names that stand for classes: kind (``criterion``) -> name (``activation_norm``) -> class path.

    >>> short_names()["criterion"]["activation_norm"]
    'hfprune.criteria.ActivationNorm'
    """
    names: dict[str, dict[str, str]] = _table()["names"]
    return names


@cache
def objectives() -> list[str]:
    """Returns the names of the objectives."""
    names: list[str] = _table()["objectives"]
    return names


@cache
def sparse_methods() -> list[str]:
    """Returns the names of the sparse methods."""
    names: list[str] = _table()["sparse_methods"]
    return names


@cache
def knows_trainer() -> bool:
    """Returns whether the table was made with the installed release of Lightning, whose Trainer has ``--trainer.*``."""
    try:
        return bool(version("lightning") == _table()["lightning"])
    except PackageNotFoundError:  # installed under its other name, pytorch-lightning
        return False


def known(name: str, flags: dict[str, Flag]) -> bool:
    """Returns whether a flag exists: in the table, as an option of a class, or perhaps in another Lightning.

    >>> known("importance.criterion.weighting", flags_of("prune")), known("ratio", flags_of("prune"))
    (True, False)
    """
    plain = name.rstrip("+")
    if plain in flags or (plain.startswith("trainer.") and not knows_trainer() and "trainer" in flags):
        return True
    parts = plain.split(".")
    if parts[-1] == "help" and ".".join(parts[:-1]) in flags:
        return True
    owners = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    owner = next((flags[o] for o in owners if o in flags), None)
    return owner is not None and owner.form == "class"
