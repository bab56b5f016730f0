"""Whole runs on a GPU, as a user gives them on the command line, and runs that are interrupted there and resumed."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import hfprune
from hfprune import LoraRecovery, PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule
from hfprune.cli import main
from hfprune.models import parameter_count
from hfprune.plan import PruningPlan
from hfprune.recovery import DistillationRecovery
from tests.helpers.models import GATED, save_tiny, tiny_tokenizer, token_ids
from tests.helpers.stops import Stop, StopAt, StopInCalibration
from tests.integration.gpu import test_criteria as test_cuda

DEVICE, ACCELERATOR = test_cuda.DEVICE, "gpu"

pytestmark = test_cuda.pytestmark

SMALL = [
    "--data.seq_len=16", "--data.calibration_sequences=4", "--data.eval_window=16", "--data.eval_windows=2",
    "--latency=false", "--trainer.enable_progress_bar=false", "--trainer.devices=1",
]  # fmt: skip
RECOVERY = ["--data.recovery_sequences=8", "--data.validation_sequences=2", "--data.batch_size=4"]
LORA = ["--importance.recovery.rank=2"]
FULL = ["--importance.recovery=full", "--model.dtype=float32"]
RATIO = ["--pruning_ratio=0.2"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """An empty one but for an evaluation text; nothing is drawn there, which no GPU does and takes most of the time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hfprune.callbacks.report.save_figures", lambda *_: None)
    monkeypatch.setattr("hfprune.callbacks.report.write_report", lambda *_: None)
    Path("words.txt").write_text("The assert is a statement of the language and so is while. " * 20)


def run(command, dense, *flags, out="out", accelerator=None):
    where = f"--trainer.accelerator={accelerator or ACCELERATOR}"
    assert main([command, f"--model.path={dense}", f"--output_dir={out}", where, *SMALL, *flags]) == 0
    return json.loads((Path(out) / "report.json").read_text())


def logits_of(model):
    with torch.no_grad():
        return model.eval()(token_ids().to(model.device)).logits.cpu()


def check(report, *stages, out="out"):
    """What the report says is there, and what was saved loads with stock transformers, on either device."""
    assert tuple(report["stages"]) == stages
    for figures in report["stages"].values():
        assert figures["perplexity"]["value"] > 1
        assert figures["fidelity"]["kl"] > -1e-6
    saved = report["saved"]
    assert saved["max_logit_difference_after_reload"] <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(f"{out}/model")
    assert parameter_count(model) == saved["parameters"]
    found = logits_of(model)
    assert found.isfinite().all()
    torch.testing.assert_close(logits_of(model.to(DEVICE)), found, rtol=1e-3, atol=1e-3)
    return model


FITS = {
    "lora": LORA,
    "dora, control": [*LORA, "--importance.recovery.dora=true", "--recover_dense=true"],
    "pissa": [*LORA, "--importance.recovery.init=pissa"],
    "cached teacher": [*FULL, "--model.distillation.alpha=0.5", "--model.distillation.cache=cache"],
    "hidden": [*FULL, "--model.distillation.alpha=0.5", "--model.distillation.hidden=1.0"],
    "layers run again": [*FULL, "--model.gradient_checkpointing=true"],
    "rounds": [*LORA, "--importance.rounds=2", "--importance.compensation=LeastSquares"],
    "two stages": [*LORA, "--importance.criterion=CoupledTaylor", "--importance.distillation.first_stage=0.05"],
    "own words": [*LORA, "--data.calibration=self", "--data.text=words.txt"],
    "sensitivity": [*LORA, "--importance.allocation=Sensitivity", "--layout=padded"],
    "bf16-mixed": [*LORA, "--trainer.precision=bf16-mixed"],
    "16-mixed": [*LORA, "--trainer.precision=16-mixed"],
    "16-mixed, all weights": [*FULL, "--trainer.precision=16-mixed"],
    "bf16-mixed, cached teacher": [*LORA, "--trainer.precision=bf16-mixed", "--model.distillation.cache=cache"],
    "16-mixed, cached teacher": [*LORA, "--trainer.precision=16-mixed", "--model.distillation.cache=cache"],
}


@pytest.mark.parametrize("mode", FITS)
def test_fit(dense, mode):
    stages = ["dense", "pruned", "recovered"] + ["dense_tuned"] * ("control" in mode)
    report = run("fit", dense, *RATIO, *RECOVERY, *FITS[mode])
    check(report, *stages)
    assert report["stages"]["recovered"]["optimizer_steps"] == 2
    assert report["stages"]["recovered"]["supervised_tokens"] > 0
    assert bool(list(Path().glob("cache/*/rows-*"))) == ("cached" in mode)


def test_prune_measures_speed_and_keeps_the_units_of_the_cpu(dense):
    units = ["--importance.units=[mlp,heads]"]
    report = run("prune", dense, *RATIO, *units, "--latency=true")
    check(report, "dense", "pruned")
    for figures in report["stages"].values():
        assert figures["latency"]["device"] == DEVICE
        assert figures["latency"]["peak_bytes"] > 0
    other = run("prune", dense, *RATIO, *units, out="cpu", accelerator="cpu")
    assert PruningPlan.load(Path("out")).keep == PruningPlan.load(Path("cpu")).keep
    scores = [load_file(f"{out}/importance.safetensors") for out in ("out", "cpu")]
    test_cuda.check(*scores, rtol=1e-4)
    for stage, figures in other["stages"].items():
        found = report["stages"][stage]
        assert found["perplexity"]["value"] == pytest.approx(figures["perplexity"]["value"], rel=1e-4)
        assert found["fidelity"]["kl"] == pytest.approx(figures["fidelity"]["kl"], rel=1e-3, abs=1e-6)


def test_experts(tmp_path):
    folder = save_tiny(tmp_path / "mixture", "qwen3_moe")
    run("prune", folder, "--pruning_ratio=0.1", "--importance.units=[experts]", out="cpu", accelerator="cpu")
    check(run("prune", folder, "--pruning_ratio=0.1", "--importance.units=[experts]"), "dense", "pruned")
    assert PruningPlan.load(Path("out")).keep == PruningPlan.load(Path("cpu")).keep


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_packed_instructions(tmp_path, precision):
    from tests.helpers.models import tiny

    config = LlamaConfig(**GATED | {"max_position_embeddings": 512}, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(tiny("llama", dtype=torch.float32).state_dict())
    model.save_pretrained(tmp_path / "long")
    tiny_tokenizer().save_pretrained(tmp_path / "long")
    outputs = ["is a", "of the language", "a", "is so", "the while statement", "and", "in it", "so"]
    Path("rows.json").write_text(json.dumps([{"instruction": "a", "output": o} for o in outputs]))
    flags = ["--data.recovery=rows.json", "--data.packing=true", "--data.validation=builtin", "--data.seq_len=512"]
    flags += ["--data.validation_sequences=2", "--data.batch_size=2", f"--trainer.precision={precision}"]
    report = run("fit", tmp_path / "long", *RATIO, *LORA, *flags)
    check(report, "dense", "pruned", "recovered")
    assert report["stages"]["recovered"]["training"]["tokens"] > report["stages"]["recovered"]["supervised_tokens"] > 0


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_lora_prune(dense, precision):
    Path("prune.yaml").write_text("lora_prune: {every: 1, lora: {rank: 2, alpha: 4}, units: [mlp]}\n")
    flags = ["--config=prune.yaml", "--pruning_ratio=0.15", "--data.recovery_sequences=20", "--data.batch_size=2"]
    flags += ["--data.validation_sequences=1", f"--trainer.precision={precision}"]
    report = run("fit", dense, *flags)
    check(report, "dense", "recovered")
    assert report["plan"]["recovery"]["while_training"] is True


@pytest.mark.parametrize(
    "flags", [["--method=wanda"], ["--method=taylor", "--sparse.offload=cpu"], ["--method=sparsegpt"]], ids=str
)
def test_sparse_prune_is_exported(dense, flags):
    report = run("prune", dense, *flags, "--sparsity=2:4")
    check(report, "dense", "pruned")
    assert report["saved"]["sparsity"]["achieved"] == 0.5
    layout = ["--layout=bitmask", "--output_dir=small", f"--trainer.accelerator={ACCELERATOR}"]
    assert main(["export", "--model.path=out/model", *layout]) == 0
    small, plain = hfprune.load("small"), AutoModelForCausalLM.from_pretrained("out/model")
    torch.testing.assert_close(logits_of(small.to(DEVICE)), logits_of(plain.to(DEVICE)), rtol=0, atol=1e-6)


def test_sparse_fit_leaves_zeros_zero(dense):
    report = run("fit", dense, "--method=wanda", "--sparsity=0.5", "--sparse.recovery.rank=2", *RECOVERY)
    check(report, "dense", "pruned", "recovered")
    assert report["saved"]["sparsity"]["achieved"] >= 0.49


def test_sweep_evaluate_and_export(dense):
    Path("sweep.yaml").write_text(
        "pruning_ratios: [0.2]\ntexts: {words: words.txt}\nmethods:\n"
        "- {name: entropy, objective: entropy, criterion: {class_path: ActivationTaylor}}\n"
        "- {name: refit, criterion: {class_path: ActivationNorm}, compensation: {class_path: LeastSquares}}\n"
        "- {name: chosen, criterion: {class_path: Reconstruction}, compensation: {class_path: LeastSquares}}\n"
    )
    where = [f"--trainer.accelerator={ACCELERATOR}", "--trainer.devices=1"]
    sweep = ["sweep", "--config=sweep.yaml", f"--model.path={dense}", "--output_dir=swept", *SMALL[:5]]
    assert main([*sweep, *where]) == 0
    rows = {row["method"]: row for row in json.loads(Path("swept/table.json").read_text())["rows"]}
    assert list(rows) == ["dense", "entropy", "refit", "chosen"]
    assert all(row["words_perplexity"] > 1 for row in rows.values())
    run("prune", dense, *RATIO)
    assert main(["export", "--model.path=out/model", "--layout=per_layer", "--output_dir=other", *where]) == 0
    evaluate = ["evaluate", "--model.path=out/model", f"--dense={dense}", "--data.text=words.txt", "--output=eval.json"]
    assert main([*evaluate, "--data.eval_window=16", "--data.eval_windows=2", *where, "--dense_cache=kept"]) == 0
    stages = json.loads(Path("eval.json").read_text())["stages"]
    assert list(stages) == ["dense", "model"]
    assert stages["model"]["latency"]["device"] == DEVICE
    assert stages["model"]["fidelity"]["kl"] > stages["dense"]["fidelity"]["kl"]


# ---- interrupted ------------------------------------------------------------------------------------------------------


def fit(folder, *callbacks, ckpt_path=None, lora=True, criterion=None, **options):
    module = PruningModule(folder, learning_rate=1e-3, **options)
    recovery = LoraRecovery(rank=2, dropout=0.1) if lora else None
    settings = {} if criterion is None else {"criterion": criterion}
    importance = TaylorImportanceCallback(
        pruning_ratio=0.3, recovery=recovery or "full", checkpoint_every=1, **settings
    )
    trainer = PruneTrainer(
        callbacks=[importance, *callbacks], accelerator=ACCELERATOR, devices=1, logger=False, max_epochs=2,
        enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )  # fmt: skip
    torch.manual_seed(0)
    data = TextDataModule(
        seq_len=16, calibration_sequences=6, batch_size=4, recovery_sequences=12, validation_sequences=4, eval_windows=0
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def same(found, expected):
    assert found.plan.keep == expected.plan.keep
    theirs = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "options", [{}, {"lora": False, "distillation": DistillationRecovery(alpha=0.5)}], ids=["lora", "all weights"]
)
def test_resumed_in_calibration_and_in_recovery(dense, tmp_path, monkeypatch, options):
    straight = fit(dense, **options)
    saving = {"dirpath": tmp_path / "ckpt", "save_last": True, "every_n_train_steps": 1}
    stop = StopInCalibration(monkeypatch, 3)
    with pytest.raises(Stop):
        fit(dense, ModelCheckpoint(**saving), **options)
    with pytest.raises(Stop):  # taken up behind the third sequence, and left in recovery
        fit(dense, ModelCheckpoint(**saving), StopAt(4), ckpt_path="last", **options)
    assert stop.count == 6
    resumed = fit(dense, ModelCheckpoint(**saving), ckpt_path=str(tmp_path / "ckpt/last.ckpt"), **options)
    assert stop.count == 6
    assert resumed.trainer.global_step == 6
    same(resumed, straight)
