"""``hfprune export --to gguf``: one file, the lines of the command, and what it refuses."""

import os
from pathlib import Path

import pytest
import torch

import hfprune
from hfprune.cli import main
from hfprune.io.gguf import is_own_gguf
from hfprune.io.save import export_model
from tests.helpers.models import save_tiny, styled_tokenizer, tiny, tiny_tokenizer
from tests.helpers.plans import mlp_plan

gguf = pytest.importorskip("gguf")


@pytest.fixture
def pruned(empty_folder):
    """A pruned folder of uneven layers, with a byte-level tokenizer."""
    model, tokenizer = tiny("llama", dtype=torch.float32, vocab=600), styled_tokenizer("llama3")
    plan = mlp_plan(model)
    hfprune.apply_plan(model, plan)
    export_model(model, tokenizer, plan, "pruned", layout="per_layer")
    return plan


def test_the_command_writes_one_file(pruned, capsys):
    command = ["export", "pruned", "--to", "gguf", "--gguf_type", "q8_0", "-o", "out/model.gguf"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "out/model.gguf (0 MiB, q8_0, architecture deci)" in lines[0]
    assert lines[1].startswith("22 matrices have rows that are no multiple of 32")
    assert lines[-1] == "Loads in: llama.cpp."
    assert os.listdir("out") == ["model.gguf"]
    fields = gguf.GGUFReader("out/model.gguf").fields
    assert fields["hfprune.plan"].contents() == pruned.digest()
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_a_dense_model_can_be_written_to_compare_with(empty_folder):
    save_tiny("dense", tokenizer=styled_tokenizer("llama3"))
    assert main(["export", "dense", "--to=gguf", "-o", "dense.gguf"]) == 0
    assert is_own_gguf(Path("dense.gguf"))


BAD = {
    "--to gguf --layout padded -o m.gguf": "--to 'gguf' and --layout 'padded' are two formats",
    "--to ggfu -o m.gguf": "Known: bitmask, nemotron_nas, padded, per_layer, uniform, gguf",
    "--gguf_type q8_0 -o out": "--gguf_type 'q8_0' is the type of a GGUF file",
    "--to gguf -o pruned/m.gguf": "overlap",
    "--to gguf -o .": "is a folder",
    "--to gguf --gguf_type q5 -o m.gguf": "is not known",
}


@pytest.mark.parametrize("flags", BAD)
def test_a_command_that_cannot_be_used_is_one_line(flags, pruned, capsys):
    before = sorted(os.listdir("."))
    assert main(["export", "pruned", *flags.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert BAD[flags] in line
    assert sorted(os.listdir(".")) == before


def test_to_names_layouts_too(pruned, capsys):
    assert main(["export", "pruned", "--to", "padded", "-o", "padded"]) == 0
    assert "layout padded" in capsys.readouterr().out


def test_damaged_weights_and_tokenizers_are_one_line_and_write_nothing(pruned, capsys):
    Path("pruned/model.safetensors").write_bytes(Path("pruned/model.safetensors").read_bytes()[:2000])
    assert main(["export", "pruned", "--to", "gguf", "-o", "m.gguf"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    save_tiny("plain", tokenizer=tiny_tokenizer())
    assert main(["export", "plain", "--to", "gguf", "-o", "m.gguf"]) == 2
    assert "cuts words by Whitespace" in capsys.readouterr().err
    assert not Path("m.gguf").exists()
