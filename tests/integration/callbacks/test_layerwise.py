"""Closed-form compensation and layer-by-layer selection within fit, as users reach them."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from hfprune import LoraRecovery, Neurons, PruningModule, TaylorImportanceCallback, apply_plan
from hfprune.allocation import Sensitivity
from hfprune.compensation import LeastSquares, MeanCompensation, OutputRegression
from hfprune.criteria import Magnitude, Reconstruction, SlimLLMChannels, SlimLLMHeads
from hfprune.io.load import load_causal_lm
from hfprune.models.forward import sequences
from hfprune.pruning.layerwise import LayerwisePass
from hfprune.utils.errors import ConfigError
from tests.helpers.foreign import Classifier, FineTuner
from tests.helpers.models import save_tiny
from tests.integration.callbacks.test_fit import data, fit, trainer
from tests.integration.distributed.runs import equal, run, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def importance(**kwargs):
    return TaylorImportanceCallback(**{"pruning_ratio": 0.2, "compensation": LeastSquares()} | kwargs)


def by_hand(folder, module, compensation):
    """The pass over the calibration data, then surgery, without Lightning."""
    found, source = data(), PruningModule(folder)
    found.bind(source.tokenizer, vocab_size=source.vocab_size, max_positions=source.max_positions)
    batches = [sequence for batch in found.calibration_dataloader() for sequence in sequences(batch)]
    model, plan = load_causal_lm(folder).eval(), module.plan
    LayerwisePass(model, plan.groups, compensation=compensation).run(batches, plan.widths(), keep=plan.keep)
    apply_plan(model, plan)
    return model


@pytest.mark.parametrize("compensation", [LeastSquares(damping=0.1), OutputRegression(target="dense")])
def test_fit_compensates_and_exports(folder, tmp_path, compensation):
    module, _ = fit(folder, tmp_path / "out", importance=importance(compensation=compensation), limit_train_batches=0)
    expected = by_hand(folder, module, compensation)
    for (name, value), other in zip(module.model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other), name
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out/model").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in module.model.state_dict().items())
    provenance = json.loads((tmp_path / "out/plan.json").read_text())["provenance"]
    assert provenance["compensation"] == compensation.describe()


def test_compensation_needs_no_gradients(folder):
    """A criterion of the weights alone, and the calibration data for the fit."""
    module, _ = fit(folder, importance=importance(criterion=Magnitude()), limit_train_batches=0)
    plain, _ = fit(folder, importance=importance(criterion=Magnitude(), compensation=None), limit_train_batches=0)
    assert module.plan.keep == plain.plan.keep
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(module.model.get_parameter(name), plain.model.get_parameter(name))


def test_units_chosen_layer_by_layer(folder):
    callback = importance(criterion=Reconstruction(damping=0.01))
    module, _ = fit(folder, importance=callback, limit_train_batches=0)
    plan = module.plan
    assert set(callback.importance) == {group.name for group in plan.groups}
    assert len(set(plan.widths().values())) == 1
    plain, _ = fit(folder, importance=importance(compensation=None), limit_train_batches=0)
    assert plan.keep != plain.plan.keep


def test_resume_between_pruning_and_recovery_keeps_the_fitted_weights(tmp_path, folder):
    undisturbed = run(folder, tmp_path / "a", "single", compensation={"damping": 0.1})
    run_until = {"compensation": {"damping": 0.1}, "die": ["pruned", 0]}
    start(folder, tmp_path / "b", "single", **run_until)
    resumed = run(folder, tmp_path / "b", "single", compensation={"damping": 0.1}, ckpt_path="last")
    assert equal(resumed[0]["weights"], undisturbed[0]["weights"])
    plain = run(folder, tmp_path / "c", "single")
    assert not equal(plain[0]["weights"], undisturbed[0]["weights"])


def test_two_processes_fit_the_same_weights(tmp_path, folder):
    alone = run(folder, tmp_path / "a", "single", compensation={"damping": 0.1}, prune_only=True)[0]
    ranks = run(folder, tmp_path / "b", "ddp", compensation={"damping": 0.1}, prune_only=True)
    assert equal(ranks[0]["weights"], ranks[1]["weights"])
    assert ranks[0]["keep"] == alone["keep"]
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], weight, atol=1e-12, rtol=1e-10)


def test_refused_under_a_sharded_strategy(tmp_path, folder):
    errors = start(folder, tmp_path, "fsdp2", compensation={"damping": 0.1}, fails=True)
    assert "LeastSquares runs layer by layer" in errors


def test_fits_the_model_inside_a_module_of_ones_own():
    module, dense = FineTuner(lr=1e-12), FineTuner()
    callback = TaylorImportanceCallback(pruning_ratio=0.2, calibration_batches=2, compensation=LeastSquares())
    trainer(callback, limit_train_batches=1, limit_val_batches=0).fit(module)
    plan = module._hfprune["plan"]
    for group in plan.groups:
        (part,) = group.inputs()
        weight, before = (m.net["lm"].get_submodule(part.module).weight for m in (module, dense))
        kept = before[:, list(plan.keep[group.name])]
        assert weight.shape == kept.shape
        assert (weight - kept).abs().max() > 1e-3


def test_refused_without_a_known_model():
    module = Classifier()
    callback = importance(neurons=[Neurons("net.0", "net.3")], calibration_batches=2)
    with pytest.raises(ConfigError, match="requires a Hugging Face model of a supported architecture"):
        trainer(callback).fit(module)


def test_mean_compensation_takes_up_the_plain_mean(tmp_path):
    """Of the inputs that the pruned layers before give, every token alike."""
    folder = save_tiny(tmp_path / "opt", "opt")
    module, _ = fit(folder, importance=importance(compensation=MeanCompensation()), limit_train_batches=0)
    found, dense = data(), load_causal_lm(folder).eval()
    found.bind(module.tokenizer, vocab_size=module.vocab_size, max_positions=module.max_positions)
    group = module.plan.groups[0]
    name = group.inputs()[0].module
    seen = []
    hook = dense.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in found.calibration_dataloader():
            for sequence in sequences(batch):
                dense(input_ids=sequence["input_ids"])
    hook.remove()
    gone = module.plan.removed(group)
    before, after = dense.get_submodule(name), module.model.get_submodule(name)
    expected = before.bias.double() + before.weight[:, gone].double() @ torch.cat(seen)[:, gone].double().mean(0)
    torch.testing.assert_close(after.bias.double(), expected, atol=1e-6, rtol=1e-5)


def test_refused_without_a_bias(folder, monkeypatch):
    monkeypatch.setattr(PruningModule, "configure_model", None)  # nothing was loaded
    with pytest.raises(ConfigError, match=r"requires projections with a bias; model\.layers\.0\.mlp\.down_proj has"):
        fit(folder, importance=importance(compensation=MeanCompensation()))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"criterion": SlimLLMHeads()}, "SlimLLMHeads"),
        ({"criterion": SlimLLMChannels(), "early_stop_overlap": 0.9}, "early_stop_overlap cannot be used with"),
        ({"allocation": Sensitivity(shares=[0.8]), "pruning_ratio": 0.4}, "largest possible `pruning_ratio`"),
    ],
)
def test_what_cannot_be_scored_or_reached_is_refused_before_anything_is_loaded(folder, monkeypatch, settings, match):
    monkeypatch.setattr(PruningModule, "configure_model", None)
    with pytest.raises(ConfigError, match=match):
        fit(folder, importance=importance(compensation=None, **settings))


def test_recovery_follows(folder, tmp_path):
    callback = importance(recovery=LoraRecovery(rank=2))
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True)
    module, runner = fit(folder, importance=callback, callbacks=[checkpoint])
    assert runner.global_step == 3
    again = PruningModule.load_from_checkpoint(tmp_path / "checkpoints/last.ckpt")
    assert equal(again.state_dict(), module.state_dict())


@pytest.mark.parametrize(("sequences", "warned"), [(1, True), (4, False)])
def test_a_fit_on_fewer_tokens_than_columns_is_warned_of(folder, sequences, warned, tmp_path, caplog):
    """16 tokens for 17 kept columns are fewer equations than unknowns; 64 are enough."""
    chosen = importance(criterion=Magnitude(), calibration_batches=sequences, pruning_ratio=None, intermediate_size=17)
    fit(folder, tmp_path / "out", importance=chosen, limit_train_batches=0)
    text = "16 calibration tokens for up to 17 columns"
    assert (text in caplog.text) == warned
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert any(text in warning for warning in report["warnings"]) == warned


@pytest.mark.parametrize(
    ("budget", "loud"),
    [({"pruning_ratio": 0.55, "units": ("mlp", "heads")}, True), ({"pruning_ratio": 0.2}, False)],
)
def test_a_budget_that_removes_more_than_half_is_said_before_loading(folder, budget, loud, caplog, monkeypatch):
    class Loaded(Exception):
        pass

    def load(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr("hfprune.modules.causal_lm.load_causal_lm", load)
    chosen = importance(**({"pruning_ratio": None, "compensation": None} | budget))
    with pytest.raises(Loaded):
        fit(folder, importance=chosen, limit_train_batches=0)
    assert ("of the parameters, more than half: 6,848 -> " in caplog.text) == loud
