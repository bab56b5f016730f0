"""Every kind of criterion in a fit: what is run, what is refused, what a resumed run takes up."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from hfprune import Neurons, PruneTrainer, PruningModule, TaylorImportanceCallback, WeightTaylor
from hfprune.criteria import (
    ActivationNorm,
    CoupledTaylor,
    Fisher,
    Magnitude,
    SelfDistillation,
    SlimLLMChannels,
    SlimLLMHeads,
    VectorTaylor,
    WandaStructured,
)
from hfprune.io.load import load_causal_lm
from hfprune.models import find_groups
from hfprune.models.forward import sequences
from hfprune.utils.errors import ConfigError
from tests.helpers.foreign import FineTuner, ManualFineTuner
from tests.helpers.models import save_tiny
from tests.helpers.ragged import LENGTHS, RaggedData
from tests.helpers.stops import Stop, StopInCalibration
from tests.helpers.toys import calibrate

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "max_epochs": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def prune(folder, criterion, *layout, checkpoints=None, ckpt_path=None, dtype="float32", **kwargs):
    """Prunes by the callback; returns scores and plan."""
    importance = TaylorImportanceCallback(pruning_ratio=0.2, criterion=criterion, checkpoint_every=1, **kwargs)
    saving = [ModelCheckpoint(dirpath=checkpoints)] if checkpoints else []
    trainer = PruneTrainer(**QUIET, callbacks=[importance, *saving], enable_checkpointing=bool(saving))
    module = PruningModule(folder, dtype=dtype)
    trainer.prune(module, RaggedData(*layout), ckpt_path=ckpt_path)
    return importance.importance, module.plan


CRITERIA = [WandaStructured(), Fisher(), CoupledTaylor(), VectorTaylor(), WeightTaylor(gradient="dataset")]


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: "-".join(c.describe().values()))
def test_batches_padding_and_packing_make_no_difference(folder, criterion):
    """To the last bit where rows are all that is summed; moments are run in the same order here, so they agree too."""
    expected, plan = prune(folder, criterion, 3, "left")
    found, other = prune(folder, criterion, 8, "packed")
    assert other.keep == plan.keep
    assert all(torch.equal(found[name], score) for name, score in expected.items())
    provenance = plan.provenance
    assert provenance["criterion"] == criterion.describe()
    assert provenance["calibration"]["sequences"] == len(LENGTHS)


def test_forward_criteria_are_those_of_the_accumulator_and_differentiate_nothing(folder, monkeypatch):
    monkeypatch.setattr(PruningModule, "calibration_step", None)
    found, plan = prune(folder, ActivationNorm(), 4, "left")
    model = load_causal_lm(folder, dtype="float32")
    batches = [s for batch in RaggedData(4, "left").calibration_dataloader() for s in sequences(batch)]
    expected = calibrate(model, ActivationNorm(), groups=find_groups(model), batches=batches)
    assert all(torch.equal(found[name], score) for name, score in expected.items())
    assert plan.provenance["objective"] is None
    assert plan.provenance["calibration"]["mean_objective_nats"] is None
    assert plan.provenance["calibration"]["tokens"] == sum(LENGTHS)


def test_fisher_brings_its_own_objective(folder):
    _, plan = prune(folder, Fisher())
    assert plan.provenance["objective"] == "sampled"
    _, plan = prune(folder, Fisher(), objective="cross_entropy")
    assert plan.provenance["objective"] == "cross_entropy"


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"criterion": ActivationNorm(), "objective": "entropy"}, "ActivationNorm reads activations .* no objective"),
        ({"criterion": Magnitude(), "objective": "entropy"}, "Magnitude reads weights alone"),
        ({"criterion": Fisher(), "objective": "entropy"}, "not 'entropy'"),
        (
            {"criterion": Magnitude(), "self_distillation": SelfDistillation()},
            "reads gradients of any objective, .*; Magnitude does not",
        ),
        ({"self_distillation": SelfDistillation(), "objective": "entropy"}, "remove objective="),
    ],
)
def test_impossible_combinations_are_refused_at_once(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        TaylorImportanceCallback(pruning_ratio=0.2, **kwargs)


def test_sums_too_large_to_be_looked_at_are_not(folder):
    _, plan = prune(folder, SlimLLMChannels(), check_every=1)
    assert plan.provenance["calibration"]["convergence"] == []
    with pytest.raises(ConfigError, match="early_stop_overlap cannot be used with SlimLLMChannels"):
        prune(folder, SlimLLMChannels(), check_every=1, early_stop_overlap=0.9)
    with pytest.raises(ConfigError, match="kind 'mlp'"):
        prune(folder, SlimLLMHeads())


# ---- self-distillation ---------------------------------------------------------------------------------------------


def distilled_plan(folder, **kwargs):
    return prune(
        folder,
        CoupledTaylor(),
        3,
        "left",
        dtype="float64",
        self_distillation=SelfDistillation(first_stage=0.1),
        **kwargs,
    )


@pytest.fixture(scope="module")
def distilled(folder):
    return distilled_plan(folder)


def test_distillation_prunes_what_the_first_stage_masked_and_says_so(folder, distilled):
    scores, plan = distilled
    first, _ = prune(folder, CoupledTaylor(), 3, "left", dtype="float64", objective="cross_entropy")
    for group in plan.groups:
        lowest = first[group.name].argsort()[: group.num_units - int(group.num_units * 0.9)].tolist()
        assert scores[group.name][lowest].tolist() == [0.0] * len(lowest)
        assert not set(lowest) & set(plan.keep[group.name])
        assert (scores[group.name] > 0).sum() == group.num_units - len(lowest)
    assert plan.provenance["distillation"] == {"alpha": 0.4, "temperature": 0.2, "first_stage": 0.1}
    assert plan.provenance["objective"] == "distillation (alpha 0.4, temperature 0.2)"


DISTILLED = (
    r"calibrated with other settings: self_distillation "
    r"SelfDistillation\(alpha=0.4, temperature=0.2, first_stage=0.1\) -> none\. Resume"
)


@pytest.mark.parametrize("after", [4, len(LENGTHS) + 5])
def test_distillation_is_taken_up_in_either_stage(folder, tmp_path, monkeypatch, distilled, after):
    stop = StopInCalibration(monkeypatch, after)
    with pytest.raises(Stop):
        distilled_plan(folder, checkpoints=tmp_path)
    path = str(tmp_path / "last-pruning.ckpt")
    with pytest.raises(ConfigError, match=DISTILLED):
        prune(folder, CoupledTaylor(), 3, "left", dtype="float64", objective="cross_entropy", ckpt_path=path)
    found, plan = distilled_plan(folder, ckpt_path=path)
    assert stop.count == 2 * len(LENGTHS)  # nothing was run twice
    assert plan.keep == distilled[1].keep
    assert all(torch.equal(found[name], score) for name, score in distilled[0].items())


def test_a_first_stage_below_the_budget_is_refused(folder):
    with pytest.raises(ConfigError, match="fewer than the"):
        prune(folder, CoupledTaylor(), self_distillation=SelfDistillation(first_stage=0.9))


# ---- modules of one's own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [FineTuner, ManualFineTuner])
def test_a_module_of_ones_own_needs_no_loss_for_a_forward_pass(make):
    module = make()
    importance = TaylorImportanceCallback(pruning_ratio=0.2, criterion=ActivationNorm(), calibration_batches=2)
    trainer = PruneTrainer(**QUIET, callbacks=[importance], enable_checkpointing=False, limit_train_batches=2)
    trainer.fit(module)
    assert all(score.min() > 0 for score in importance.importance.values())


def test_described_neurons_are_read_in_training_steps():
    class Net(FineTuner):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

        def training_step(self, batch, batch_idx):
            return self.net(batch.float()).square().mean()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.arange(32.0).reshape(8, 4) / 16, batch_size=2)

    module = Net()
    importance = TaylorImportanceCallback(
        pruning_ratio=0.2, criterion=ActivationNorm(), neurons=[Neurons("net.0", "net.2")], calibration_batches=4
    )
    inputs = torch.arange(32.0).reshape(8, 4) / 16
    with torch.no_grad():
        expected = module.net[1](module.net[0](inputs)).square().sum(0).div(4).sqrt()
    PruneTrainer(**QUIET, callbacks=[importance], enable_checkpointing=False, limit_val_batches=0).fit(module)
    torch.testing.assert_close(importance.importance["net.2"], expected.double(), rtol=1e-5, atol=0)
