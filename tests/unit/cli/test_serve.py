"""``--serve``: the multiple of the widths that an engine's formats need, and what is said about widths that miss it."""

import json
from pathlib import Path

import pytest

from hfprune.cli import main
from hfprune.cli.arguments import understood
from hfprune.publishing.engines import SERVING, serving_advice
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny
from tests.helpers.runs import TINY_FLAGS

PRUNE = ["--model.path=m", "--output_dir=o", "--pruning_ratio=0.2"]


def last(args, name):
    """Returns the value that the parser takes: the last one, of the command line or of a recipe."""
    return [arg.partition("=")[2] for arg in args if arg.startswith(f"--{name}=")][-1:]


@pytest.mark.parametrize("serve", SERVING)
def test_the_engine_sets_the_multiple(serve):
    args = understood("prune", [*PRUNE, f"--serve={serve}"])
    assert last(args, "round_to") == [str(SERVING[serve])]
    assert args.index(f"--round_to={SERVING[serve]}") > next(i for i, arg in enumerate(args) if "recipes/fast" in arg)
    assert understood("prune", args) == args


def test_a_multiple_that_is_given_counts(tmp_path):
    assert last(understood("prune", [*PRUNE, "--serve=gguf", "--round_to=32"]), "round_to") == ["32"]
    (tmp_path / "c.yaml").write_text("round_to: 8\nserve: gguf\n")
    assert last(understood("prune", [*PRUNE, f"--config={tmp_path}/c.yaml"]), "round_to") == []


def test_bad_words_and_kinds():
    with pytest.raises(ConfigError, match="--serve 'tpu' is not known. Known: vllm, int4, gguf"):
        understood("prune", [*PRUNE, "--serve=tpu"])
    with pytest.raises(ConfigError, match="--serve sets MLP widths, and --sparsity removes no units"):
        understood("prune", [*PRUNE[:2], "--serve=gguf", "--method=wanda", "--sparsity=0.5"])


def test_advice_for_widths_and_hidden_sizes():
    assert serving_advice([256, 512], 256, "gguf") == ""
    assert serving_advice([256, 500], 256, "gguf").startswith("MLP width 500 is no multiple of 256")
    assert "Q8_0 or Q5_0" in serving_advice([256], 576, "gguf")
    assert serving_advice([128], 40, "int4").endswith("use 8 bits per channel.")
    assert serving_advice([64], 40, "vllm") == ""


def test_plan_and_prune_say_what_the_widths_prevent(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny("m")
    assert main(["plan", "m", "--ratio", "0.1", "--round_to", "4", "--serve", "int4"]) == 0
    out = capsys.readouterr().out
    assert "no multiple of 128, as serve='int4' needs: use --round_to 128." in out
    assert "It loads in: hfprune, transformers 5.23, " in out
    flags = ["--model.path=m", "--output_dir=out", "--pruning_ratio=0.1", "--round_to=4", "--serve=vllm", *TINY_FLAGS]
    assert main(["prune", *flags]) == 0
    out = capsys.readouterr().out
    assert "warning: MLP width 20 is no multiple of 64, as serve='vllm' needs: use --round_to 64." in out
    assert "It loads in: hfprune, transformers 5.23, " in out
    assert json.loads(Path("out/report.json").read_text())["saved"]["width"] == 20
