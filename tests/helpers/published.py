"""Published model shapes on the meta device, and what a parsed command means for them, without weights or data."""

import functools
import shlex

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config

from hfprune import LoraPruningCallback, ReportCallback, SparsePruningCallback, TaylorImportanceCallback
from hfprune.modules import PruningModule

PRUNING = (TaylorImportanceCallback, LoraPruningCallback, SparsePruningCallback)

CONFIGS = {
    "llama-2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072,
    ),
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, max_position_embeddings=131072,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
    ),
}  # fmt: skip

MIXTURES = {"mixtral-4-layers": MixtralConfig(num_hidden_layers=4, max_position_embeddings=8192)}


@functools.cache
def shapes(name):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config((CONFIGS | MIXTURES)[name], dtype=torch.bfloat16)


def unchecked(monkeypatch):
    """Lets a command be parsed whose model, data and output folder are names only."""
    monkeypatch.setattr("hfprune.modules.causal_lm.check_model_path", lambda path, **loading: None)
    monkeypatch.setattr("hfprune.data.roles.check_source", lambda source, flag: None)
    monkeypatch.setattr("hfprune.callbacks.report.check_output_dir", lambda *a, **k: None)


def resolved(cli, name, *, layout=True):
    """Runs what ``fit`` and ``prune`` check before any weight is loaded; returns the pruning callback.

    ``layout=False`` leaves out the check of every weight's shape against the layout, which takes seconds for 32 layers;
    that a stock config states the numbers of units is checked all the same.
    """
    module = PruningModule(name, objective=cli.model.objective.name, allow_pruned=True)
    module.model = shapes(name)
    module.distillation, module.trainable = cli.model.distillation, cli.model.trainable
    trainer = cli.trainer
    trainer.strategy.connect(module)
    trainer.datamodule = cli.datamodule
    pruning = next(c for c in trainer.callbacks if isinstance(c, PRUNING))
    report = next(c for c in trainer.callbacks if isinstance(c, ReportCallback))
    if not layout:
        pruning.expected_model = lambda module: None
    for callback in (report, pruning):
        callback.setup(trainer, module, "fit")
    return pruning


def command_of(path):
    """Returns the words of the command in a config's header."""
    header = next(line for line in path.read_text().splitlines() if line.startswith("#") and "hfprune " in line)
    words = shlex.split(header.removeprefix("#"))
    return words[words.index("hfprune") + 1 :]
