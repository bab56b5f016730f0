"""Resuming on the command line: settings compared, epochs continued, logs kept, and the next command named."""

import csv
import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch

from hfprune.callbacks.checkpointing import checkpoints_in
from hfprune.cli import main
from hfprune.modules import PruningModule
from hfprune.pruning.accumulator import ImportanceAccumulator

pytestmark = pytest.mark.usefixtures("empty_folder", "undrawn")

SMALL = ["--data.seq_len=16", "--data.calibration_sequences=4", "--data.eval_windows=0", "--latency=false"]
SMALL += [
    "--importance.criterion=ActivationTaylor",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.recovery_sequences=16",
]
SMALL += ["--data.validation_sequences=2", "--data.batch_size=4", "--importance.recovery.rank=2", "--pruning_ratio=0.2"]
TWO_EPOCHS = ["--trainer.max_epochs=2", "--checkpoint_steps=1"]
"""Eight steps of the optimizer."""


class Killed(BaseException):
    """What a test raises in place of SIGKILL: nothing handles it."""


@pytest.fixture
def logged(caplog):
    logger = logging.getLogger("hfprune")  # whether it propagates depends on who imported hfprune first
    caplog.set_level("INFO", logger="hfprune")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def fit(dense):
    def run(*flags, out="out"):
        return main(["fit", f"--model.path={dense}", f"--output_dir={out}", *SMALL, *flags])

    return run


def report(out="out"):
    return json.loads(Path(out, "report.json").read_text())


def steps(out="out"):
    return report(out)["stages"]["recovered"]["optimizer_steps"]


def rates(out="out"):
    """The newest checkpoint's (learning rate, peak)."""
    group = torch.load(checkpoints_in(Path(out, "checkpoints"))[-1])["optimizer_states"][0]["param_groups"][0]
    return group["lr"], group["initial_lr"]


def weights(out="out"):
    return Path(out, "model/model.safetensors").read_bytes()


def at_step(monkeypatch, number, action):
    """Does ``action`` when the first batch of a step of recovery begins."""
    original = PruningModule.training_step

    def step(self, *args):
        if self.trainer.global_step == number:
            action(self.trainer)
        return original(self, *args)

    monkeypatch.setattr(PruningModule, "training_step", step)


def kill(trainer=None):
    raise Killed


def killed(monkeypatch, fit, number, *flags):
    with monkeypatch.context() as patch:
        at_step(patch, number, kill)
        with pytest.raises(Killed):
            fit(*flags)


def test_same_command_after_a_kill_says_how_to_continue(fit, monkeypatch, capsys, logged):
    killed(monkeypatch, fit, 5, *TWO_EPOCHS)
    assert fit(*TWO_EPOCHS) == 2
    error = capsys.readouterr().err
    assert "holds a run that did not finish" in error
    assert "step-5.ckpt (step 5, epoch 1)" in error
    assert "--ckpt_path last" in error
    assert fit(*TWO_EPOCHS, "--ckpt_path=last") == 0
    told = logged.text
    assert "Resuming from out/checkpoints/step-5.ckpt (step 5, epoch 1)" in told
    assert steps() == 8
    assert sorted(p.name for p in checkpoints_in(Path("out/checkpoints"))) == ["epoch=1-step=8.ckpt", "step-8.ckpt"]
    assert report()["resumed"] == [{"checkpoint": "step-5.ckpt", "step": 5, "epoch": 1, "changes": {}}]


def test_resumed_run_is_the_uninterrupted_one(fit, monkeypatch):
    assert fit(*TWO_EPOCHS, out="whole") == 0
    killed(monkeypatch, fit, 5, *TWO_EPOCHS)
    assert fit(*TWO_EPOCHS, "--ckpt_path=last") == 0
    assert weights() == weights("whole")


def test_learning_rate_and_weight_decay_are_applied(fit, monkeypatch, logged):
    killed(monkeypatch, fit, 5, *TWO_EPOCHS)
    flags = [*TWO_EPOCHS, "--ckpt_path=last", "--model.learning_rate=1e-3", "--model.weight_decay=0.1"]
    with monkeypatch.context() as patch:
        seen = []
        at_step(patch, 6, lambda trainer: seen.append(dict(trainer.optimizers[0].param_groups[0])))
        assert fit(*flags) == 0
    assert seen[0]["lr"] == pytest.approx(1e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 6 / 8)).item()))
    assert seen[0]["weight_decay"] == 0.1
    changes = {"learning_rate": [4e-4, 1e-3], "weight_decay": [0.0, 0.1]}
    assert report()["resumed"][0]["changes"] == changes
    assert "learning_rate 0.0004 -> 0.001" in logged.text


def test_more_epochs_train_on_a_longer_schedule(fit):
    assert fit(*TWO_EPOCHS) == 0
    before = weights()
    assert fit("--trainer.max_epochs=4", "--checkpoint_steps=1", "--ckpt_path=last") == 0
    assert steps() == 16
    assert weights() != before
    assert report()["resumed"][0]["changes"]["schedule_steps"] == [8, 16]
    assert rates()[0] == 0


def test_other_batch_size_keeps_the_share_of_the_schedule(fit, monkeypatch):
    killed(monkeypatch, fit, 4, *TWO_EPOCHS)
    with monkeypatch.context() as patch:
        seen = []
        at_step(patch, 6, lambda trainer: seen.append(trainer.optimizers[0].param_groups[0]["lr"]))
        assert fit(*TWO_EPOCHS, "--ckpt_path=last", "--data.batch_size=2") == 0
    assert steps() == 4 + 8
    expected = 4e-4 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (8 + 2) / 16)).item())
    assert seen == pytest.approx([expected])  # two of sixteen steps after the first half


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--data.recovery_sequences=12", "recovery data"),
        ("--data.calibration_sequences=5", "calibration data"),
        ("--importance.criterion=Magnitude", "criterion"),
        ("--importance.objective=cross_entropy", "objective entropy -> cross_entropy"),
        ("--importance.compensation=LeastSquares", "compensation none -> LeastSquares("),
        ("--importance.exact=false", "exact True -> False"),
        ("--pruning_ratio=0.3", "budget --pruning_ratio 0.2 -> --pruning_ratio 0.3"),
        ("--importance.recovery.rank=3", "rank=3"),
        ("--model.distillation.alpha=0.5", "distillation none -> "),
        ("--seed_everything=7", "seed 42 -> 7"),
        ("--trainer.precision=bf16-mixed", "precision 32-true -> bf16-mixed"),
    ],
)
def test_what_cannot_change_is_refused_by_name(fit, finished, monkeypatch, capsys, flag, told):
    monkeypatch.chdir(finished)
    before = weights(), Path("out/report.json").read_bytes()
    assert fit("--ckpt_path=last", "--overwrite=true", flag) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert (weights(), Path("out/report.json").read_bytes()) == before


@pytest.fixture(scope="module")
def finished(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert main(["fit", f"--model.path={dense}", f"--output_dir={folder / 'out'}", *SMALL]) == 0
    return folder


def test_checkpoint_in_calibration_is_compared(fit, monkeypatch, capsys, logged):
    original, calls = ImportanceAccumulator.step, []

    def step(self, *args, **kwargs):
        calls.append(1)
        return kill() if len(calls) == 3 else original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ImportanceAccumulator, "step", step)
        with pytest.raises(Killed):
            fit("--importance.checkpoint_every=1")
    assert fit("--ckpt_path=last", "--importance.objective=cross_entropy") == 2
    assert "objective entropy -> cross_entropy" in capsys.readouterr().err
    assert fit("--ckpt_path=last", "--model.learning_rate=1e-3") == 0  # nothing was trained: it is this run's own
    assert "(calibration, 2 sequences done)" in logged.text
    assert report()["config"]["model"]["learning_rate"] == 1e-3


def test_overwritten_run_does_not_come_back(fit, monkeypatch):
    assert fit("--model.learning_rate=1e-2") == 0
    first = weights()
    with monkeypatch.context() as patch:
        patch.setattr(ImportanceAccumulator, "step", lambda *args, **kwargs: kill())
        with pytest.raises(Killed):
            fit("--overwrite=true")
    assert weights() == first  # until new ones replace them
    assert checkpoints_in(Path("out/checkpoints")) == []
    assert len(checkpoints_in(Path("out/checkpoints/earlier"))) == 1
    assert fit("--overwrite=true", "--ckpt_path=last") == 0
    assert fit(out="clean") == 0
    assert weights() == weights("clean") != first
    assert not Path("out/checkpoints/earlier").exists()


def test_control_of_an_overwritten_run_does_not_come_back(fit, monkeypatch):
    flags = ["--recover_dense=true", "--model.learning_rate=1e-2"]
    assert fit("--recover_dense=true") == 0
    killed(monkeypatch, fit, 2, *flags, "--overwrite=true", "--checkpoint_steps=1")
    assert fit(*flags, "--overwrite=true", "--checkpoint_steps=1", "--ckpt_path=last") == 0
    again = torch.load(checkpoints_in(Path("out/checkpoints/dense"))[-1], weights_only=True)
    assert again["recovery"]["resumed"] == []
    assert again["recovery"]["settings"]["learning_rate"] == 1e-2
    assert not Path("out/checkpoints/dense/earlier").exists()


def test_control_is_resumed_with_the_run(fit):
    assert fit("--recover_dense=true") == 0
    assert fit("--recover_dense=true", "--trainer.max_epochs=2", "--model.learning_rate=1e-3", "--ckpt_path=last") == 0
    stages = report()["stages"]
    assert stages["dense_tuned"]["optimizer_steps"] == stages["recovered"]["optimizer_steps"] == 8
    again = torch.load(checkpoints_in(Path("out/checkpoints/dense"))[-1], weights_only=True)
    assert again["recovery"]["resumed"][0]["changes"]["learning_rate"] == [4e-4, 1e-3]


def test_own_files_among_checkpoints_stay(fit):
    Path("out/checkpoints").mkdir(parents=True)
    Path("out/checkpoints/mine.ckpt").write_bytes(b"mine")
    assert fit("--overwrite=true") == 0
    assert Path("out/checkpoints/earlier/mine.ckpt").read_bytes() == b"mine"


@pytest.mark.parametrize("steps_per_update", [1, 3])
def test_epoch_that_was_cut_off_is_continued(fit, monkeypatch, steps_per_update):
    """By a callback that stops training, as ``max_time`` does: the same bits as in one go."""
    flags = ["--trainer.max_epochs=2", f"--trainer.accumulate_grad_batches={steps_per_update}", "--data.batch_size=1"]
    assert fit(*flags, out="whole") == 0
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda trainer: setattr(trainer, "should_stop", True))
        assert fit(*flags) == 0
    assert steps() == (3 if steps_per_update == 1 else steps())
    assert steps() < steps("whole")
    assert fit(*flags, "--ckpt_path=last") == 0
    assert steps() == steps("whole")
    if steps_per_update == 1:
        assert weights() == weights("whole")


def test_max_steps_in_mid_epoch(fit, logged):
    assert fit("--trainer.max_epochs=2", "--trainer.max_steps=3") == 0
    told = logged.text
    assert "Recovery ended at step 3, of 8 in max_epochs" in told
    assert told.rstrip().endswith("--ckpt_path last")
    assert fit("--trainer.max_epochs=2", "--ckpt_path=last") == 0
    assert steps() == 8
    assert report()["resumed"][0]["changes"] == {"max_steps": [3, -1], "schedule_steps": [3, 8]}


def test_log_of_earlier_attempts_stays(fit, monkeypatch):
    killed(monkeypatch, fit, 5, "--trainer.max_epochs=2", "--checkpoint_steps=3")
    assert fit("--trainer.max_epochs=2", "--checkpoint_steps=3", "--ckpt_path=last") == 0
    with Path("out/logs/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["train_loss"]] == [str(step) for step in range(8)]
    assert [row["step"] for row in rows if row["val_loss"]] == ["3", "7"]
    assert sum(bool(row.get("dense/params")) for row in rows) <= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_run_names_the_next_command(fit, monkeypatch, capsys, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored after an interruption
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda trainer: os.kill(os.getpid(), number))
        assert fit(*TWO_EPOCHS) == 130
    error = capsys.readouterr().err
    assert "interrupted. Continue from out/checkpoints/step-" in error
    assert error.rstrip().endswith("--ckpt_path last")


def test_sigterm_in_calibration(fit, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    original, calls = ImportanceAccumulator.step, []

    def step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ImportanceAccumulator, "step", step)
    assert fit("--importance.checkpoint_every=1") == 130
    assert "(calibration, 2 sequences done)" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
