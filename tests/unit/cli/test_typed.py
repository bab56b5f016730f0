"""Command lines that are proposed from the one that was typed."""

import shlex

import pytest

from hfprune.cli.arguments import understood
from hfprune.cli.closing import next_commands
from hfprune.cli.typed import Typed


@pytest.mark.parametrize("output", ["-o out", "--output out", "--output-dir out", "--output_dir=out"])
@pytest.mark.parametrize("overwrite", ["--overwrite", "--overwrite true", "--overwrite=yes"])
def test_fit_has_the_model_and_one_folder(tmp_path, output, overwrite):
    args = f"{overwrite} M --ratio 0.2 {output} --ckpt-path last".split()
    proposed = {name: line for name, _, line in next_commands({}, tmp_path, typed=Typed.of("prune", args))}
    assert proposed["fit"] == f"hfprune fit M --ratio 0.2 -o {tmp_path}-recovered --data.recovery FILE"


def test_recovery_data_of_a_config_are_kept(tmp_path):
    report = {"config": {"data": {"recovery": "r.txt", "recovery_sequences": 8}}}
    typed = Typed.of("prune", ["M", "--config", "quickstart", "-o", "out"])
    assert {name: line for name, _, line in next_commands(report, tmp_path, typed=typed)}["fit"] == (
        f"hfprune fit M --config quickstart -o {tmp_path}-recovered"
    )


@pytest.mark.parametrize(
    "args",
    [
        "--overwrite true M --ratio 0.2 -o out",
        "--model M --ratio=0.2 -o 'a b' --importance.units mlp heads --trainer.max_epochs=-1",
        "M --sparsity 0.5 --method wanda -o out --data.calibration c4.txt",
    ],
)
def test_a_line_means_what_was_typed(args):
    words = shlex.split(args)
    again = shlex.split(Typed.of("fit", words).line())
    assert again[:2] == ["hfprune", "fit"]
    assert sorted(understood("fit", again[2:])) == sorted(understood("fit", words))
