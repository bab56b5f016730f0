"""The block at the end of a run."""

import math
from pathlib import Path

import pytest

from hfprune.cli.closing import closing, next_commands, quality, removed
from hfprune.cli.typed import Typed

REPORT = {
    "config": {"model": {"path": "M"}, "data": {"text": "wiki.txt", "calibration": "c4.txt"}},
    "plan": {
        "budget": {
            "dense_params": 1000,
            "params": 800,
            "kinds": {"mlp": {"dense": [8, 8], "kept": [6, 4]}, "heads": {"dense": [2, 2], "kept": [2, 2]}},
        }
    },
    "stages": {"dense": {"perplexity": {"value": 10.0}}, "pruned": {"perplexity": {"value": "inf"}}},
}
PRUNE = Typed.of("prune", ["M", "--pruning_ratio", "0.2", "-o", "out", "--overwrite", "true"])


def test_only_commands_that_exist_are_proposed():
    block = closing(REPORT, Path("out"), typed=PRUNE, commands=["evaluate"])
    assert "hfprune evaluate out --dense M --data wiki.txt" in block
    assert not any(name in block for name in ("hfprune inspect", "hfprune chat", "hfprune fit"))
    assert "Next" not in closing(REPORT, Path("out"), typed=PRUNE, commands=[])
    both = closing(REPORT, Path("out"), typed=PRUNE, commands=["inspect", "chat", "fit"])
    assert "hfprune inspect out\n" in both
    assert "hfprune chat out --dense M" in both
    assert "hfprune fit M --ratio 0.2 -o out-recovered --data.recovery FILE" in both


def test_a_fit_does_not_propose_fit():
    assert "fit" not in [
        name for name, *_ in next_commands(REPORT, Path("out"), typed=Typed.of("fit", ["M", "-o", "out"]))
    ]


def test_evaluate_is_not_proposed_for_a_recovery_that_it_does_not_read(tmp_path):
    typed = Typed.of("fit", ["M", "-o", str(tmp_path)])
    assert "evaluate" in [name for name, *_ in next_commands(REPORT, tmp_path, typed=typed)]
    (tmp_path / "adapter").mkdir()
    assert "evaluate" not in [name for name, *_ in next_commands(REPORT, tmp_path, typed=typed)]


def test_units_and_weights_that_were_removed():
    assert removed(REPORT) == "200 of 1,000 parameters (20.0 %); 6 of 16 MLP neurons"
    zeros = {"saved": {"sparsity": {"zeros": 50, "weights": 100, "achieved": 0.5}}}
    assert removed(zeros) == "50 of 100 weights set to zero (50.00%)"


@pytest.mark.parametrize("value", ["inf", math.inf])
def test_quality_that_is_not_finite(value):
    stages = {"dense": {"perplexity": {"value": 10.0}}, "pruned": {"perplexity": {"value": value}}}
    assert quality({"stages": stages}) == "perplexity 10.00 dense, infinite pruned"


def test_quality_that_was_not_measured():
    assert quality({"stages": {"dense": {}}}).startswith("not measured")
