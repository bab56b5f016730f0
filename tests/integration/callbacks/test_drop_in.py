"""A Lightning project of one's own with a pruning callback: report, metrics, plan, checkpoints and Hugging Face folder."""

import csv
import json

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from transformers import AutoModelForCausalLM

import hfprune
from hfprune import (
    LoraPruningCallback,
    LoraRecovery,
    PruneTrainer,
    PruningModule,
    PruningPlan,
    ReportCallback,
    SparsePruningCallback,
    StructuredPruningCallback,
    TaylorImportanceCallback,
    TextDataModule,
)
from hfprune.allocation import keep_top
from hfprune.callbacks.metrics import pruning_metrics
from hfprune.criteria import ActivationNorm
from hfprune.criteria.lora_gradient import unit_importance
from hfprune.io.recorded_plan import recorded_plan
from hfprune.models import find_groups
from hfprune.utils.errors import ConfigError
from tests.helpers.foreign import Classifier, FineTuner, LateFineTuner, ManualFineTuner
from tests.helpers.models import save_tiny, tiny, tiny_tokenizer, token_ids
from tests.helpers.stops import Stop, StopAt

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*num_workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

WINDOWS = token_ids(3, 16, seed=5)


def trainer(*callbacks, **kwargs):
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False, "logger": False}
    settings |= {"log_every_n_steps": 1, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    return Trainer(callbacks=list(callbacks), enable_model_summary=False, **settings | kwargs)


def taylor(**kwargs):
    return TaylorImportanceCallback(**{"pruning_ratio": 0.2, "calibration_batches": 3} | kwargs)


def rows(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


class TwoModels(FineTuner):
    """A student that is trained, and a teacher."""

    def __init__(self):
        super().__init__()
        self.net["teacher"] = tiny(dtype=torch.float32, seed=2).train().requires_grad_(False)


class Endless(FineTuner):
    """Trains at one rate, so it needs no number of steps."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Remembering(FineTuner):
    """Has hooks of its own for checkpoints, and an argument that no checkpoint holds."""

    def __init__(self, note, lr=1e-2):
        super().__init__(lr)
        self.save_hyperparameters(ignore="note")
        self.note = note

    def on_save_checkpoint(self, checkpoint):
        checkpoint["note"] = self.note

    def on_load_checkpoint(self, checkpoint):
        self.found = checkpoint["note"]
        assert self.net["lm"].config.intermediate_size == 14  # it sees the pruned model


def test_best_checkpoint_becomes_a_hugging_face_folder(tmp_path):
    """ModelCheckpoint of the best, EarlyStopping and CSVLogger, as in any project."""
    best = ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor="val/loss")
    logger = CSVLogger(tmp_path, name="", version="")
    run = trainer(taylor(), best, EarlyStopping("val/loss", patience=2), logger=logger, max_epochs=2)
    run.fit(FineTuner(lr=2e-3))
    module = hfprune.load_from_checkpoint(FineTuner, best.best_model_path)
    assert type(module) is FineTuner
    assert module.hparams.lr == 2e-3
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    module.net["lm"].save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.config.intermediate_size == 14
    assert torch.equal(logits(again), logits(module.net["lm"]))
    with pytest.raises(ConfigError, match="was already pruned"):
        PruningModule(str(tmp_path / "model"))
    assert "on_load_checkpoint" not in vars(FineTuner)


@pytest.mark.parametrize("kind", [LateFineTuner, TwoModels, Remembering])
def test_checkpoints_of_other_modules_are_loaded(kind, tmp_path):
    keeping = ModelCheckpoint(dirpath=tmp_path)
    pruning = taylor(model="net.lm") if kind is TwoModels else taylor()
    module = kind("seen") if kind is Remembering else kind()
    trainer(pruning, keeping).fit(module)
    given = {"note": "other"} if kind is Remembering else {}
    own = dict(vars(kind))
    again = hfprune.load_from_checkpoint(kind, keeping.best_model_path, **given)
    assert dict(vars(kind)) == own
    assert torch.equal(logits(again.net["lm"]), logits(module.net["lm"]))
    assert recorded_plan(again.net["lm"]) == pruning.plan
    assert getattr(again, "found", "seen") == "seen"


def test_a_checkpoint_saved_after_the_run_is_loaded(tmp_path):
    """``trainer.fit(module); trainer.save_checkpoint(path)``, with no checkpoint callback."""
    module, pruning = FineTuner(), taylor()
    run = trainer(pruning)
    run.fit(module)
    run.save_checkpoint(tmp_path / "end.ckpt")
    again = hfprune.load_from_checkpoint(FineTuner, tmp_path / "end.ckpt")
    assert torch.equal(logits(again.net["lm"]), logits(module.net["lm"]))
    resumed = FineTuner()
    trainer(taylor()).validate(resumed, ckpt_path=tmp_path / "end.ckpt")
    assert recorded_plan(resumed.net["lm"]) == pruning.plan


@pytest.mark.parametrize("sparse", [False, True])
def test_checkpoints_with_adapters_are_loaded(sparse, tmp_path):
    keeping, recovery = ModelCheckpoint(dirpath=tmp_path), LoraRecovery(rank=2)
    settings = {"calibration_batches": 2, "recovery": recovery}
    pruning = SparsePruningCallback(method="wanda", sparsity=0.5, **settings) if sparse else taylor(recovery=recovery)
    module = FineTuner()
    trainer(pruning, keeping).fit(module)
    again = hfprune.load_from_checkpoint(FineTuner, keeping.best_model_path)
    assert torch.equal(logits(again.net["lm"]), logits(module.net["lm"]))


def test_dense_checkpoints_are_loaded_as_they_are(tmp_path):
    keeping = ModelCheckpoint(dirpath=tmp_path)
    module = FineTuner()
    trainer(keeping).fit(module)
    again = hfprune.load_from_checkpoint(FineTuner, keeping.best_model_path)
    assert torch.equal(logits(again.net["lm"]), logits(module.net["lm"]))
    with pytest.raises(ConfigError, match="folder of shards"):
        hfprune.load_from_checkpoint(FineTuner, tmp_path)


def test_checkpoints_of_another_model_are_refused(tmp_path):
    class Other(FineTuner):
        def __init__(self):
            super().__init__()
            self.net["lm"] = tiny("llama_untied_bias", dtype=torch.float32)

    keeping = ModelCheckpoint(dirpath=tmp_path)
    trainer(taylor(), keeping).fit(FineTuner())
    with pytest.raises(ConfigError, match="belongs to another model"):
        hfprune.load_from_checkpoint(Other, keeping.best_model_path)
    assert "on_load_checkpoint" not in vars(Other)


class Recorder(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def log_metrics(self, *args, **kwargs):
        self.seen.append((kwargs.get("step"), args[0] if args else kwargs["metrics"]))


def test_pruning_is_logged_to_every_logger(tmp_path):
    pruning, recorder = taylor(), Recorder()
    trainer(pruning, logger=[CSVLogger(tmp_path, name="", version=""), recorder]).fit(FineTuner())
    step, logged = next((step, found) for step, found in recorder.seen if "pruning/params_after" in found)
    assert step == 0
    assert logged["pruning/params_before"] == pruning.resolved.dense_params
    assert logged["pruning/params_after"] == pruning.resolved.params
    assert logged["pruning/removed_share"] == pytest.approx(1 - pruning.resolved.params / pruning.resolved.dense_params)
    assert logged["pruning/calibration_tokens"] == 3 * 4 * 12
    assert logged["pruning/calibration_seconds"] > 0
    widths = [logged[f"pruning/mlp_width_{name}"] for name in ("min", "mean", "max")]
    assert widths == [14, 14, 14]
    found = next(row for row in rows(tmp_path) if row["pruning/params_after"])
    assert {name: float(found[name]) for name in logged} == logged
    assert any(row["train/loss"] for row in rows(tmp_path))


def test_zeros_are_logged():
    recorder = Recorder()
    pruning = SparsePruningCallback(method="magnitude", sparsity=0.5, calibration_batches=2)
    trainer(pruning, logger=recorder).fit(FineTuner())
    logged = next(found for _, found in recorder.seen if "pruning/zero_share" in found)
    assert logged["pruning/zero_share"] == pytest.approx(0.5, abs=0.02)
    assert logged["pruning/removed_share"] == 0


def test_tensorboard_gets_the_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoardLogger needs tensorboard", exc_type=ImportError)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(taylor(), logger=TensorBoardLogger(tmp_path)).fit(FineTuner())
    events = EventAccumulator(str(next(tmp_path.rglob("events.*")).parent)).Reload()
    assert events.Scalars("pruning/removed_share")[0].value == pytest.approx(0.2, abs=0.05)


def test_a_plan_by_weights_has_no_calibration():
    plan = PruningPlan(model_class="M", groups=(), keep={}, config={}, provenance={"calibration": None})
    assert "pruning/calibration_seconds" not in pruning_metrics(plan, before=4, after=2, calibration_seconds=1.0)


def test_the_plan_is_public(tmp_path):
    module, pruning = FineTuner(), taylor()
    assert pruning.plan is None
    trainer(pruning).fit(module)
    assert pruning.plan.model_class == "LlamaForCausalLM"
    assert set(pruning.plan.widths().values()) == {14}
    assert recorded_plan(module.net["lm"]) == pruning.plan
    folder = save_tiny(tmp_path / "dense")
    quiet = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    second = StructuredPruningCallback(0.2, criterion=ActivationNorm())
    data = TextDataModule(seq_len=16, calibration_sequences=4, eval_windows=0)
    plan = PruneTrainer(accelerator="cpu", devices=1, callbacks=[second], **quiet).prune(PruningModule(folder), data)
    assert plan == second.plan
    assert plan.widths()


def test_report_of_a_module_of_ones_own(tmp_path):
    report = ReportCallback(str(tmp_path / "out"), text=WINDOWS, latency=False)
    module, pruning = FineTuner(), taylor()
    trainer(report, pruning).fit(module)
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert list(found["stages"]) == ["dense", "pruned", "recovered"]
    before, after = found["stages"]["dense"], found["stages"]["recovered"]
    assert (before["parameters"], after["parameters"]) == (pruning.resolved.dense_params, pruning.resolved.params)
    assert all(stage["perplexity"]["value"] > 1 for stage in found["stages"].values())
    assert before["fidelity"]["kl"] == pytest.approx(0, abs=1e-9)
    assert after["optimizer_steps"] == 6
    assert found["saved"]["max_logit_difference_after_reload"] == 0
    assert PruningPlan.load(tmp_path / "out") == PruningPlan.load(tmp_path / "out/model") == pruning.plan
    page = (tmp_path / "out/report.html").read_text()
    assert "LlamaForCausalLM" in page
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert torch.equal(logits(model), logits(module.net["lm"]))


def test_report_reads_a_text_with_the_tokenizer_of_the_module(tmp_path):
    class Own(FineTuner):
        def __init__(self):
            super().__init__()
            self.tokenizer = tiny_tokenizer()

    text = tmp_path / "text.txt"
    text.write_text("while the expression is true the statement is executed again " * 40)
    report = ReportCallback(str(tmp_path / "out"), text=str(text), latency=False)
    trainer(report, taylor()).fit(Own())
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["stages"]["pruned"]["perplexity"]["value"] > 1
    assert len(found["generations"][0]["texts"]) == 3
    assert (tmp_path / "out/model/tokenizer.json").is_file()
    with pytest.raises(ConfigError, match="has no attribute `tokenizer`"):
        trainer(ReportCallback(str(tmp_path / "none"), text=str(text)), taylor()).fit(FineTuner())
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("merge", [True, False])
def test_report_leaves_the_adapters_of_the_module(merge, tmp_path):
    report = ReportCallback(str(tmp_path / "out"), text=WINDOWS, latency=False, merge_adapters=merge)
    module = FineTuner()
    trainer(taylor(recovery=LoraRecovery(rank=2, dropout=0.0)), report).fit(module)
    expected = logits(module.net["lm"])
    assert any("lora_" in name for name, _ in module.named_parameters())
    folder = tmp_path / "out" / ("model" if merge else "adapter")
    torch.testing.assert_close(logits(hfprune.load(folder)), expected, atol=1e-5, rtol=1e-5)
    module.net["lm"].save_pretrained(tmp_path / "own")
    assert (tmp_path / "own/base/plan.json").is_file()
    torch.testing.assert_close(logits(hfprune.load(tmp_path / "own")), expected, atol=1e-5, rtol=1e-5)
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["recovery"]["rank"] == 2
    assert found["stages"]["recovered"]["parameters"] == found["stages"]["pruned"]["parameters"]


def test_report_of_a_model_made_late_and_of_manual_optimization(tmp_path):
    for number, (kind, options) in enumerate([(LateFineTuner, {}), (ManualFineTuner, {"objective": "entropy"})]):
        out = tmp_path / str(number)
        trainer(ReportCallback(str(out), latency=False), taylor(**options)).fit(kind())
        stages = json.loads((out / "report.json").read_text())["stages"]
        assert list(stages) == ["dense", "pruned", "recovered"]
        assert stages["pruned"].get("perplexity") is None


def test_a_resumed_run_reports_what_was_measured_before(tmp_path):
    keeping = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    first = ReportCallback(str(tmp_path / "out"), text=WINDOWS, latency=False)
    with pytest.raises(Stop):
        trainer(taylor(), first, keeping, StopAt(7), max_epochs=2).fit(FineTuner())
    assert list(first.stages) == ["dense", "pruned"]
    report = ReportCallback(str(tmp_path / "out"), text=WINDOWS, latency=False, overwrite=True)
    trainer(taylor(), report, max_epochs=2).fit(FineTuner(), ckpt_path=str(tmp_path / "checkpoints/last.ckpt"))
    after = json.loads((tmp_path / "out/report.json").read_text())["stages"]
    assert {name: stage["seconds"] for name, stage in first.stages.items()}.items() <= {
        name: stage["seconds"] for name, stage in after.items()
    }.items()  # the dense and the pruned model were not measured again
    assert after["recovered"]["optimizer_steps"] == 12
    assert after["recovered"]["perplexity"]["value"] > 1


def test_described_neurons_have_no_report(tmp_path):
    neurons = [hfprune.Neurons("net.0", "net.3")]
    pruning = taylor(neurons=neurons)
    with pytest.raises(ConfigError, match=r"neurons of Classifier are described by neurons=\.\.\."):
        trainer(pruning, ReportCallback(str(tmp_path / "out"))).fit(Classifier(), [1])


class Gradients(Callback):
    """Computes the importance of every step from the adapters' gradients, by hand."""

    def __init__(self, groups):
        self.groups, self.mean = groups, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        model = pl_module.net["lm"].get_base_model()
        for group in self.groups:
            now = unit_importance(model, group)
            before = self.mean.get(group.name)
            self.mean[group.name] = 0.1 * now if before is None else 0.9 * before + 0.1 * now


def lora_prune(**kwargs):
    settings = {"pruning_ratio": 0.2, "units": ("mlp",), "every": 1, "lora": LoraRecovery(rank=2, dropout=0.0)}
    return LoraPruningCallback(**settings | kwargs)


def test_lora_pruning_in_a_module_of_ones_own(tmp_path):
    module, pruning = FineTuner(), lora_prune()
    by_hand = Gradients(find_groups(module.net["lm"]))
    report = ReportCallback(str(tmp_path / "out"), text=WINDOWS, latency=False)
    trainer(pruning, by_hand, report).fit(module)
    for name, importance in pruning.importance.items():
        torch.testing.assert_close(importance, by_hand.mean[name], rtol=1e-9, atol=0)
        assert pruning.plan.keep[name] == keep_top(by_hand.mean[name], 14)
    assert type(module.net["lm"]).__name__ == "LlamaForCausalLM"
    assert not any("lora_" in name for name, _ in module.named_parameters())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert torch.equal(logits(again), logits(module.net["lm"]))
    assert list(report.stages) == ["dense", "recovered"]
    module.net["lm"].save_pretrained(tmp_path / "own")
    assert PruningPlan.load(tmp_path / "own") == pruning.plan


def test_lora_pruning_resumes_in_a_module_of_ones_own(tmp_path):
    keeping = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    first = lora_prune()
    with pytest.raises(Stop):
        trainer(first, keeping, StopAt(7), max_epochs=2).fit(FineTuner())
    second, module = lora_prune(), FineTuner()
    before = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["LoraPruningCallback"]["importance"]
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.update(second.importance)

    run = trainer(second, Look(), max_epochs=2)
    run.fit(module, ckpt_path=str(tmp_path / "last.ckpt"))
    assert all(torch.equal(seen[name], importance) for name, importance in before.items())
    assert run.global_step == 12
    assert module.net["lm"].config.intermediate_size == 14


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ManualFineTuner, {}, r"ManualFineTuner uses manual optimization \(automatic_optimization=False\)"),
        (LateFineTuner, {}, "LateFineTuner creates its model in configure_model: create it in the constructor"),
        (Classifier, {}, "Classifier holds no supported Hugging Face model"),
        (TwoModels, {}, "TwoModels holds several models"),
        (Endless, {"max_epochs": -1, "max_time": "00:00:01:00"}, "set max_epochs or max_steps"),
    ],
)
def test_lora_pruning_says_what_a_module_lacks(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        trainer(lora_prune(), **settings).fit(kind())
