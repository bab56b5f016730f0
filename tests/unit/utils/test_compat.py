"""Private APIs of other libraries: a failure here names the release that changed one."""

import inspect
from argparse import ArgumentParser as PlainParser

import huggingface_hub
import pytest
import transformers
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.hub import cached_file

from hfprune.recovery import LoraRecovery
from hfprune.utils.compat import (
    attention_implementation,
    cached_file_or_none,
    instantiate,
    is_repo_id,
    parser_actions,
    safetensors_metadata,
)

VERSION = f"transformers {transformers.__version__}, huggingface_hub {huggingface_hub.__version__}"


def test_a_missing_file_is_none_and_a_present_one_its_path(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert cached_file_or_none(str(tmp_path), "config.json") == tmp_path / "config.json", VERSION
    assert cached_file_or_none(str(tmp_path), "generation_config.json") is None, VERSION


def test_the_public_call_raises_for_a_missing_file(tmp_path):
    with pytest.raises(OSError, match="generation_config"):
        cached_file(str(tmp_path), "generation_config.json")  # if this returns None, the private argument can go
    assert "kwargs" in inspect.signature(cached_file).parameters, VERSION


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_of_a_model_is_read_from_its_config(name):
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
    assert attention_implementation(model.config) == name, VERSION


def test_a_config_without_an_attention_runs_the_eager_one():
    assert attention_implementation(object()) == "eager"


@pytest.mark.parametrize(
    ("text", "expected"), [("gpt2", True), ("owner/name", True), ("a/b/c", False), ("a b", False), ("x--y", False)]
)
def test_hub_ids_are_told_from_paths_by_their_form(text, expected):
    assert is_repo_id(text) is expected, VERSION


@pytest.mark.parametrize("kind", [PlainParser, ArgumentParser, LightningArgumentParser])
def test_argparse_lists_its_options(kind):
    parser = kind()
    parser.add_argument("--given", type=int)
    assert [action.dest for action in parser_actions(parser)][-1] == "given"


def test_jsonargparse_instantiates_the_classes_of_a_configuration():
    parser = ArgumentParser()
    parser.add_class_arguments(LoraRecovery, "recovery")
    assert instantiate(parser, parser.parse_args(["--recovery.rank=3"])).recovery == LoraRecovery(rank=3)


def test_metadata_of_saved_weights_can_be_added(tmp_path):
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    with safetensors_metadata({"made": "here"}):
        model.save_pretrained(tmp_path / "with")
    model.save_pretrained(tmp_path / "without")
    found = [safe_open(tmp_path / name / "model.safetensors", "pt").metadata() for name in ("with", "without")]
    assert found == [{"format": "pt", "made": "here"}, {"format": "pt"}], VERSION
