"""The whole lifecycle on a tiny model: calibrate, prune, recover, export, in one fit."""

import csv
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfprune import (
    LoraRecovery,
    PruneTrainer,
    PruningModule,
    PruningPlan,
    ReportCallback,
    TaylorImportanceCallback,
    TextDataModule,
    WeightTaylor,
    apply_plan,
)
from hfprune.callbacks import PruningEvents
from hfprune.criteria import Magnitude, Random
from hfprune.io.save import load_importance
from hfprune.models import find_groups, parameter_count
from hfprune.pruning.accumulator import weight_scores
from hfprune.utils.errors import CalibrationError, ConfigError, UnsupportedArchitectureError
from tests.helpers.models import save_tiny, tiny, tiny_tokenizer, token_ids


def data(**kwargs):
    defaults = {"seq_len": 16, "calibration_sequences": 6, "batch_size": 4, "recovery_sequences": 12}
    return TextDataModule(**defaults | {"validation_sequences": 4, "eval_windows": 3, "eval_window": 16} | kwargs)


def trainer(*callbacks, **kwargs):
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": 1}
    defaults |= {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    return PruneTrainer(callbacks=list(callbacks), enable_model_summary=False, **defaults | kwargs)


def fit(folder, out=None, *, module=None, importance=None, datamodule=None, callbacks=(), ckpt_path=None, **kwargs):
    module = module or PruningModule(folder)
    importance = importance or TaylorImportanceCallback(pruning_ratio=0.2, recovery=LoraRecovery(rank=2))
    report = [ReportCallback(str(out), latency=False, overwrite=ckpt_path is not None)] if out else []
    runner = trainer(*report, importance, *callbacks, **kwargs)
    torch.manual_seed(0)
    runner.fit(module, datamodule=datamodule or data(), ckpt_path=ckpt_path)
    return module, runner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def test_fit_leaves_a_smaller_model_that_from_pretrained_loads(folder, tmp_path):
    module, runner = fit(folder, tmp_path / "out")
    budget = module.plan.provenance["budget"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert parameter_count(reloaded) == budget["params"] == parameter_count(module.model)
    assert abs(budget["removed_share"] - 0.2) * budget["dense_params"] <= 3 * 3 * 16 / 2
    assert {g.num_units for g in find_groups(reloaded)} == {reloaded.config.intermediate_size} == {budget["width"]}
    assert reloaded.get_input_embeddings().weight is reloaded.get_output_embeddings().weight
    ids = token_ids()
    with torch.no_grad():
        difference = (reloaded.eval()(ids).logits - module.model.eval()(ids).logits).abs().max()
    assert difference <= 1e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out/model")) > 4
    assert (tmp_path / "out/model/generation_config.json").is_file()
    assert runner.global_step == 3  # recovery only: 12 sequences in batches of 4


def test_report_holds_what_a_reader_needs(folder, tmp_path):
    fit(folder, tmp_path / "out")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert list(report["stages"]) == ["dense", "pruned", "recovered"]
    assert report["stages"]["dense"]["fidelity"]["kl"] == pytest.approx(0, abs=1e-9)
    assert report["stages"]["pruned"]["fidelity"]["kl"] > 0
    assert report["stages"]["pruned"]["parameters"] == report["saved"]["parameters"]
    assert "3 non-overlapping windows of 16 tokens" in report["stages"]["dense"]["perplexity"]["protocol"]
    assert report["plan"]["calibration"]["tokens"] == 6 * 16
    assert report["plan"]["criterion"]["reduction"] == "per_token"
    assert report["recovery"]["rank"] == 2
    assert {"torch", "transformers", "hfprune"} <= set(report["versions"])
    assert set(report["data"]) == {"calibration", "evaluation", "recovery", "validation"}
    assert not any(name.name.startswith(".") for name in (tmp_path / "out").iterdir())


def test_what_people_look_at(folder, tmp_path):
    importance = TaylorImportanceCallback(pruning_ratio=0.2, recovery=LoraRecovery(rank=2), check_every=2)
    logger = CSVLogger(tmp_path / "logs")
    fit(folder, tmp_path / "out", importance=importance, logger=logger, log_every_n_steps=1)
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert [tokens for tokens, _ in report["convergence"]] == [32, 64, 96]
    assert [list(item["texts"]) for item in report["generations"]] == [["dense", "pruned", "recovered"]] * 2
    saved = load_importance(out)
    assert all(torch.equal(saved[name], scores) for name, scores in importance.importance.items())
    page = (out / "report.html").read_text()
    assert all(heading in page for heading in ("Summary", "Importance of the units", "Sample", "Commands", "Facts"))
    figures = {path.name for path in (out / "figures").iterdir()}
    assert {"importance_heat_map.svg", "kept_share.png", "convergence.svg", "kl_by_position.png"} <= figures
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for stage in ("dense", "pruned", "recovered"):
        (value,) = {row[f"{stage}/perplexity/value"] for row in rows} - {""}
        assert float(value) == pytest.approx(report["stages"][stage]["perplexity"]["value"])


def test_samples_can_be_left_out(folder, tmp_path):
    runner = trainer(
        ReportCallback(str(tmp_path / "out"), latency=False, samples=0), TaylorImportanceCallback(pruning_ratio=0.2)
    )
    runner.prune(PruningModule(folder), data())
    assert json.loads((tmp_path / "out/report.json").read_text())["generations"] == []
    with pytest.raises(ConfigError, match="samples=-1 must not be negative"):
        ReportCallback(str(tmp_path / "other"), samples=-1)


def test_plan_on_disk_applied_to_the_dense_model_is_the_pruned_model(folder, tmp_path):
    runner = trainer(
        ReportCallback(str(tmp_path / "out"), latency=False), importance := TaylorImportanceCallback(mlp_ratio=1.0)
    )
    runner.prune(PruningModule(folder), datamodule=data())
    dense = AutoModelForCausalLM.from_pretrained(folder)
    apply_plan(dense, PruningPlan.load(tmp_path / "out/model"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert saved.config.intermediate_size == 16
    for (name, a), b in zip(saved.state_dict().items(), dense.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert PruningPlan.load(tmp_path / "out/plan.json") == PruningPlan.load(tmp_path / "out/model")
    assert importance.importance["model.layers.0.mlp"].shape == (24,)


def test_prune_and_fit_keep_the_same_neurons(folder, tmp_path):
    fitted, _ = fit(folder)
    pruned = PruningModule(folder)
    trainer(TaylorImportanceCallback(pruning_ratio=0.2)).prune(pruned, datamodule=data())
    assert pruned.plan.keep == fitted.plan.keep
    assert type(pruned.model).__name__ == "LlamaForCausalLM"


class Watch(Callback, PruningEvents):
    def __init__(self):
        self.seen = []

    def on_pruning_start(self, trainer, pl_module):
        self.seen.append(("start", find_groups(pl_module.causal_lm)[0].num_units))

    def on_pruning_end(self, trainer, pl_module, plan):
        self.seen.append(("end", find_groups(pl_module.causal_lm)[0].num_units))
        self.pruned = pl_module.causal_lm(token_ids()).logits.detach()

    def on_train_start(self, trainer, pl_module):
        pl_module.eval()
        self.with_adapters = pl_module.causal_lm(token_ids()).logits.detach()
        pl_module.train()
        trainable = {n for n, p in pl_module.named_parameters() if p.requires_grad}
        self.seen.append(("train", all("lora_" in n for n in trainable)))
        optimized = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        assert optimized == {id(p) for p in pl_module.parameters() if p.requires_grad}
        assert pl_module.training


def test_lifecycle_and_adapters_that_start_as_the_identity(folder):
    watch = Watch()
    module, _ = fit(folder, callbacks=[watch])
    assert watch.seen == [("start", 24), ("end", module.plan.config["intermediate_size"]), ("train", True)]
    torch.testing.assert_close(watch.with_adapters, watch.pruned, atol=1e-6, rtol=0)


def test_merged_equals_unmerged(folder):
    module, _ = fit(folder, max_epochs=2)
    ids = token_ids()
    with torch.no_grad():
        before = module.eval().causal_lm(ids).logits
        merged = module.unwrap()
        after = merged.eval()(ids).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert not any("lora" in name for name, _ in merged.named_modules())


def test_without_lora_every_weight_trains(folder):
    module, _ = fit(folder, importance=TaylorImportanceCallback(pruning_ratio=0.2))
    dense = AutoModelForCausalLM.from_pretrained(folder)
    apply_plan(dense, module.plan)
    changed = [not torch.equal(a, b) for a, b in zip(module.model.parameters(), dense.parameters(), strict=True)]
    assert all(changed)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_adapters_can_be_kept_beside_the_pruned_base(folder, tmp_path):
    from peft import AutoPeftModelForCausalLM, PeftModel

    out = tmp_path / "out"
    report = ReportCallback(str(out), latency=False, merge_adapters=False)
    importance = TaylorImportanceCallback(pruning_ratio=0.2, recovery=LoraRecovery(rank=2))
    module = PruningModule(folder, learning_rate=1e-2)
    trainer(report, importance).fit(module, datamodule=data())
    base = AutoModelForCausalLM.from_pretrained(out / "model")
    dense = AutoModelForCausalLM.from_pretrained(folder)
    apply_plan(dense, module.plan)
    ids = token_ids()
    with torch.no_grad():
        plain = base.eval()(ids).logits
        torch.testing.assert_close(plain, dense.eval()(ids).logits, atol=1e-6, rtol=0)
        adapted = PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
    assert (adapted - plain).abs().max() > 1e-4
    with torch.no_grad():
        assert torch.equal(AutoPeftModelForCausalLM.from_pretrained(out / "adapter").eval()(ids).logits, adapted)
    card = (out / "adapter/README.md").read_text()
    assert "`../model`" in card
    assert "- budget: " in card
    assert report.stages["recovered"]["perplexity"]["value"] != report.stages["pruned"]["perplexity"]["value"]


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3", "gpt_neox", "gemma2", "llama_untied_bias"])
def test_other_architectures_go_the_same_way(name, tmp_path):
    folder = save_tiny(tmp_path / "dense", name)
    fit(folder, tmp_path / "out", datamodule=data(bos="always" if name == "gemma2" else "auto"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    budget = PruningPlan.load(tmp_path / "out").provenance["budget"]
    assert parameter_count(model) == budget["params"]


@pytest.mark.parametrize("objective", ["entropy", "cross_entropy"])
def test_module_objective_is_what_the_criterion_tests_calibrate(folder, objective):
    from tests.unit.criteria.test_criteria import calibrate

    importance = TaylorImportanceCallback(intermediate_size=10, criterion=WeightTaylor())
    datamodule = data(calibration_batch_size=2)
    module = PruningModule(folder, objective=objective, dtype="float64")
    trainer(importance).prune(module, datamodule=datamodule)
    batches = [batch["input_ids"] for batch in datamodule.calibration_dataloader()]
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, score in calibrate(dense, batches, WeightTaylor(), objective).scores().items():
        torch.testing.assert_close(importance.importance[name], score, atol=1e-12, rtol=1e-9)


def test_calibration_batches_limits_the_data(folder):
    module = PruningModule(folder)
    trainer(TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2)).prune(module, datamodule=data())
    assert module.plan.provenance["calibration"]["sequences"] == 2


class StopAfter(Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def test_convergence_is_watched(folder):
    importance = TaylorImportanceCallback(pruning_ratio=0.2, check_every=2)
    fit(folder, importance=importance, limit_train_batches=0, limit_val_batches=0)
    tokens, overlap = zip(*importance.convergence, strict=True)
    assert tokens == (32, 64, 96)  # of 6 sequences of 16 tokens
    assert overlap[-1] == 1.0
    assert all(0 < share <= 1 for share in overlap)


@pytest.mark.parametrize(("share", "sequences"), [(0.01, 3), (None, 6)])
def test_calibration_ends_when_the_kept_units_have_settled(folder, share, sequences):
    importance = TaylorImportanceCallback(pruning_ratio=0.2, check_every=1, early_stop_overlap=share)
    module, _ = fit(folder, importance=importance, limit_train_batches=0, limit_val_batches=0)
    calibration = module.plan.provenance["calibration"]
    assert (calibration["sequences"], calibration["settled"]) == (sequences, share is not None)
    expected = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=sequences)
    other, _ = fit(folder, importance=expected, limit_train_batches=0, limit_val_batches=0)
    assert module.plan.keep == other.plan.keep  # what was seen decides, nothing else


@pytest.mark.parametrize(
    "settings", [{"early_stop_overlap": 1.5}, {"early_stop_overlap": 0.9, "check_every": None}, {"check_every": 0}]
)
def test_settings_of_the_look_are_checked(settings):
    with pytest.raises(ConfigError, match="^(early_stop_overlap|check_every)="):
        TaylorImportanceCallback(pruning_ratio=0.2, **settings)


@pytest.mark.parametrize("criterion", [Magnitude(), Random(seed=3)])
def test_criteria_of_weights_need_no_calibration(folder, criterion, monkeypatch):
    monkeypatch.setattr(PruningModule, "calibration_step", None)
    importance = TaylorImportanceCallback(pruning_ratio=0.2, criterion=criterion)
    module, _ = fit(folder, importance=importance, limit_train_batches=0, limit_val_batches=0)
    provenance = module.plan.provenance
    assert (provenance["calibration"], provenance["objective"]) == (None, None)
    assert provenance["criterion"] == criterion.describe()
    dense = AutoModelForCausalLM.from_pretrained(folder)
    scores = weight_scores(dense, find_groups(dense), criterion)
    width = provenance["budget"]["width"]
    for group in find_groups(dense):
        assert set(module.plan.keep[group.name]) == set(scores[group.name].argsort(descending=True)[:width].tolist())


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_resume_in_the_middle_of_recovery(folder, tmp_path):
    """An interrupted run, resumed from its checkpoint, ends as one that was not interrupted."""
    lora = LoraRecovery(rank=2, dropout=0.0)
    again = {"importance": TaylorImportanceCallback(pruning_ratio=0.2, recovery=lora or "full")}
    straight, _ = fit(
        folder, max_epochs=2, importance=TaylorImportanceCallback(pruning_ratio=0.2, recovery=lora or "full")
    )
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    # max_epochs shapes the learning-rate schedule, so the run is stopped after its first epoch, not shortened
    fit(folder, tmp_path / "out", callbacks=[checkpoint, StopAfter(1)], max_epochs=2, **again)
    stored = torch.load(tmp_path / "ckpt/last.ckpt", weights_only=True)["callbacks"]["ReportCallback"]["time"]
    again = {"importance": TaylorImportanceCallback(pruning_ratio=0.2, recovery=lora or "full")}
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    ckpt_path = str(tmp_path / "ckpt/last.ckpt")
    resumed, runner = fit(folder, tmp_path / "out", callbacks=[checkpoint], max_epochs=2, ckpt_path=ckpt_path, **again)
    assert runner.global_step == 6
    assert resumed.plan.keep == straight.plan.keep
    straight.unwrap()
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))
    assert resumed.plan.provenance["calibration"] == straight.plan.provenance["calibration"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert list(report["stages"]) == ["dense", "pruned", "recovered"]
    assert report["seconds"] > stored["seconds"]
    assert report["timing"]["calibrating"] == stored["timing"]["calibrating"] > 0  # only the first attempt calibrated


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_resuming_with_another_budget_is_refused(folder, tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True)
    fit(folder, callbacks=[checkpoint])
    other = TaylorImportanceCallback(pruning_ratio=0.3, recovery=LoraRecovery(rank=2))
    with pytest.raises(ConfigError, match="budget pruning_ratio=0.2 -> pruning_ratio=0.3"):
        fit(folder, importance=other, callbacks=[checkpoint], ckpt_path=str(tmp_path / "ckpt/last.ckpt"), max_epochs=2)


def test_fitting_a_pruned_module_again_just_trains_on(folder):
    importance = TaylorImportanceCallback(pruning_ratio=0.2, recovery=LoraRecovery(rank=2))
    module, _ = fit(folder, importance=importance)
    keep = module.plan.keep
    again, runner = fit(folder, module=module, importance=importance)
    assert runner.global_step == 3
    assert again.plan.keep == keep


def test_report_without_pruning_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="ReportCallback needs a callback that prunes"):
        trainer(ReportCallback(str(tmp_path / "out"))).fit(PruningModule(folder), datamodule=data())


def test_exploded_perplexity_is_said_loudly(folder, tmp_path, caplog):
    report = ReportCallback(str(tmp_path / "out"), latency=False)
    runner = trainer(report, TaylorImportanceCallback(pruning_ratio=0.2))

    def inflate(trainer, pl_module):
        report.stages["dense"]["perplexity"]["value"] /= 1000

    original = report.on_pruning_start
    report.on_pruning_start = lambda t, m: (original(t, m), inflate(t, m))
    with pytest.warns(UserWarning, match="PERPLEXITY EXPLODED"):
        runner.prune(PruningModule(folder), datamodule=data())
    assert "PERPLEXITY EXPLODED" in caplog.text
    assert "EXPLODED" in json.loads((tmp_path / "out/report.json").read_text())["warnings"][0]


# ---- bad input ----------------------------------------------------------------------------------------------------------


def untouched(module):
    return module.model is None


def test_impossible_budget_is_refused_before_the_model_is_loaded(folder):
    module = PruningModule(folder)
    with pytest.raises(ConfigError, match="largest possible `pruning_ratio`"):
        fit(folder, module=module, importance=TaylorImportanceCallback(pruning_ratio=0.9))
    assert untouched(module)


def test_unknown_architecture_is_refused_before_the_model_is_loaded(tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"vocab_size": 61, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(**sizes, intermediate_size=16, is_decoder=True)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    module = PruningModule(str(tmp_path))
    with pytest.raises(UnsupportedArchitectureError, match=r"BertLMHeadModel.*none could be derived: .*register"):
        fit(None, module=module)
    assert untouched(module)


def test_nan_weights_are_named(tmp_path):
    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    folder = save_tiny(tmp_path / "m")
    model.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        fit(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failing_calibration_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        PruningModule, "calibration_step", lambda *a: (_ for _ in ()).throw(CalibrationError("gone wrong"))
    )
    with pytest.raises(CalibrationError, match="Calibration sequence 0: gone wrong"):
        fit(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_already_pruned_model_is_refused_unless_asked(folder, tmp_path):
    fit(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"already pruned \(pruning_ratio=0.2\).*allow_pruned=True"):
        PruningModule(str(tmp_path / "out/model"))
    module, _ = fit(None, module=PruningModule(str(tmp_path / "out/model"), allow_pruned=True))
    assert module.plan.provenance["budget"]["dense_params"] < parameter_count(tiny())


def test_other_modules_strategies_and_data_are_refused(folder):
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

    importance = TaylorImportanceCallback(pruning_ratio=0.2)
    with pytest.raises(ConfigError, match="BoringModel holds no supported Hugging Face model.*Neurons"):
        fit(None, module=BoringModel(), importance=importance)
    with pytest.raises(ConfigError, match="no calibration_dataloader.*calibration_batches=N"):
        fit(folder, importance=importance, datamodule=BoringDataModule())
    with pytest.raises(ConfigError, match="prune needs a callback that prunes before training"):
        trainer().prune(PruningModule(folder), datamodule=data())


def test_lora_target_that_matches_nothing_is_an_error(folder):
    lora = LoraRecovery(target_modules=["q_proj", "gate_up"])
    with pytest.raises(ConfigError, match=r"'gate_up' matches no projection.*gate_proj"):
        fit(folder, importance=TaylorImportanceCallback(pruning_ratio=0.2, recovery=lora or "full"))
