"""What the pruning callbacks share: names, members that trainer, report and command line use, events, constructors."""

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

import hfprune
from hfprune import (
    Budget,
    CalibrationOptions,
    LoraPruningCallback,
    LoraRecovery,
    PruneTrainer,
    PruningCallback,
    PruningEvents,
    PruningModule,
    SparsePruningCallback,
    StructuredPruningCallback,
    TaylorImportanceCallback,
    TextDataModule,
)
from hfprune.allocation import Explicit
from hfprune.criteria import ActivationNorm, ActivationTaylor, Magnitude, SelfDistillation
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny

OLD = {"SparsityCallback": SparsePruningCallback, "LoraPruneCallback": LoraPruningCallback}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def fit(folder, *callbacks, steps=2):
    settings = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_steps": steps}
    trainer = PruneTrainer(
        callbacks=list(callbacks), enable_model_summary=False, enable_checkpointing=False, **settings
    )
    data = TextDataModule(
        seq_len=16, batch_size=2, calibration_sequences=4, recovery_sequences=12, validation_sequences=1, eval_window=16
    )
    torch.manual_seed(0)
    module = PruningModule(folder)
    trainer.fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("name", OLD)
@pytest.mark.parametrize("home", ["hfprune", "hfprune.callbacks"])
def test_old_names_warn_and_mean_the_new_class(name, home):
    module = hfprune if home == "hfprune" else hfprune.callbacks
    with pytest.warns(FutureWarning, match=f"{name} is now .*{OLD[name].__name__}"):
        assert getattr(module, name) is OLD[name]


def test_old_names_are_class_paths():
    parser = ArgumentParser()
    parser.add_argument("--callback", type=Callback)
    args = ["--callback=hfprune.SparsityCallback", "--callback.method=magnitude", "--callback.sparsity=2:4"]
    with pytest.warns(FutureWarning, match="SparsityCallback is now"):
        callback = parser.instantiate_classes(parser.parse_args(args)).callback
    assert isinstance(callback, SparsePruningCallback)
    assert str(callback.sparsity) == "2:4"


def test_unknown_names_stay_unknown():
    with pytest.raises(AttributeError, match="no attribute 'SparseCallback'"):
        _ = hfprune.callbacks.SparseCallback


@pytest.mark.parametrize(
    ("make", "prunes", "before_training"),
    [
        (lambda: StructuredPruningCallback(0.2, criterion=Magnitude()), "units", True),
        (lambda: SparsePruningCallback(method="magnitude", sparsity=0.5), "weights", True),
        (lambda: LoraPruningCallback(pruning_ratio=0.2, lora=LoraRecovery(rank=2), units=("mlp",), every=1), "units",
         False),
    ],
)  # fmt: skip
def test_members_of_the_base(folder, make, prunes, before_training):
    callback = make()
    assert isinstance(callback, PruningCallback)
    assert (callback.prunes, callback.before_training) == (prunes, before_training)
    assert callback.plan is None
    resolved = callback.check(PruningModule(folder))
    expected = callback.expected_model(PruningModule(folder))
    assert (resolved is None) == (expected is None) == (prunes == "weights")
    module = fit(folder, callback, steps=5)
    assert callback.plan is module.plan is not None
    assert bool(callback.importance) == (prunes == "units")
    assert callback.describe()
    if resolved is not None:
        assert sum(p.numel() for p in expected.parameters()) == resolved.params == module.plan.provenance["budget"][
            "params"
        ]  # fmt: skip


def test_events_reach_every_listener_in_order(folder):
    class Listener(Callback, PruningEvents):
        def __init__(self):
            self.calls = []

        def on_pruning_start(self, trainer, pl_module):
            self.calls.append("start")

        def on_pruning_end(self, trainer, pl_module, plan):
            self.calls.append(("end", plan.groups[0].kind))

        def on_gradients_ready(self, trainer, pl_module):
            assert any(p.grad is not None for p in pl_module.parameters())
            self.calls.append("gradients")

    listener = Listener()
    fit(folder, StructuredPruningCallback(0.2, criterion=Magnitude()), listener)
    assert listener.calls == ["start", ("end", "mlp"), "gradients", "gradients"]


def test_grouped_and_flat_arguments_mean_the_same():
    flat = TaylorImportanceCallback(
        pruning_ratio=0.2, round_to=8, units=("mlp", "heads"), calibration_batches=3, exact=False, check_every=2,
        early_stop_overlap=0.9, checkpoint_every=None, rounds=2, schedule="linear",
    )  # fmt: skip
    grouped = StructuredPruningCallback(
        Budget(pruning_ratio=0.2, round_to=8),
        criterion=ActivationTaylor(),
        units=("mlp", "heads"),
        calibration=CalibrationOptions(
            batches=3, exact=False, check_every=2, early_stop_overlap=0.9, checkpoint_every=None, rounds=2,
            schedule="linear",
        ),
    )  # fmt: skip
    assert grouped.describe() == flat.describe()
    assert grouped.calibration == flat.calibration
    assert StructuredPruningCallback(0.2, criterion=Magnitude()).describe()["budget"] == "pruning_ratio=0.2"


def test_an_allocation_can_take_the_place_of_the_budget():
    allocation = Explicit(mlp=8)
    assert StructuredPruningCallback(criterion=ActivationNorm(), allocation=allocation).options.budget.allocated
    for budget in (0.2, Budget(target_params=1000)):
        with pytest.raises(ConfigError, match="leave out"):
            StructuredPruningCallback(budget, criterion=ActivationNorm(), allocation=allocation)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batches": 0}, "batches=0 must be positive"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 must be positive"),
        ({"check_every": -1}, "check_every=-1 must be positive"),
        ({"early_stop_overlap": 1.5}, "early_stop_overlap=1.5 must be a share"),
        ({"early_stop_overlap": 0.9, "check_every": None}, "requires `check_every`"),
        ({"rounds": 2, "self_distillation": SelfDistillation()}, "both calibrate more than once"),
    ],
)
def test_calibration_options_name_the_argument(options, text):
    with pytest.raises(ConfigError, match=text):
        CalibrationOptions(**options)


@pytest.mark.parametrize("name", ["calibration_batches", "check_every", "checkpoint_every"])
def test_flat_arguments_are_named_as_given(name):
    with pytest.raises(ConfigError, match=f"^{name}=0 must be positive"):
        TaylorImportanceCallback(pruning_ratio=0.2, **{name: 0})
