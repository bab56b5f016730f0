"""Ways to recover: from the dense model, all weights or the MLPs' alone, adapters of several kinds; each resumed."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from hfprune import LoraRecovery, PruneTrainer, PruningModule, ReportCallback, TaylorImportanceCallback, TextDataModule
from hfprune.arch import find_groups
from hfprune.errors import ConfigError
from hfprune.recovery import DistillationRecovery
from tests.models import save_tiny

ADAPTERS = {
    "lora": LoraRecovery(rank=2, dropout=0.1),
    "rslora": LoraRecovery(rank=2, rslora=True),
    "dora": LoraRecovery(rank=2, dora=True),
}
TEACHER = DistillationRecovery(alpha=0.5, temperature=2.0)


class Stop(Exception):
    """An interruption."""


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Stop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def fit(folder, *callbacks, lora=None, out=None, ckpt_path=None, **options):
    module = PruningModule(folder, learning_rate=5e-3, **options)
    importance = TaylorImportanceCallback(pruning_ratio=0.3, recovery=lora)
    report = [ReportCallback(str(out), latency=False, overwrite=True)] if out else []
    trainer = PruneTrainer(
        callbacks=[*report, importance, *callbacks], accelerator="cpu", devices=1, logger=False, max_epochs=2,
        enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    torch.manual_seed(0)
    data = TextDataModule(
        seq_len=16, calibration_sequences=4, batch_size=4, recovery_sequences=12, validation_sequences=4,
        eval_windows=3, eval_window=16,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
@pytest.mark.parametrize(
    ("lora", "options"),
    [
        (None, {"distillation": TEACHER}),
        ("dora", {"distillation": TEACHER}),
        ("rslora", {}),
        (None, {"trainable": "mlp"}),
    ],
    ids=["full from the dense model", "dora from the dense model", "rslora", "mlp"],
)
def test_interrupted_and_resumed_it_ends_the_same(folder, tmp_path, lora, options):
    lora = ADAPTERS[lora] if lora else None
    straight = fit(folder, lora=lora, **options)
    saving = {"dirpath": tmp_path / "ckpt", "save_last": True, "every_n_train_steps": 1}
    with pytest.raises(Stop):
        fit(folder, ModelCheckpoint(**saving), StopAt(4), lora=lora, **options)
    last = str(tmp_path / "ckpt/last.ckpt")
    assert not any("teacher" in name for name in torch.load(last, weights_only=True)["state_dict"])
    resumed = fit(folder, ModelCheckpoint(**saving), lora=lora, ckpt_path=last, **options)
    assert resumed.trainer.global_step == 6
    theirs = dict(straight.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in resumed.named_parameters())


def test_the_dense_model_leads(folder, tmp_path):
    """Recovery towards it ends nearer to it than recovery on the text, and the report says what was done."""
    ends = {}
    for name, distillation in {"text": None, "dense": DistillationRecovery()}.items():
        fit(folder, out=tmp_path / name, distillation=distillation)
        report = json.loads((tmp_path / name / "report.json").read_text())
        ends[name] = report["stages"]["recovered"]["fidelity"]["kl"]
        assert report["distillation"] == (None if distillation is None else {"alpha": 1.0, "temperature": 1.0})
        assert report["stages"]["recovered"]["supervised_tokens"] == 2 * 12 * 15
    assert ends["dense"] < 0.9 * ends["text"]


def test_only_mlps_are_trained(folder):
    module, start = fit(folder, trainable="mlp"), PruningModule(folder)
    start.configure_model()
    start.apply_plan(module.plan)
    parts = {part.module for group in find_groups(start.causal_lm) for part in group.slices}
    before = dict(start.causal_lm.named_parameters())
    for name, parameter in module.causal_lm.named_parameters():
        assert torch.equal(parameter, before[name]) != (name.rpartition(".")[0] in parts)


def test_half_precision_weights_are_not_trained(folder):
    """Adapters are float32 whatever is under them."""
    with pytest.raises(ConfigError, match="--trainer.precision bf16-mixed"):
        fit(folder, dtype="bfloat16")
    module = fit(folder, dtype="bfloat16", lora=ADAPTERS["lora"])
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}


def test_bad_settings(folder):
    with pytest.raises(ConfigError, match="alpha in"):
        DistillationRecovery(alpha=2.0)
    with pytest.raises(ConfigError, match="trainable"):
        PruningModule(folder, trainable="heads")
