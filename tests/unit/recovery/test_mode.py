"""What recovery trains: the words, in Python and on the command line."""

from types import SimpleNamespace

import pytest
import torch

from hfprune import (
    LoraRecovery,
    PruneTrainer,
    PruningModule,
    SparsePruningCallback,
    TaylorImportanceCallback,
    TextDataModule,
)
from hfprune.cli import main
from hfprune.criteria import Magnitude
from hfprune.recovery import RecoveryMode
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def fit(folder, recovery, *, prune=False, sparse=False):
    callback = (
        SparsePruningCallback(method="magnitude", sparsity=0.5, recovery=recovery)
        if sparse
        else TaylorImportanceCallback(pruning_ratio=0.3, criterion=Magnitude(), recovery=recovery)
    )
    module = PruningModule(folder, learning_rate=5e-3)
    trainer = PruneTrainer(
        callbacks=[callback], accelerator="cpu", devices=1, logger=False, max_epochs=1, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, limit_train_batches=3,
    )  # fmt: skip
    torch.manual_seed(0)
    data = TextDataModule(
        seq_len=16, calibration_sequences=4, batch_size=4, recovery_sequences=16, validation_sequences=4, eval_windows=0
    )
    (trainer.prune if prune else trainer.fit)(module, datamodule=data)
    return module, trainer


def changed(one, two):
    """Names of the weights in which two models differ."""
    first, second = one.causal_lm.state_dict(), two.causal_lm.state_dict()
    assert first.keys() == second.keys()
    return {name for name, tensor in first.items() if not torch.equal(tensor, second[name])}


@pytest.mark.parametrize("sparse", [False, True])
def test_each_word_trains_what_it_says(folder, sparse):
    pruned, _ = fit(folder, "none", prune=True, sparse=sparse)
    none, trainer = fit(folder, "none", sparse=sparse)
    assert changed(pruned, none) == set()
    assert trainer.global_step == 0
    assert trainer.limit_train_batches == 3  # the trainer's own again
    full, trainer = fit(folder, "full", sparse=sparse)
    assert trainer.global_step == 3
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= changed(pruned, full)
    mlp, _ = fit(folder, "mlp", sparse=sparse)
    assert changed(pruned, mlp)
    assert all(".mlp." in name for name in changed(pruned, mlp))
    lora, _ = fit(folder, "lora", sparse=sparse)
    assert lora.lora == LoraRecovery()


def test_none_as_a_value_means_full_and_says_so():
    with pytest.warns(FutureWarning, match="use recovery='full'"):
        callback = TaylorImportanceCallback(pruning_ratio=0.3, recovery=None)
    assert (callback.recovery_mode.word, callback.recovery) == ("full", None)


def test_what_is_no_word_is_refused():
    with pytest.raises(ConfigError, match="recovery='adapters' is not one of lora, full, mlp, none"):
        RecoveryMode("adapters")


def test_mlp_needs_a_module_that_selects_weights():
    with pytest.raises(ConfigError, match="recovery='mlp' requires a PruningModule, not SimpleNamespace"):
        RecoveryMode("mlp").start(None, SimpleNamespace())


@pytest.mark.parametrize(
    ("flags", "word", "rank"),
    [
        ([], "lora", 32),
        (["--importance.recovery=full"], "full", None),
        (["--importance.recovery=mlp"], "mlp", None),
        (["--importance.recovery=none"], "none", None),
        (["--importance.recovery=lora"], "lora", 32),
        (["--importance.recovery.rank=2"], "lora", 2),
        (["--importance.recovery=full", "--importance.recovery.rank=2"], "lora", 2),
    ],
)
def test_the_command_line_takes_the_words(folder, tmp_path, monkeypatch, flags, word, rank):
    seen = []

    def fit(trainer, *args, **kwargs):
        seen.extend(c.recovery_mode for c in trainer.callbacks if isinstance(c, TaylorImportanceCallback))
        raise ConfigError("enough was seen")

    monkeypatch.setattr(PruneTrainer, "fit", fit)
    common = ["fit", f"--model.path={folder}", "--pruning_ratio=0.2", f"--output_dir={tmp_path / 'out'}"]
    assert main([*common, "--trainer.max_epochs=1", "--trainer.accelerator=cpu", *flags]) == 2
    (mode,) = seen
    assert (mode.word, None if mode.lora is None else mode.lora.rank) == (word, rank)
