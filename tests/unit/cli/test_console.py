"""``--quiet``, ``--verbose`` and ``--json``."""

import json
import logging
import math

import pytest

from hfprune.cli.console import Console, take_flags
from hfprune.cli.entry import HELP, main
from hfprune.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "expected", "rest"),
    [
        ([], {}, []),
        (["--quiet", "--model.path", "M"], {"quiet": True}, ["--model.path", "M"]),
        (["--output_dir=o", "--json"], {"json": True}, ["--output_dir=o"]),
        (["--verbose=true", "--json", "False"], {"verbose": True}, []),
        (["--json", "M"], {"json": True}, ["M"]),
        (["--quiet=false", "--verbose"], {"verbose": True}, []),
    ],
)
def test_flags_are_taken_from_anywhere(given, expected, rest):
    assert take_flags(given) == (Console(**expected), rest)


@pytest.mark.parametrize("given", [["--quiet", "--verbose"], ["--json=maybe"]])
def test_wrong_flags_are_one_line(given, capsys):
    with pytest.raises(ConfigError):
        take_flags(given)
    assert main(["prune", *given]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_levels():
    assert Console(quiet=True).level == logging.WARNING
    assert Console().level == logging.INFO
    assert Console(verbose=True).level == logging.DEBUG


def test_json_is_strict(capsys):
    Console(json=True).write({"kl": math.nan})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"kl": "nan"}
    Console().write({"kl": 1.0})
    Console(json=True).write(None)
    assert capsys.readouterr().out == ""


def test_the_help_lists_them():
    assert all(f"--{name}" in HELP for name in ("quiet", "verbose", "json"))
