"""The ``hfprune`` command line: commands that run a model are LightningCLIs, the others plain parsers."""

import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hfprune.cli.arguments import understood
from hfprune.cli.commands import COMMANDS
from hfprune.cli.config_files import shipped_configs
from hfprune.cli.console import FLAGS, Console, take_flags
from hfprune.cli.guesses import meant_command
from hfprune.cli.help_pages import help_text
from hfprune.cli.simple_commands import SIMPLE_COMMANDS, run_simple
from hfprune.cli.startup import importing
from hfprune.cli.typed import Typed
from hfprune.utils.errors import HFPruneError
from hfprune.version import __version__

HELP = f"""hfprune {__version__}: prune Hugging Face causal language models and recover their quality,
in one PyTorch Lightning fit.

usage: hfprune COMMAND [--config NAME_OR_FILE.yaml] [--help] [--debug] [flags]

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

examples:
  hfprune fit --config quickstart
  hfprune prune DIR_OR_ID --ratio 0.2 --data FILE -o OUT
  hfprune fit DIR_OR_ID --ratio 0.2 --data.recovery FILE -o OUT --trainer.max_epochs 2
  hfprune evaluate OUT --dense DIR_OR_ID --data TEXT --tasks paper10
  hfprune plan DIR_OR_ID --ratio 0.1 0.2 0.3
  hfprune chat OUT --dense DIR_OR_ID

flags of every command:
{chr(10).join(f"  --{name:<10}{text}" for name, text in FLAGS.items())}

hfprune COMMAND --help is one screen of what most people need; --help-all lists every flag.
--config takes a YAML file, or the name of a config of the package:
{textwrap.indent(textwrap.fill(", ".join(shipped_configs()), width=100), "  ")}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (0 done, 2 bad input, 130 interrupted)."""
    args = _plain(list(sys.argv[1:] if argv is None else argv))
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return 0 if args else 2
    if args[0] == "--version":
        print(__version__)
        return 0
    if args[0].startswith("--completion"):
        return _complete(args)
    if args[0] not in COMMANDS:
        print(_unknown(args[0]), file=sys.stderr)
        return 2
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        console, rest = take_flags(args[1:])
        console.write(_run(args[0], rest, console))
    except HFPruneError as error:
        if debug:
            raise
        print(f"hfprune {args[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that went away
        if debug:
            raise
        print(f"hfprune {args[0]}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(" ".join(f"hfprune {args[0]}: interrupted. {interruption}".split()), file=sys.stderr)
        return 130
    return 0


def _plain(args: list[str]) -> list[str]:
    """Returns a command line in which ``help`` and ``version`` are flags."""
    first, *others = args or [""]
    if first in ("version", "-V", "-v"):
        return ["--version"]
    if first == "help":
        return [*others[:1], "--help"]
    if others == ["help"] and first in COMMANDS and not os.path.exists("help"):
        return [first, "--help"]
    return args


def _run(command: str, args: list[str], console: Console) -> Mapping[str, Any] | None:
    """Runs a command; returns its result, None if it has none or another process writes it."""
    if command in SIMPLE_COMMANDS:
        run_simple(command, [*args, *(["--json"] if console.json else [])])
        return None
    if (text := help_text(command, args)) is not None:
        print(text)
        return None
    typed, args = Typed.of(command, args), understood(command, args)
    with importing():
        from hfprune.cli.launch import launch  # Lightning and transformers take seconds to import

    with console.applied(command), _current_folder():
        return launch(typed, args)


@contextmanager
def _current_folder() -> Iterator[None]:
    """Lets ``class_path: my_project.MyCriterion`` name a class in the current folder, after installed packages.

    Modules imported from that folder are dropped afterwards, since the process may run another command elsewhere.
    """
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    before = set(sys.modules)
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
        own = {name for name in set(sys.modules) - before if "." not in name and _lies_in(folder, sys.modules[name])}
        for name in [name for name in sys.modules if name.partition(".")[0] in own]:
            del sys.modules[name]


def _lies_in(folder: str, module: object) -> bool:
    """Whether ``module`` is ``folder/NAME.py`` or a package ``folder/NAME``."""
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
    return any(place and os.path.dirname(os.path.abspath(place)) == folder for place in places)


def _complete(args: list[str]) -> int:
    """Prints the completion script for the shell that is named; returns the exit status."""
    from hfprune.cli.completion import script

    shell = args[0].partition("=")[2]
    try:
        print(script(shell or "".join(args[1:2]), list(COMMANDS)), end="")
    except HFPruneError as error:
        print(f"hfprune: error: {error}", file=sys.stderr)
        return 2
    return 0


def _unknown(command: str) -> str:
    if os.path.isdir(command):
        example = f"hfprune prune {command} --ratio 0.2 -o OUT"
        return f"hfprune: error: '{command}' is no command. To prune this model: {example}"
    near = meant_command(command, COMMANDS)
    guess = f" Did you mean '{near}'?" if near else ""
    return f"hfprune: error: unknown command '{command}'.{guess} Commands: {', '.join(COMMANDS)}."


if __name__ == "__main__":
    sys.exit(main())
