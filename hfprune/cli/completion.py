"""Shell completion of commands, flags and the values that have names, written from the table of flags."""

from collections.abc import Iterator

from hfprune.cli.flags import Flag, flags_of, objectives, short_names, sparse_methods
from hfprune.cli.methods import kind_of, method_names
from hfprune.cli.recipes import recipes
from hfprune.utils.errors import ConfigError

_SHORT = ("--ratio", "--model", "--data", "-o", "-c", "--help", "--help-all", "--print_config")

_SCRIPT = """_hfprune() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}} $before" in
{values}
        *) case "${{COMP_WORDS[1]}}" in
{flags}
            esac ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _hfprune hfprune
"""


def script(shell: str, commands: list[str]) -> str:
    """Returns the completion script of a shell; files are completed where no word fits.

    Args:
        shell: ``bash``, or ``zsh``, which reads the same script through ``bashcompinit``.
        commands: Names of the commands.

    Raises:
        ConfigError: The shell is another one.
    """
    if shell not in ("bash", "zsh"):
        raise ConfigError(f"--completion {shell or 'without a shell'}: choose bash or zsh.")
    text = _SCRIPT.format(
        commands=" ".join(commands),
        values="\n".join(_values(commands)),
        flags="\n".join(f'            {name}) words="{_flags(name)}" ;;' for name in commands),
    )
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def _flags(command: str) -> str:
    own = [f"--{flag.name}" for flag in flags_of(command).values() if flag.form != "group"]
    also = ["--recipe"] if command in ("fit", "prune") else []
    return " ".join([*_SHORT, *also, *own])


def _values(commands: list[str]) -> Iterator[str]:
    """Yields the cases of flags whose values have names."""
    rows: dict[str, dict[str, str]] = {}
    for command in commands:
        for flag in flags_of(command).values():
            if words := _words(flag):
                rows.setdefault(words, {})[f'"{command} --{flag.name}"'] = ""
    rows[" ".join(recipes())] = {'"prune --recipe"': "", '"fit --recipe"': ""}
    yield from (f'        {" | ".join(cases)}) words="{words}" ;;' for words, cases in rows.items())


def _words(flag: Flag) -> str:
    kind = kind_of(flag.name)
    if kind is not None:
        return " ".join(short_names().get(kind, {}))
    if flag.name in ("method", "methods"):
        return " ".join(sorted({*method_names(), *(sparse_methods() if flag.name == "method" else ())}))
    if flag.name.endswith("objective"):
        return " ".join(objectives())
    if flag.form == "bool":
        return "true false"
    choices = flag.type.removesuffix("|null").split("|")
    return " ".join(choices) if flag.form == "any" and len(choices) > 1 and "str" not in choices else ""
