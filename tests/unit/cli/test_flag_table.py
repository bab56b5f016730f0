"""The packaged table of flags against the parsers, and the help that is written from it."""

import re

import pytest

from hfprune.cli.arguments import full_name
from hfprune.cli.entry import COMMANDS, main
from hfprune.cli.flag_table import table, text
from hfprune.cli.flags import FILE, flags_of, known, knows_trainer
from hfprune.cli.help_pages import PAGES


def test_the_table_is_what_the_parsers_have():
    if knows_trainer():
        assert FILE.read_text(encoding="utf-8") == text(), "run python -m hfprune.cli.flag_table"
    for command, rows in table()["commands"].items():
        own = {name for name in rows if not name.startswith("trainer")}
        assert own == {name for name in flags_of(command) if not name.startswith("trainer")}


@pytest.mark.parametrize("command", PAGES)
def test_help_is_one_screen_and_help_all_has_every_flag(command, capsys):
    assert main([command, "--help"]) == 0
    screen = capsys.readouterr().out.splitlines()
    assert len(screen) <= 45
    assert max(map(len, screen)) <= 120
    assert main([command, "--help-all"]) == 0
    everything = capsys.readouterr().out
    for flag in flags_of(command).values():
        assert flag.form == "group" or f"--{flag.name}" in everything


@pytest.mark.parametrize("command", PAGES)
def test_every_flag_on_the_screen_is_understood(command):
    flags = flags_of(command)
    assert command in COMMANDS
    for name, sentence in PAGES[command][1]:
        for flag in re.findall(r"(?<![\w-])--?[a-z][\w.-]*", f"{name} {sentence}"):
            word = full_name(flag, command, flags)
            assert word in ("help", "print_config", "recipe") or known(word, flags), flag


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--model.help"], "--model.learning_rate float (default: 0.0004)"),
        (["--importance.criterion.help"], "activation_norm"),
        (["--importance.allocation.help"], "sensitivity"),
        (["--lora_prune.help"], "--lora_prune.every"),
    ],
)
def test_help_of_a_group(args, expected, capsys):
    assert main(["fit", *args]) == 0
    assert expected in capsys.readouterr().out


def test_every_mode_is_on_the_screen(capsys):
    assert main(["fit", "--help"]) == 0
    screen = capsys.readouterr().out
    assert all(flag in screen for flag in ("--method", "--sparsity", "--lora_prune", "--recipe", "--ratio"))
