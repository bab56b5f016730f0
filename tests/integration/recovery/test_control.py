"""The dense model tuned beside the pruned one, and what recovery is said to have cost."""

import gc
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hfprune import LoraRecovery, PruneTrainer, PruningModule, TextDataModule
from hfprune.callbacks.snapshots import STAGE, DenseControl
from hfprune.cli import main
from hfprune.recovery.cost import forward_flops, training_flops
from hfprune.recovery.lora import add_lora
from hfprune.utils.errors import ConfigError
from tests.helpers import warm
from tests.helpers.models import save_tiny, tiny

DATA = {"seq_len": 16, "batch_size": 4, "recovery_sequences": 12, "validation_sequences": 2}
FLAGS = [
    "--pruning_ratio=0.2", "--data.calibration_sequences=4", "--data.eval_windows=2", "--data.eval_window=16",
    *(f"--data.{name}={value}" for name, value in DATA.items()), "--latency=false",
    "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--model.learning_rate=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def fit(folder, out, *flags):
    return main(["fit", f"--model.path={folder}", f"--output_dir={out}", *FLAGS, *flags])


def report_of(out):
    return json.loads((Path(out) / "report.json").read_text())


MODES = {"lora": ["--importance.recovery.rank=2"], "full": ["--importance.recovery=full", "--model.dtype=float32"]}


@pytest.mark.parametrize("mode", MODES)
def test_the_pruned_run_stays_as_it_is_and_the_dense_model_sees_the_same_data(folder, tmp_path, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)
    assert fit(folder, "plain", *MODES[mode]) == 0
    assert fit(folder, "control", *MODES[mode], "--recover_dense=true") == 0
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("plain", "control"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    plain, control = report_of("plain"), report_of("control")
    assert list(plain["stages"]) == ["dense", "pruned", "recovered"]
    assert list(control["stages"]) == ["dense", "pruned", "recovered", STAGE]
    assert plain["stages"]["recovered"]["perplexity"] == control["stages"]["recovered"]["perplexity"]
    dense, tuned, recovered = (control["stages"][name] for name in ("dense", STAGE, "recovered"))
    assert tuned["parameters"] == dense["parameters"] > recovered["parameters"]
    assert tuned["perplexity"]["value"] < dense["perplexity"]["value"]
    assert 1e-3 < tuned["fidelity"]["kl"] != recovered["fidelity"]["kl"]
    for name in ("optimizer_steps", "supervised_tokens"):
        assert tuned[name] == recovered[name] > 0
    assert tuned["training"]["tokens"] == recovered["training"]["tokens"] == 12 * 16
    assert tuned["training"]["flops"] > recovered["training"]["flops"] > 0
    assert [set(item["texts"]) for item in control["generations"]] == [{"dense", "pruned", "recovered", STAGE}] * 2
    assert STAGE in (tmp_path / "control" / "report.html").read_text()
    assert not list(Path("control/checkpoints/dense").glob("*/model.safetensors"))


def test_it_is_what_tuning_the_dense_model_alone_gives(folder, tmp_path, monkeypatch):
    """Plain AdamW on the adapters of the dense model, batch after batch, by hand."""
    monkeypatch.chdir(tmp_path)
    module = PruningModule(folder, learning_rate=0.01)
    control = DenseControl(LoraRecovery(rank=2, dropout=0.0), samples=0)
    seed_everything(0, verbose=False)
    data = TextDataModule(calibration_sequences=4, eval_windows=2, eval_window=16, **DATA)
    trainer = PruneTrainer(
        callbacks=[control], accelerator="cpu", devices=1, logger=False, max_epochs=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    again = TextDataModule(calibration_sequences=4, eval_windows=2, eval_window=16, **DATA)
    again.bind(module.tokenizer, vocab_size=61, max_positions=64)
    model = add_lora(AutoModelForCausalLM.from_pretrained(folder), LoraRecovery(rank=2, dropout=0.0), seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    for step, batch in enumerate(again.train_dataloader()):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / 3))))
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours, theirs = dict(module.causal_lm.named_parameters()), dict(model.merge_and_unload().named_parameters())
    dense = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert control.figures["perplexity"]
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, atol=2e-4, rtol=0)
    assert max((ours[name] - dense[name]).abs().max() for name in ours) > 5e-3


def leave_in_the_control(folder, flags):
    """Fits, and is killed when the first step of the control has been saved."""
    original = ModelCheckpoint.on_train_batch_end

    def leaving(*args):
        original(*args)
        if list(Path("killed/checkpoints/dense").glob("step-1*.ckpt")):
            os.kill(os.getpid(), signal.SIGKILL)

    ModelCheckpoint.on_train_batch_end = leaving
    fit(folder, "killed", *flags)


@pytest.mark.usefixtures("undrawn")
def test_killed_in_the_control_and_resumed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*MODES["lora"], "--recover_dense=true", "--checkpoint_steps=1"]
    assert fit(folder, "straight", *flags) == 0
    done = warm.run(f"{__name__}:{leave_in_the_control.__name__}", cwd=tmp_path, folder=folder, flags=flags)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert STAGE not in report_of("killed")["stages"]
    assert fit(folder, "killed", *flags, "--ckpt_path=last") == 0
    recovered = (report_of(name)["stages"]["recovered"]["training"]["flops"] for name in ("straight", "killed"))
    assert next(recovered) == next(recovered) > 0  # its training had ended before the checkpoint
    one, two = (report_of(name)["stages"][STAGE] for name in ("straight", "killed"))
    assert one["training"]["flops"] == two["training"]["flops"]
    assert one["perplexity"]["value"] == two["perplexity"]["value"]
    assert one["fidelity"] == two["fidelity"]
    assert one["training"]["tokens"] == two["training"]["tokens"]


@pytest.mark.usefixtures("undrawn")
def test_the_pruned_model_and_its_optimizer_have_gone_before(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original, others = DenseControl.setup, []

    def held():
        gc.collect()
        return [x for x in gc.get_objects() if issubclass(type(x), PruningModule | torch.optim.Optimizer)]

    def setup(self, trainer, pl_module, stage):
        known = {id(x) for x in [pl_module, *earlier]}
        others.append([type(x).__name__ for x in held() if id(x) not in known])
        original(self, trainer, pl_module, stage)

    monkeypatch.setattr(DenseControl, "setup", setup)
    earlier = held()  # what other tests left
    assert fit(folder, "out", *MODES["lora"], "--recover_dense=true") == 0
    assert others == [[]]


@pytest.mark.usefixtures("undrawn")
def test_runs_of_unequal_length_are_said_to_be_no_control(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert fit(folder, "out", *MODES["lora"]) == 0
    more = ["--ckpt_path=last", "--recover_dense=true", "--trainer.limit_train_batches=2"]
    assert fit(folder, "out", *MODES["lora"], *more) == 0
    (warning,) = report_of("out")["warnings"]
    assert "dense_tuned is not comparable with recovered: 2 optimizer steps, the recovered model 3." in warning
    assert warning in caplog.text


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--trainer.devices=2", "--trainer.strategy=ddp"], "tuned by one process"),
        (["--trainer.limit_train_batches=0"], "there is no recovery here"),
        (["--model.distillation.alpha=1.0"], "on its own predictions"),
    ],
)
def test_what_it_cannot_control_is_refused_at_once(folder, tmp_path, monkeypatch, capsys, flags, text):
    monkeypatch.chdir(tmp_path)
    assert fit(folder, "out", "--recover_dense=true", *flags) == 2
    assert text in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_module_of_ones_own_is_refused():
    with pytest.raises(ConfigError, match="tunes a PruningModule"):
        DenseControl(None).setup(PruneTrainer(logger=False), nn.Module(), "fit")


def counted(model, names=lambda name: True):
    """Multiplying weights by hand: every projection, and the head even where it is tied."""
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return sum(m.weight.numel() for n, m in modules if names(n))


@pytest.mark.parametrize("name", ["llama", "llama_untied_bias", "gpt_neox"])
def test_operations_of_all_weights(name):
    model = tiny(name)
    weights = counted(model)
    assert forward_flops(model) == 2 * weights
    assert training_flops(model, 10) == 60 * weights
    assert training_flops(model, 10, teacher=tiny("qwen2")) == 60 * weights + 20 * counted(tiny("qwen2"))


def test_operations_of_adapters():
    base = counted(tiny("llama"))
    model = add_lora(tiny("llama"), LoraRecovery(rank=2))
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert training_flops(model, 7) == 7 * (4 * (base + adapters) + 2 * adapters)


def test_operations_of_mixtures_count_the_experts_that_a_token_goes_through():
    model = tiny("mixtral")
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    routers = sum(p.numel() for n, p in model.named_parameters() if n.endswith("gate.weight"))
    assert forward_flops(model) == 2 * (counted(model) + routers + experts // 3)  # 2 of 6
