"""The simple commands: plan, inspect, chat, card and push, as they are typed."""

import io
import json

import pytest
import torch
from transformers import LlamaConfig

import hfprune
from hfprune.cli import main
from hfprune.cli.simple_commands import MODULES, SIMPLE_COMMANDS
from tests.helpers.models import save_tiny


@pytest.fixture
def base(tmp_path):
    return save_tiny(tmp_path / "base")


@pytest.fixture
def wide(tmp_path):
    """Folder of the config of a model with 1536 neurons per layer."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    sizes = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    LlamaConfig(**sizes, **heads, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


@pytest.fixture
def pruned(base, tmp_path):
    model = hfprune.load(base)
    plan = hfprune.make_plan(model, keep={f"model.layers.{i}.mlp": range(12) for i in range(3)})
    hfprune.apply_plan(model, plan)
    hfprune.save(model, tmp_path / "out/model", plan=plan, tokenizer=hfprune.io.load.load_tokenizer(base))
    return str(tmp_path / "out")


def error_of(capsys, *args):
    """The one line of an error with exit status 2."""
    assert main(list(args)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def test_every_command_has_help_of_one_screen(capsys):
    assert MODULES.keys() == SIMPLE_COMMANDS.keys()
    for command in SIMPLE_COMMANDS:
        assert main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"usage: hfprune {command}")
        assert len(out.splitlines()) <= 45


def test_errors_of_arguments_name_the_flag_that_was_meant(capsys):
    assert "Did you mean --ratio?" in error_of(capsys, "plan", "x", "--rato", "0.2")
    assert "required: REPO" in error_of(capsys, "push", "x")
    assert "invalid choice: 'mode'" in error_of(capsys, "push", "x", "me/y", "--what", "mode")
    assert "'much' is no share of all parameters" in error_of(capsys, "plan", "x", "--ratio", "much")


def test_plan_prints_a_row_per_ratio(base, capsys):
    assert main(["plan", base, "--ratio", "0.1", "0.3", "--tokens", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["dense", "0.1", "0.3"]
    assert "19 (exact 19.2)" in lines[2]
    assert main(["plan", base, "--ratio", "0.1", "--round_to", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][1]["widths"] == [20, 20, 20]


def test_plan_rounds_as_the_default_recipe_does(wide, capsys):
    def widths(*flags):
        assert main(["plan", wide, "--ratio", "0.2", "--json", "--tokens", "8", *flags]) == 0
        return set(json.loads(capsys.readouterr().out)["plans"][1]["widths"])

    assert widths() == widths("--round_to", "auto") == {1024}
    assert widths("--round_to", "1") == {1017}
    assert "neither a number nor auto" in error_of(capsys, "plan", wide, "--round_to", "much")
    assert "--round_to 0 must be positive" in error_of(capsys, "plan", wide, "--round_to", "0")


def test_plan_reads_no_weights_and_explains_what_is_impossible(base, tmp_path, capsys):
    (tmp_path / "base/model.safetensors").unlink()
    assert main(["plan", base]) == 0
    capsys.readouterr()
    assert "--pruning_ratio 0.9 is impossible here" in error_of(capsys, "plan", base, "--ratio", "0.9")
    assert main(["plan", base, "--ratio", "0.1", "0.9"]) == 0
    assert "pruning_ratio=0.9 is impossible" in capsys.readouterr().out.replace(
        "--pruning_ratio 0.9", "pruning_ratio=0.9"
    )
    assert "--tokens 0 is not positive" in error_of(capsys, "plan", base, "--tokens", "0")
    assert "does not exist" in error_of(capsys, "plan", base + "x")


def test_inspect_prints_words_or_json(pruned, capsys):
    assert main(["inspect", pruned]) == 0
    assert "removed MLP neurons: 36 of 72 (50.0%), kept 36" in capsys.readouterr().out
    assert main(["inspect", pruned, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["mlp_widths"] == [12, 12, 12]


def test_chat_answers_side_by_side(pruned, base, capsys):
    flags = ["--max_new_tokens", "3"]
    assert main(["chat", pruned, "--dense", base, "--prompt", "assert", "--prompt", "while", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" | ")[0].strip() for line in lines] == ["prompt", "pruned", "dense", ""] * 2


def test_chat_reads_prompts_until_the_end(pruned, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("assert\n\n" + "while " * 80 + "\nwhile\nexit\nassert\n"))
    assert main(["chat", pruned, "--max_new_tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("prompt")] == ["prompt | assert", "prompt | while"]
    assert err.startswith("error: The prompt has")
    assert "--device 'moon' cannot be used" in error_of(capsys, "chat", pruned, "--device", "moon")


def test_card_is_written_once(pruned, capsys):
    assert main(["card", pruned, "--print", "--license", "mit"]) == 0
    assert "license: mit" in capsys.readouterr().out
    assert main(["card", pruned]) == 0
    assert capsys.readouterr().out.endswith("out/model/README.md\n")
    assert "already" in error_of(capsys, "card", pruned)
    assert main(["card", pruned, "--overwrite"]) == 0


def test_push_says_what_is_missing_before_anything_is_sent(pruned, capsys):
    assert "hub id (owner/name)" in error_of(capsys, "push", pruned, "a b")
    assert "--base_model ... is missing" in error_of(capsys, "push", pruned, "me/x", "--what", "adapter")
    assert "has no adapter" in error_of(capsys, "push", pruned, "me/x", "--what", "adapter", "--base_model", "me/y")
    assert "HF_HUB_OFFLINE" in error_of(capsys, "push", pruned, "me/x")
    assert torch.is_grad_enabled()
