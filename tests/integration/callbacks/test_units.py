"""Heads, whole layers and allocations in a fit, and on the command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import AutoModelForCausalLM

from hfprune import LoraRecovery, PruneTrainer, PruningModule, ReportCallback, TaylorImportanceCallback, TextDataModule
from hfprune.allocation import Explicit, GlobalRank, Protected, Uniform
from hfprune.callbacks.checks import check_strategy
from hfprune.callbacks.user_module import find_target
from hfprune.cli import main
from hfprune.compensation import LeastSquares
from hfprune.criteria import (
    ActivationNorm,
    Magnitude,
    Random,
    Reconstruction,
    SelfDistillation,
    VectorTaylor,
    WeightTaylor,
)
from hfprune.models import find_groups, parameter_count
from hfprune.utils.errors import ConfigError, UnsupportedArchitectureError
from tests.helpers.foreign import FineTuner
from tests.helpers.models import save_tiny, token_ids
from tests.helpers.runs import TINY_FLAGS

pytestmark = pytest.mark.usefixtures("undrawn")

ALL = ("mlp", "heads", "layers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prune(folder, *flags):
    return main(["prune", f"--model.path={folder}", "--output_dir=out", *TINY_FLAGS, *flags])


def fit(folder, importance, *callbacks, **kwargs):
    data = TextDataModule(
        seq_len=16,
        calibration_sequences=4,
        recovery_sequences=2,
        validation_sequences=1,
        eval_windows=2,
        eval_window=16,
    )
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = PruneTrainer(callbacks=[importance, *callbacks], accelerator="cpu", max_epochs=1, **off | kwargs)
    module = PruningModule(folder)
    trainer.fit(module, datamodule=data)
    return module


@pytest.mark.parametrize(
    ("units", "changed"),
    [
        (["mlp", "heads"], {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}),
        (["layers"], {"num_hidden_layers": 2, "intermediate_size": 24}),
        (["channels"], {"hidden_size": 12, "head_dim": 4, "intermediate_size": 24, "rms_norm_eps": 1e-6 * (16 / 12)}),
        (["mlp", "channels"], {"hidden_size": 12, "head_dim": 4, "intermediate_size": 21}),
    ],
)
def test_units_on_the_command_line(folder, here, units, changed):
    assert prune(folder, f"--importance.units={json.dumps(units)}", "--pruning_ratio=0.3") == 0
    report = json.loads(Path("out/report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained("out/model")
    assert parameter_count(model) == report["plan"]["budget"]["params"] < 0.8 * parameter_count_of(folder)
    assert {key: getattr(model.config, key) for key in changed} == changed
    assert report["plan"]["units"] == units
    assert f"units={'+'.join(units)}" in report["plan"]["budget"]["asked"]
    assert "nan" not in Path("out/report.html").read_text().lower().split("<svg")[0]


def parameter_count_of(folder):
    return parameter_count(AutoModelForCausalLM.from_pretrained(folder))


def test_allocation_from_yaml(folder, here):
    text = {"importance": {"units": ["mlp", "heads", "layers"], "allocation": {
        "class_path": "Protected", "init_args": {"first": 1, "last": 1, "allocation": {
            "class_path": "Explicit", "init_args": {"layers": [1]}}}}}}  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(text))
    assert prune(folder, "--config=run.yaml") == 0
    assert AutoModelForCausalLM.from_pretrained("out/model").config.num_hidden_layers == 2
    plan = json.loads(Path("out/plan.json").read_text())
    assert plan["provenance"]["allocation"]["name"] == "Protected"


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--pruning_ratio=0.2", "--importance.units=[neurons]"], "expected mlp or heads or experts or attention_sublayers"),
        (["--pruning_ratio=0.2", "--importance.allocation=GlobalRank"], "has one number for all layers"),
        (["--importance.allocation=Explicit", "--importance.allocation.mlp=[9, 8, 9]"], "different numbers of mlp neurons (8"),
        (["--pruning_ratio=0.2", "--importance.allocation=Explicit", "--importance.allocation.mlp=9"], "sets the widths itself"),
        (["--importance.allocation=Explicit", "--importance.allocation.heads=1"], "add 'heads' to --importance.units"),
        (["--pruning_ratio=0.9", '--importance.units=["mlp", "heads"]'], "largest possible --pruning_ratio is 0."),
        (["--pruning_ratio=0.2", "--importance.units=[channels]", "--importance.allocation=Protected"], "Uniform or Explicit"),
        (["--importance.allocation=Explicit", "--importance.allocation.channels=9", "--importance.units=[channels]"],
         "does not support a hidden size of 9; it supports multiples of 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_loaded(folder, here, capsys, monkeypatch, flags, match):
    monkeypatch.setattr(PruningModule, "configure_model", lambda self: pytest.fail("loaded"))
    assert prune(folder, *flags) == 2
    assert match.lower() in capsys.readouterr().err.lower()
    assert not Path("out").exists()


def test_head_counts_that_no_stock_config_states(tmp_path):
    folder = save_tiny(tmp_path / "dense", "llama_mha_relu")
    importance = TaylorImportanceCallback(units=("heads",), allocation=Explicit(heads=3))
    with pytest.raises(
        UnsupportedArchitectureError, match=r"does not support 3 key-value heads.*1, 2, 4.*layout='per_layer'"
    ):
        fit(folder, importance, ReportCallback(str(tmp_path / "out"), latency=False), limit_train_batches=0)
    module = fit(folder, importance, limit_train_batches=0)  # in memory it works
    assert [g.num_units for g in find_groups(module.model, ("heads",))] == [3] * 3
    assert "num_attention_heads" not in module.plan.config


@pytest.mark.parametrize("criterion", [None, WeightTaylor(), Magnitude(), Random()])
def test_layers_score_what_is_in_them(folder, criterion):
    importance = TaylorImportanceCallback(units=("layers",), allocation=Explicit(layers=1), criterion=criterion)
    fit(folder, importance, limit_train_batches=0)
    both = TaylorImportanceCallback(pruning_ratio=0.2, units=("mlp", "heads"), criterion=criterion)
    fit(folder, both, limit_train_batches=0)
    sums = [sum(float(s.sum()) for n, s in both.importance.items() if f".{i}." in n) for i in range(3)]
    torch.testing.assert_close(importance.importance["model.layers"], torch.tensor(sums, dtype=torch.float64))


def test_recovery_and_convergence_after_every_kind_of_surgery(folder):
    importance = TaylorImportanceCallback(
        pruning_ratio=0.5, units=ALL, recovery=LoraRecovery(rank=2), check_every=1, early_stop_overlap=1.0
    )
    module = fit(folder, importance)
    assert parameter_count(module.causal_lm) > importance.resolved.params  # with adapters
    assert not importance.resolved.provisional
    assert module.plan.removed_layers() == importance.resolved.removed_layers
    assert [k.kept for k in importance.resolved.kinds] == [(17, 17), (1, 1), (2,)]
    assert importance.convergence[-1][1] == 1.0
    assert all(0 <= share <= 1 for _, share in importance.convergence)


@pytest.mark.parametrize(
    "allocation", [GlobalRank(), Protected(first=1, last=1, allocation=GlobalRank(comparable="standard"))], ids=str
)
def test_layers_may_differ_in_memory(allocation):
    """A module of one's own trains on with what one ranking left of its heads and neurons."""
    module = FineTuner().double()
    dense = parameter_count(module.net["lm"])
    importance = TaylorImportanceCallback(
        pruning_ratio=0.2, units=("mlp", "heads"), allocation=allocation, calibration_batches=3
    )
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(accelerator="cpu", callbacks=[importance], max_epochs=1, **off).fit(module)
    assert parameter_count(module.net["lm"]) == importance.resolved.params
    assert abs(importance.resolved.params - 0.8 * dense) <= 3 * 16
    module.net["lm"].generate(token_ids(1, 5), max_new_tokens=2, pad_token_id=0)


def test_weights_are_fitted_for_heads_too(folder):
    settings = {"pruning_ratio": 0.25, "units": ("mlp", "heads")}
    plain = fit(folder, TaylorImportanceCallback(**settings), limit_train_batches=0)
    fitted = fit(folder, TaylorImportanceCallback(**settings, compensation=LeastSquares()), limit_train_batches=0)
    assert plain.plan.keep == fitted.plan.keep
    name = "model.layers.1.self_attn.o_proj.weight"
    assert not torch.equal(plain.model.get_parameter(name), fitted.model.get_parameter(name))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"compensation": LeastSquares(), "units": ("layers",)}, "Add 'mlp' or 'heads' to the units"),
        ({"criterion": Reconstruction(), "units": ALL}, "leave 'layers' out"),
        ({"criterion": Reconstruction(), "units": ("mlp", "mlp_sublayers")}, "leave 'mlp_sublayers' out"),
        ({"compensation": LeastSquares(), "units": ("channels",)}, "belong to all layers: leave 'channels' out"),
        ({"self_distillation": SelfDistillation(), "units": ("mlp", "channels")}, "leave 'channels' out"),
        ({"criterion": Reconstruction(), "allocation": GlobalRank()}, "needs all scores in advance"),
        ({"units": ALL, "allocation": GlobalRank()}, "cannot remove whole layers"),
    ],
)
def test_combinations_that_make_no_sense(folder, settings, match):
    with pytest.raises(ConfigError, match=match):
        fit(folder, TaylorImportanceCallback(pruning_ratio=0.2, **settings), limit_train_batches=0)


@pytest.mark.parametrize("criterion", [None, VectorTaylor(), ActivationNorm(), Magnitude()])
def test_channels_go_whatever_scores_them(folder, criterion):
    importance = TaylorImportanceCallback(
        pruning_ratio=0.4, units=("mlp", "layers", "channels"), criterion=criterion, recovery=LoraRecovery(rank=2)
    )
    module = fit(folder, importance)
    plan = module.plan
    assert module.model.config.hidden_size == len(plan.keep["channels"]) < 16
    order = importance.importance["channels"].argsort(descending=True, stable=True)
    assert sorted(order[: len(plan.keep["channels"])].tolist()) == list(plan.keep["channels"])


def test_channels_of_a_module_of_ones_own():
    """Every size goes in memory, whatever a stock config could state."""
    module = FineTuner().double()
    importance = TaylorImportanceCallback(
        units=("mlp", "channels"), allocation=Explicit(channels=13, mlp=9), calibration_batches=3
    )
    off = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(accelerator="cpu", callbacks=[importance], max_epochs=1, **off).fit(module)
    assert module.net["lm"].model.embed_tokens.weight.shape[1] == 13
    assert parameter_count(module.net["lm"]) == importance.resolved.params
    module.net["lm"].generate(token_ids(1, 5), max_new_tokens=2, pad_token_id=0)


def test_channels_are_refused_where_weights_are_gathered_layer_by_layer(folder):
    target = find_target(PruningModule(folder), objective=None, model=None, neurons=())
    target.units = ("mlp", "channels")
    trainer = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(
        ConfigError, match="units='channels' is not supported under ModelParallelStrategy.* Use a single device or DDP"
    ):
        check_strategy(trainer, target, Magnitude())


def test_a_share_takes_the_place_of_the_budget():
    with pytest.raises(ConfigError, match="leave out `pruning_ratio`"):
        TaylorImportanceCallback(pruning_ratio=0.2, allocation=Uniform(share=0.2))
    with pytest.raises(ConfigError, match="none was given"):
        TaylorImportanceCallback(allocation=Uniform())
