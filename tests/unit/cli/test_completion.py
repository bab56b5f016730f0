"""The completion script, as bash runs it."""

import subprocess

import pytest

from hfprune.cli.completion import script
from hfprune.cli.entry import COMMANDS, main


def completed(*words):
    line = " ".join(f"'{word}'" for word in ("hfprune", *words))
    code = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _hfprune; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(
        ["/bin/bash", "-c", f"{script('bash', list(COMMANDS))}\n{code}"], capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pr"], ["prune"]),
        (["prune", "--pruning_r"], ["--pruning_ratio"]),
        (["prune", "--rat"], ["--ratio"]),
        (["prune", "MODEL", "--importance.criterion", "activation_n"], ["activation_norm"]),
        (["fit", "--method", "spars"], ["sparsegpt"]),
        (["fit", "--recipe", ""], ["best", "fast", "paper"]),
        (["export", "--trainer"], []),
        (["prune", "--model.dtype", "b"], ["bfloat16"]),
    ],
)
def test_completion(words, expected):
    assert completed(*words) == expected


def test_the_script_is_printed_for_two_shells(capsys):
    assert main(["--completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out
    assert main(["--completion=fish"]) == 2
    assert "choose bash or zsh" in capsys.readouterr().err
