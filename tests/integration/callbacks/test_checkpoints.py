"""Checkpoints of a PruningModule: atomic, plain data, usable everywhere, and refused by another model."""

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from hfprune import LoraRecovery, PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule
from hfprune.callbacks.checkpointing import AtomicCheckpointIO
from hfprune.io.checkpoint_record import Record, read_metadata
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny, token_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "enable_checkpointing": False}


def data():
    return TextDataModule(
        seq_len=16, calibration_sequences=6, batch_size=4, recovery_sequences=8, validation_sequences=4,
        eval_windows=3, eval_window=16,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def fitted(folder, tmp_path_factory):
    """(module, checkpoint path) of a run with adapters."""
    out = tmp_path_factory.mktemp("run")
    callbacks = [
        TaylorImportanceCallback(pruning_ratio=0.2, recovery=LoraRecovery(rank=2)),
        ModelCheckpoint(dirpath=out, save_last=True),
    ]
    module = PruningModule(folder, learning_rate=1e-2)
    PruneTrainer(**QUIET | {"enable_checkpointing": True}, max_epochs=1, callbacks=callbacks).fit(
        module, datamodule=data()
    )
    return module, str(out / "last.ckpt")


def test_it_is_plain_data(fitted):
    checkpoint = torch.load(fitted[1], weights_only=True)
    record = Record.of(checkpoint)
    assert record.phase == "training"
    assert record.plan == fitted[0].plan
    assert record.lora["rank"] == 2
    assert record.calibration is None
    assert len(record.fingerprint) == 16


def test_load_from_checkpoint(fitted):
    module, path = fitted
    loaded = PruningModule.load_from_checkpoint(path)
    assert loaded.plan == module.plan
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(loaded.eval().causal_lm(ids).logits, module.eval().causal_lm(ids).logits)


@pytest.mark.parametrize("with_callback", [False, True])
def test_validate_test_predict(folder, fitted, with_callback):
    """From a checkpoint whose shapes are not the model's, with and without the callback in the trainer."""
    module, path = fitted

    def trainer():
        return Trainer(**QUIET, callbacks=[TaylorImportanceCallback(pruning_ratio=0.2)] if with_callback else [])

    def losses(model, ckpt_path=None):
        (validated,) = trainer().validate(model, datamodule=data(), ckpt_path=ckpt_path, verbose=False)
        (tested,) = trainer().test(model, datamodule=data(), ckpt_path=ckpt_path, verbose=False)
        return validated | tested

    expected = losses(module)
    found = losses(PruningModule(folder), path)
    assert found == expected
    assert set(found) == {"val_loss", "test_loss"}
    logits = trainer().predict(PruningModule(folder), datamodule=data(), ckpt_path=path)
    assert logits[0].shape == (3, 16, 61)
    assert losses(PruningModule(folder)) != expected


def test_checkpoint_of_another_model_is_refused(fitted, tmp_path):
    other = save_tiny(tmp_path / "other", seed=5)
    fingerprint = Record.of(torch.load(fitted[1], weights_only=True)).fingerprint
    match = rf"belongs to another model: .*fingerprint {fingerprint}\), this run has '.*other' \(fingerprint \w{{16}}\)"
    for run in (
        lambda m: Trainer(**QUIET).validate(m, datamodule=data(), ckpt_path=fitted[1]),
        lambda m: PruneTrainer(**QUIET, max_epochs=1, callbacks=[TaylorImportanceCallback(pruning_ratio=0.2)]).fit(
            m, datamodule=data(), ckpt_path=fitted[1]
        ),
    ):
        with pytest.raises(ConfigError, match=match):
            run(PruningModule(other))


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_calibration_of_other_settings_is_refused(folder, tmp_path, monkeypatch):
    from hfprune.pruning.accumulator import ImportanceAccumulator

    class Stop(Exception):
        pass

    def fit(ckpt_path=None, calibration_sequences=6, **kwargs):
        importance = TaylorImportanceCallback(pruning_ratio=0.2, checkpoint_every=1, **kwargs)
        saving = ModelCheckpoint(dirpath=tmp_path, save_last=True)
        datamodule = data()
        datamodule.calibration_sequences = calibration_sequences
        trainer = PruneTrainer(**QUIET | {"enable_checkpointing": True}, max_epochs=1, callbacks=[importance, saving])
        trainer.fit(PruningModule(folder), datamodule=datamodule, ckpt_path=ckpt_path)

    original, seen = ImportanceAccumulator.step, []

    def step(self, *args, **kwargs):
        if len(seen) == 3:
            raise Stop
        seen.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ImportanceAccumulator, "step", step)
    with pytest.raises(Stop):
        fit()
    monkeypatch.undo()
    path = str(tmp_path / "last-pruning.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["state_dict"] == {}  # the dense weights are where they were
    assert saved["hfprune"]["calibration"]["position"] == 3
    for kwargs, what in (
        ({"objective": "cross_entropy"}, "objective entropy -> cross_entropy"),
        ({"exact": False}, "exact True -> False"),
        ({"calibration_sequences": 5}, "calibration data [0-9a-f]{64} -> "),
    ):
        with pytest.raises(ConfigError, match=f"calibrated with other settings: {what}"):
            fit(path, **kwargs)
    assert read_metadata(path)["hfprune"]["phase"] == "calibrating"
    del saved["hfprune"]["calibration"]["tokens"]  # as earlier versions wrote it
    earlier = str(tmp_path / "earlier.ckpt")
    torch.save(saved, earlier)
    fit(path)
    fit(earlier)


def test_write_is_atomic(tmp_path, monkeypatch):
    target = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, target)

    def half(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="No space"):
            AtomicCheckpointIO().save_checkpoint({"a": 2}, target)
    assert torch.load(target) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_strategy_is_given_back_as_it_was(folder):
    importance = TaylorImportanceCallback(pruning_ratio=0.2)
    trainer = PruneTrainer(**QUIET, max_epochs=1, callbacks=[importance])
    trainer.prune(PruningModule(folder), datamodule=data())
    assert not {"save_checkpoint", "load_checkpoint"} & set(trainer.strategy.__dict__)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_other_strategies_are_refused_by_name_before_anything_is_loaded(folder, kind):
    module, importance = PruningModule(folder), TaylorImportanceCallback(pruning_ratio=0.2)
    trainer = PruneTrainer(**QUIET, max_epochs=1, callbacks=[importance])
    trainer.strategy.__class__ = kind  # these strategies can only be made where there are GPUs, or DeepSpeed
    trainer.datamodule = data()
    with pytest.raises(ConfigError, match=rf"{kind.__name__} is not supported.*ModelParallelStrategy\("):
        importance.setup(trainer, module, "fit")
    assert module.model is None
