"""Settings of a trainer around pruning: refused before anything is loaded, or left as they were; compiled modules."""

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from torch.utils.data import DataLoader

from hfprune import LoraRecovery, PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule
from hfprune.callbacks import LoraPruningCallback, SparsePruningCallback
from hfprune.cli import main
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny, tiny, token_ids

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "enable_checkpointing": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def data():
    return TextDataModule(
        seq_len=16, calibration_sequences=4, batch_size=4, recovery_sequences=8, validation_sequences=2, eval_windows=0
    )


def callbacks():
    return [
        TaylorImportanceCallback(pruning_ratio=0.2),
        SparsePruningCallback(method="magnitude", sparsity=0.5),
        LoraPruningCallback(pruning_ratio=0.2),
    ]


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_finders_are_refused(folder, finder, index):
    module = PruningModule(folder)
    trainer = PruneTrainer(**QUIET, max_epochs=1, callbacks=[finder(), callbacks()[index]])
    with pytest.raises(ConfigError, match=f"{finder.__name__} runs before pruning, on the dense model"):
        trainer.fit(module, datamodule=data())
    assert module.model is None


def test_endless_schedule_is_refused(folder):
    trainer = PruneTrainer(**QUIET, max_epochs=-1, max_time="00:00:00:10", callbacks=[callbacks()[0]])
    with pytest.raises(ConfigError, match="max_epochs or max_steps is required"):
        trainer.fit(PruningModule(folder), datamodule=data())


@pytest.mark.parametrize("index", [0, 1, 2])
def test_rates_need_a_logger(folder, index):
    module = PruningModule(folder)
    trainer = PruneTrainer(**QUIET, max_epochs=1, callbacks=[LearningRateMonitor(), callbacks()[index]])
    with pytest.raises(ConfigError, match="LearningRateMonitor needs a logger"):
        trainer.fit(module, datamodule=data())
    assert module.model is None


def monitored(folder, callback, *others, **kwargs):
    kwargs = QUIET | {"enable_checkpointing": True, "max_epochs": 1} | kwargs
    module = PruningModule(folder)
    PruneTrainer(**kwargs, callbacks=[callback, *others, callbacks()[0]]).fit(module, datamodule=data())
    return module


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("loss", {}, r"monitor='loss'\) needs a metric that is not logged. Logged are: train_loss, val_loss"),
        ("val_kl", {}, "is not logged"),
        ("val_loss", {"limit_val_batches": 0}, "needs a validation metric, and limit_val_batches=0 disables"),
        ("lr-AdamW", {}, "is not logged"),
    ],
)
def test_figures_that_nothing_logs_are_refused(folder, tmp_path, kind, name, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        monitored(folder, kind(monitor=name), default_root_dir=tmp_path, **kwargs)


class Logs(Callback):
    """Logs a figure of its own."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("mine", 1.0, batch_size=1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(("name", "others"), [("val_loss", []), ("train_loss", []), ("mine", [Logs()])])
def test_figures_that_are_logged_are_monitored(folder, tmp_path, name, others):
    saving = ModelCheckpoint(dirpath=tmp_path, monitor=name)
    assert monitored(folder, saving, *others).plan is not None
    assert saving.best_model_score is not None


def test_other_machines_that_nothing_names_are_refused(folder, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    trainer = PruneTrainer(**QUIET | {"num_nodes": 2, "strategy": "ddp"}, max_epochs=1, callbacks=[callbacks()[0]])
    with pytest.raises(ConfigError, match="num_nodes=2 requires the environment variable MASTER_ADDR"):
        trainer.fit(PruningModule(folder), datamodule=data())


def test_prune_leaves_trainer_and_callback_as_they_were(folder):
    recovery = LoraRecovery(rank=2)
    importance = TaylorImportanceCallback(pruning_ratio=0.2, recovery=recovery or "full")
    trainer = PruneTrainer(**QUIET, max_epochs=1, callbacks=[importance])
    before = trainer.limit_train_batches, trainer.limit_val_batches, trainer.num_sanity_val_steps
    module = PruningModule(folder)
    trainer.prune(module, data())
    assert module.plan is not None
    assert module.lora is None
    assert importance.recovery is recovery
    assert (trainer.limit_train_batches, trainer.limit_val_batches, trainer.num_sanity_val_steps) == before


def test_fit_takes_the_checkpoint_by_position(folder, tmp_path):
    importance = TaylorImportanceCallback(pruning_ratio=0.2)
    trainer = PruneTrainer(**QUIET, max_epochs=1, callbacks=[importance])
    with pytest.raises((ConfigError, FileNotFoundError)):
        trainer.fit(PruningModule(folder), None, None, data(), str(tmp_path / "none.ckpt"))
    assert importance.resume_from == str(tmp_path / "none.ckpt")


class Own(LightningModule):
    """A module of somebody else, its model compiled in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.net = tiny("llama").train()
        if how == "call":
            self.net = torch.compile(self.net, backend="eager")
        elif how == "method":
            self.net.compile(backend="eager")
        elif how == "layers":
            for layer in self.net.model.layers:
                layer.compile(backend="eager")

    def training_step(self, batch, batch_idx):
        return self.net(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return DataLoader([{"input_ids": row} for row in token_ids()], batch_size=2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo reads it in training
@pytest.mark.parametrize("objective", [None, "entropy"])
def test_compiled_models_get_the_same_scores(objective):
    def scores(how):
        torch._dynamo.reset()
        importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=1, objective=objective)
        Trainer(**QUIET, max_steps=1, callbacks=[importance]).fit(Own(how))
        return importance.importance

    expected = scores("plain")
    for how in ("call", "method", "layers"):
        for found, one in zip(scores(how).values(), expected.values(), strict=True):
            assert torch.equal(found, one), how


FLAGS = ["--data.seq_len=16", "--data.calibration_sequences=4", "--data.eval_windows=0", "--latency=false"]
FLAGS += ["--trainer.accelerator=cpu", "--pruning_ratio=0.2"]
SLURM = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NODELIST": "localhost"}


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--trainer.callbacks+=BackboneFinetuning"], {}, "BackboneFinetuning cannot be used here"),
        (["--trainer.accelerator=tpu"], {}, "The trainer cannot be built: "),
        (["--trainer.devices=2"], SLURM, "The trainer cannot be built: You set `--ntasks=2`"),
        (["--trainer.logger=CometLogger"], {}, "comet"),
        (["--trainer.callbacks+=Timer"], {}, "give it in Python. For a limit of time there is --trainer.max_time."),
        (["--trainer.callbacks+=ThroughputMonitor"], {}, "arguments are required: batch_size_fn\n"),
    ],
)
def test_what_cannot_be_built_or_used_is_one_line(folder, tmp_path, monkeypatch, capsys, flags, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    assert main(["fit", f"--model.path={folder}", f"--output_dir={out}", *FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not out.exists()
