"""LightningModules of somebody else are pruned by adding the callback, and nothing else."""

import copy

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from hfprune import ActivationTaylor, LoraRecovery, Neurons, PruningPlan, TaylorImportanceCallback, apply_plan
from hfprune.models import find_groups, parameter_count
from hfprune.models.surgery import mask_plan
from hfprune.utils.errors import ConfigError, HFPruneError
from tests.helpers.foreign import (
    Classifier,
    FineTuner,
    LateFineTuner,
    ManualFineTuner,
    NanoGPT,
    PointData,
    TokenData,
    VisionTransformer,
    images,
    shifted,
)
from tests.helpers.models import tiny, token_ids
from tests.helpers.stops import Stop, StopAt
from tests.unit.criteria.test_criteria import calibrate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*num_workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def trainer(*callbacks, tmp_path=None, **kwargs):
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "enable_progress_bar": False, "logger": False}
    defaults |= {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    return Trainer(callbacks=list(callbacks), enable_model_summary=False, **defaults | kwargs)


class Watch(Callback):
    """Remembers the losses of training, and that the optimizer holds the module's parameters."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses.append(float(loss if isinstance(loss, torch.Tensor) else outputs["loss"]))

    def on_train_start(self, trainer, pl_module):
        held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
        assert held == {id(p) for p in pl_module.parameters()}
        assert all(p.requires_grad for p in pl_module.parameters())
        assert pl_module.training


MLP = [Neurons("net.0", "net.3"), Neurons("net.3", "net.5")]
VIT = [Neurons("encoder.*.mlp.0", "encoder.*.mlp.3")]
GPT = [Neurons("transformer.h.*.mlp.c_fc", "transformer.h.*.mlp.c_proj")]
FOREIGN = {
    "classifier": (Classifier, MLP, lambda: DataLoader(PointData(), batch_size=16, shuffle=True)),
    "vit": (VisionTransformer, VIT, lambda: DataLoader(images(), batch_size=8)),
    "nanogpt": (NanoGPT, GPT, lambda: DataLoader(shifted(), batch_size=8)),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_module_without_hugging_face_model(name):
    kind, neurons, loader = FOREIGN[name]
    module = kind()
    dense = parameter_count(module)
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=3, neurons=neurons)
    watch = Watch()
    trainer(importance, watch).fit(module, loader())
    assert parameter_count(module) == importance.resolved.params
    largest_unit = max(dense / sum(importance.resolved.dense_widths), 2 * 48)
    assert abs(parameter_count(module) - 0.8 * dense) <= largest_unit * len(importance.resolved.widths)
    assert len(watch.losses) == 2 * len(loader())
    assert sum(watch.losses[-3:]) < sum(watch.losses[:3])


@pytest.mark.parametrize("name", FOREIGN)
def test_pruned_module_computes_what_masking_gives(name):
    kind, neurons, loader = FOREIGN[name]
    module = kind().double()
    masked = copy.deepcopy(module).eval()
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2, neurons=neurons)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    trainer(importance, limit_train_batches=0, precision="64-true").fit(module, loader())
    torch.set_default_dtype(dtype)
    mask_plan(masked, module._hfprune["plan"])
    inputs = next(iter(loader()))[0]
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    torch.testing.assert_close(module.eval()(inputs), masked(inputs), atol=1e-12, rtol=0)


def test_hugging_face_model_inside_with_everything_beside(tmp_path):
    """Own losses, logs, schedule, EMA, early stopping, learning-rate monitor and checkpoints."""
    module = FineTuner()
    callbacks = [
        TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=3),
        EarlyStopping("val/loss", patience=5),
        LearningRateMonitor(),
        EMAWeightAveraging(decay=0.5),
        ModelCheckpoint(dirpath=tmp_path / "ckpt", monitor="val/loss", save_last=True),
        Watch(),
    ]
    runner = trainer(*callbacks, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    runner.fit(module)
    lm = module.net["lm"]
    assert {g.num_units for g in find_groups(lm)} == {lm.config.intermediate_size} == {14}
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    steps = [line for line in lines if "train/loss" in lines[0]]
    assert runner.global_step == 12
    assert len(steps) > 12  # every training step and nothing of calibration: each logged step has a global step
    lm.save_pretrained(tmp_path / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    ids = token_ids()
    torch.testing.assert_close(reloaded(ids).logits, lm.eval()(ids).logits, atol=1e-6, rtol=0)
    again = FineTuner()
    callbacks[0] = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=3)
    callbacks[3], callbacks[5] = EMAWeightAveraging(decay=0.5), Watch()
    callbacks[4] = ModelCheckpoint(dirpath=tmp_path / "ckpt", monitor="val/loss", save_last=True)
    resumed = trainer(*callbacks, max_epochs=2, logger=CSVLogger(tmp_path, name="resumed", version=""))
    resumed.fit(again, ckpt_path=str(tmp_path / "ckpt/last.ckpt"))
    assert again.net["lm"].config.intermediate_size == 14


def test_loss_of_training_step_is_the_cross_entropy_criterion():
    """With one sequence a batch, the callback's scores are the CE Taylor scores of the criterion's own tests."""
    module = FineTuner().double()
    module.train_dataloader = lambda: DataLoader(TokenData(size=5), batch_size=1)
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=5)
    trainer(importance, limit_val_batches=0, precision="64-true", max_epochs=1).fit(module)
    batches = [ids[None] for ids in token_ids(5, 12)]
    dense = tiny(dtype=torch.float32, seed=1).double()
    expected = calibrate(dense, batches, ActivationTaylor(weighting="sequence"), "cross_entropy").scores()
    for name, score in expected.items():
        torch.testing.assert_close(importance.importance[name], score, atol=1e-9, rtol=1e-5)


def test_tokens_are_counted_whatever_the_objective_counts(caplog):
    """The loss of a ``training_step`` is one number per batch; batches without token ids are counted as batches."""
    module = FineTuner()
    module.train_dataloader = lambda: DataLoader(TokenData(size=6), batch_size=2)
    with caplog.at_level("INFO", logger="hfprune"):
        importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=3, check_every=1)
        trainer(importance, limit_val_batches=0, max_epochs=1).fit(module)
        assert "Calibrated on 72 tokens" in caplog.text
        assert [tokens for tokens, _ in importance.convergence] == [24, 48, 72]
        kind, neurons, loader = FOREIGN["classifier"]
        module = kind()
        module.train_dataloader = loader
        chosen = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2, neurons=neurons)
        trainer(chosen, limit_val_batches=0, max_epochs=1).fit(module)
    assert "Calibrated on 2 batches" in caplog.text


@pytest.mark.parametrize("kind", [FineTuner, ManualFineTuner])
def test_entropy_needs_no_training_step(kind):
    """`objective="entropy"` reads the logits: the same kept units for automatic and manual optimization."""
    module = kind()
    watch = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=4, objective="entropy")
    runner = trainer(watch)
    runner.fit(module)
    assert module.net["lm"].config.intermediate_size == 14
    assert module._hfprune["plan"].provenance["calibration"]["tokens"] == 4 * 4 * 12
    assert runner.global_step == 12


def test_model_made_in_configure_model(tmp_path):
    module = LateFineTuner()
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2)
    trainer(importance, ModelCheckpoint(dirpath=tmp_path, save_last=True)).fit(module)
    assert module.net["lm"].config.intermediate_size == 14
    again = LateFineTuner()
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2)
    trainer(importance).fit(again, ckpt_path=str(tmp_path / "last.ckpt"))
    assert again._hfprune["plan"].keep == module._hfprune["plan"].keep


def test_unlabelled_batches_of_ids():
    module = FineTuner()
    module.train_dataloader = lambda: DataLoader(token_ids(8, 12), batch_size=2)
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=4, objective="entropy")

    class NoTraining(Callback):
        def on_train_start(self, trainer, pl_module):
            raise Stop

    with pytest.raises(Stop):
        trainer(importance, NoTraining()).fit(module)
    assert module.net["lm"].config.intermediate_size == 14


def test_lora_in_a_module_of_ones_own():
    module = FineTuner()
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2, recovery=LoraRecovery(rank=2))
    trainer(importance).fit(module)
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert any(p.any() for name, p in module.named_parameters() if "lora_B" in name)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_adapters_of_ones_own_module_are_saved_with_their_base(tmp_path):
    from peft import AutoPeftModelForCausalLM

    module = FineTuner()
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2, recovery=LoraRecovery(rank=2))
    trainer(importance).fit(module)
    model = module.net["lm"].eval()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(input_ids=token_ids()).logits
        torch.testing.assert_close(again(input_ids=token_ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "adapter/base/plan.json").is_file()


def described(model, producers, consumer, **kwargs):
    """Prunes a Hugging Face model in a module of one's own by neurons that are described."""

    class Own(FineTuner):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.ModuleDict({"lm": model.train()})

    module = Own()
    neurons = [Neurons([f"net.lm.{name}" for name in producers], f"net.lm.{consumer}")]
    trainer(TaylorImportanceCallback(neurons=neurons, calibration_batches=2, **kwargs), max_epochs=1).fit(module)
    return model.eval()


LLAMA = (["model.layers.*.mlp.gate_proj", "model.layers.*.mlp.up_proj"], "model.layers.*.mlp.down_proj")


@pytest.mark.parametrize(
    ("name", "names"),
    [("llama", LLAMA), ("gpt2", (["transformer.h.*.mlp.c_fc"], "transformer.h.*.mlp.c_proj"))],
)
def test_described_neurons_of_a_hugging_face_model_change_its_config(name, names, tmp_path):
    model = described(tiny(name, dtype=torch.float32), *names, pruning_ratio=0.1)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)
    dense = tiny(name, dtype=torch.float32)
    apply_plan(dense, PruningPlan.load(tmp_path))  # its names are those of the model, not of the module around it
    shapes = {key: tensor.shape for key, tensor in dense.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in model.state_dict().items()}


def test_described_neurons_that_no_config_states_are_warned_of():
    only = [name.replace("*", "1") for name in LLAMA[0]]
    with pytest.warns(UserWarning, match=r"No config of LlamaForCausalLM describes .* from_pretrained cannot load"):
        described(tiny(dtype=torch.float32), only, LLAMA[1].replace("*", "1"), pruning_ratio=0.05)


def test_optimizer_state_of_survivors_is_kept(tmp_path):
    """A run trained dense, then resumed with the callback: moments of kept neurons go on, cut like their weights."""
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    with pytest.raises(Stop):
        trainer(checkpoint, StopAt(6), max_epochs=2).fit(FineTuner())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    module, seen = FineTuner(), {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            names = {id(p): name for name, p in pl_module.named_parameters()}
            for p, state in trainer.optimizers[0].state.items():
                seen[names[id(p)]] = (state["exp_avg"].clone(), float(state["step"]))
                assert state["exp_avg"].shape == p.shape

    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2)
    runner = trainer(importance, Look(), max_epochs=2)
    runner.fit(module, ckpt_path=str(tmp_path / "last.ckpt"))
    assert runner.global_step == 12  # 6 dense, 6 pruned
    keep = torch.tensor(module._hfprune["plan"].keep["model.layers.1.mlp"])
    dense = [name for name, _ in FineTuner().named_parameters()]
    for name, axis in (("gate_proj", 0), ("down_proj", 1), ("up_proj", 0)):
        name = f"net.lm.model.layers.1.mlp.{name}.weight"
        before = saved["optimizer_states"][0]["state"][dense.index(name)]["exp_avg"]
        assert torch.equal(seen[name][0], before.index_select(axis, keep))
        assert seen[name][1] == 6


@pytest.mark.parametrize("name", ["classifier", "vit"])
def test_resume_in_the_middle_of_calibration_and_of_training(name, tmp_path, monkeypatch):
    from hfprune.pruning.accumulator import ImportanceAccumulator

    kind, neurons, _ = FOREIGN[name]
    data = PointData() if name == "classifier" else images()

    def fit(*extra, folder=None, **kwargs):
        torch.manual_seed(3)
        module = kind()
        for dropout in [m for m in module.modules() if isinstance(m, torch.nn.Dropout)]:
            dropout.p = 0.0  # Lightning does not restore the state of the random number generator
        importance = TaylorImportanceCallback(
            pruning_ratio=0.2, calibration_batches=3, neurons=neurons, checkpoint_every=1
        )
        saving = [ModelCheckpoint(dirpath=folder, save_last=True)] if folder else []
        trainer(importance, *saving, *extra).fit(module, DataLoader(data, batch_size=8), **kwargs)
        return module

    straight = fit()
    original, seen = ImportanceAccumulator.step, []

    def step(self, *args, **kwargs):
        if len(seen) == 2:
            raise Stop
        seen.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(ImportanceAccumulator, "step", step)
    with pytest.raises(Stop):
        fit(folder=tmp_path)
    monkeypatch.undo()
    assert torch.load(tmp_path / "last-pruning.ckpt", weights_only=True)["hfprune"]["calibration"]["position"] == 2
    epoch = len(data) // 8
    with pytest.raises(Stop):
        fit(StopAt(epoch), folder=tmp_path, ckpt_path="last")
    resumed = fit(folder=tmp_path, ckpt_path="last")
    assert resumed._hfprune["plan"].keep == straight._hfprune["plan"].keep
    for a, b in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)


class Decayed(FineTuner):
    """Another weight decay."""

    def configure_optimizers(self):
        found = super().configure_optimizers()
        found["optimizer"].param_groups[0]["weight_decay"] = 0.7
        return found


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (lambda: FineTuner(lr=2e-2), r"learning_rate \[0.0004\] -> \[0.0008\]"),
        (Decayed, r"weight_decay \[0.01\] -> \[0.7\]"),
    ],
)
def test_restored_optimizers_do_not_keep_old_settings_in_silence(tmp_path, changed, told):
    def fit(module, *others, ckpt_path=None):
        importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2)
        saving = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=1)
        trainer(importance, saving, *others).fit(module, ckpt_path=ckpt_path)

    with pytest.raises(Stop):
        fit(FineTuner(), StopAt(2))
    path = str(tmp_path / "last.ckpt")
    with pytest.raises(ConfigError, match=f"trained with other settings: {told}"):
        fit(changed(), ckpt_path=path)
    fit(FineTuner(), ckpt_path=path)


def test_validate_from_a_pruned_checkpoint(tmp_path):
    module = FineTuner()
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2)
    runner = trainer(importance, ModelCheckpoint(dirpath=tmp_path, save_last=True))
    runner.fit(module)
    (expected,) = runner.validate(module, verbose=False)
    fresh = FineTuner()
    found = trainer(TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2)).validate(
        fresh, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False
    )
    assert found == [expected]
    assert fresh.net["lm"].config.intermediate_size == 14


# ---- refusals -----------------------------------------------------------------------------------------------------------


def refuse(match, module=None, loader=None, error=ConfigError, **kwargs):
    importance = TaylorImportanceCallback(**{"pruning_ratio": 0.2, "calibration_batches": 2} | kwargs)
    with pytest.raises(error, match=match):
        trainer(importance).fit(module or Classifier(), loader or DataLoader(PointData(), batch_size=8))


def test_what_cannot_be_pruned_is_said():
    refuse("no supported Hugging Face model.*neurons=")
    refuse(
        "no module has the name 'net.1x'. Linear projections here: net.0, net.3", neurons=[Neurons("net.1x", "net.3")]
    )
    refuse("widths of producers and consumers differ", neurons=[Neurons("net.0", "net.5")])
    refuse("described twice", neurons=[Neurons("net.0", "net.3"), Neurons("net.0", "net.3")])
    refuse("ReLU is not supported", neurons=[Neurons("net.1", "net.3")], error=HFPruneError)
    refuse("largest possible `pruning_ratio`", neurons=MLP, pruning_ratio=0.999)
    refuse("the dense widths are 32, 48", neurons=MLP, pruning_ratio=None, intermediate_size=10)
    refuse("reads a Hugging Face model's logits", neurons=MLP, objective="entropy")
    refuse("requires a Hugging Face model", neurons=MLP, recovery=LoraRecovery())
    refuse("calibration_batches=N", neurons=MLP, calibration_batches=None)
    refuse("Unknown objective 'entropie'", FineTuner(), objective="entropie")
    refuse("uses manual optimization.*objective='entropy'", ManualFineTuner())
    refuse("reads token ids from the batch.*Found: Tensor", FineTuner(), objective="entropy")
    refuse("no module called 'lm'", FineTuner(), model="lm")


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_one_of_several_models_must_be_named():
    module = FineTuner()
    module.net["teacher"] = tiny(dtype=torch.float32, seed=2)
    refuse("several models: net.lm, net.teacher", module)
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2, model="net.lm")
    trainer(importance).fit(module)
    assert module.net["lm"].config.intermediate_size == 14
    assert module.net["teacher"].config.intermediate_size == 24
    assert not module.net["teacher"].training  # modes stay as the author set them
    assert module.net["lm"].training


def test_checkpoint_of_another_module_is_refused(tmp_path):
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2, neurons=MLP)
    loader = DataLoader(PointData(), batch_size=8)
    trainer(importance, ModelCheckpoint(dirpath=tmp_path, save_last=True)).fit(Classifier(), loader)
    importance = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2, neurons=VIT)
    with pytest.raises(ConfigError, match=r"written for Classifier \(fingerprint \w{16}\).*VisionTransformer \(fing"):
        trainer(importance).fit(VisionTransformer(), DataLoader(images()), ckpt_path=str(tmp_path / "last.ckpt"))
