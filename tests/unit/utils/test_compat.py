"""Private APIs of other libraries: a failure here names the release that changed one."""

import inspect
from argparse import ArgumentParser as PlainParser

import huggingface_hub
import lightning
import pytest
import torch
import transformers
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.hub import cached_file

from hfprune.recovery import LoraRecovery
from hfprune.utils.compat import (
    attention_implementation,
    cached_file_or_none,
    has_trainer,
    instantiate,
    is_repo_id,
    parser_actions,
    resolved_checkpoint,
    safetensors_metadata,
    saved_hyperparameters,
    saves_shards,
    training_source,
    type_hint,
    uncompiled,
    within_step,
)

LIGHTNING = f"lightning {lightning.__version__}"
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


def trainer(**options):
    """Returns a trainer of two batches that writes nothing."""
    return lightning.Trainer(
        max_epochs=1, limit_train_batches=3, limit_val_batches=0, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_trainer_shows_its_data_and_whether_a_step_is_complete():
    seen = []

    class Look(Callback):
        def setup(self, trainer, pl_module, stage):
            source = training_source(trainer)
            assert source.is_defined(), LIGHTNING
            assert len(source.dataloader()) == 64, LIGHTNING

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(within_step(trainer))

    module = BoringModel()
    assert not has_trainer(module), LIGHTNING
    trainer(callbacks=[Look()], accumulate_grad_batches=2).fit(module)
    assert has_trainer(module), LIGHTNING
    assert seen == [True, False, False], LIGHTNING  # the last batch of an epoch ends a step


def test_a_checkpoint_is_found_by_its_path(tmp_path):
    path = str(tmp_path / "some.ckpt")
    assert resolved_checkpoint(trainer(), path, TrainerFn.FITTING) == path, LIGHTNING


@pytest.mark.parametrize("sharded", [True, False])
def test_a_strategy_says_whether_it_saves_shards(sharded):
    assert saves_shards(ModelParallelStrategy(save_distributed_checkpoint=sharded)) is sharded, LIGHTNING


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_a_compiled_module_is_unwrapped():
    module = torch.nn.Linear(2, 2)
    assert uncompiled(torch.compile(module)) is module, torch.__version__
    assert uncompiled(module) is module


def test_an_option_has_its_type():
    parser = ArgumentParser()
    parser.add_argument("--given", type=LoraRecovery | None)
    assert type_hint(parser_actions(parser)[-1]) == LoraRecovery | None


def test_saved_hyperparameters_are_those_that_are_given():
    class Module(BoringModel):
        def __init__(self, size, secret):
            super().__init__()
            with saved_hyperparameters({"width": size, "secret": secret}, without=("secret",)):
                self.save_hyperparameters()

    assert dict(Module(3, "x").hparams) == {"width": 3}
    with _given_hyperparameters_context({"size": 1, "secret": "y"}, "some.function"):  # of a command line
        assert dict(Module(1, "y").hparams) == {"size": 1, "_instantiator": "some.function"}
