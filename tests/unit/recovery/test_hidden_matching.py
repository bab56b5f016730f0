"""Recovery that also matches hidden states: against loops, with layers removed, and what it does to a run."""

import copy

import pytest
import torch

from hfprune import PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule
from hfprune.allocation import Explicit
from hfprune.criteria import Magnitude
from hfprune.recovery import DistillationRecovery
from hfprune.recovery.distillation import HiddenMatching, check_sizes, hidden_distance, layer_outputs, matched_layers
from hfprune.utils.errors import ConfigError
from tests.helpers.models import save_tiny, tiny, token_ids


def states(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True).hidden_states


def by_hand(ours, theirs, counted):
    """Token by token, layer by layer, channel by channel."""
    total = 0.0
    for n in range(counted.shape[0]):
        for t in range(counted.shape[1]):
            if counted[n, t]:
                for h, g in zip(ours, theirs, strict=True):
                    error = sum((float(a) - float(b)) ** 2 for a, b in zip(h[n, t], g[n, t], strict=True))
                    total += error / sum(float(b) ** 2 for b in g[n, t]) / len(ours)
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "phi3"])
def test_outputs_of_layers_and_their_distance(name):
    pruned, dense, ids = tiny(name, seed=1), tiny(name, seed=2), token_ids(2, 6)
    states(pruned, ids)  # transformers leaves hooks of its own
    hooks = sum(len(module._forward_hooks) for module in pruned.modules())
    with layer_outputs(pruned) as ours, layer_outputs(dense) as theirs, torch.no_grad():
        pruned(input_ids=ids)
        dense(input_ids=ids)
    assert len(ours) == len(theirs) == 3
    for layer in (0, 1):  # the last of transformers' is behind the final norm
        torch.testing.assert_close(ours[layer], states(pruned, ids)[layer + 1], atol=1e-12, rtol=0)
    counted = torch.ones(2, 6, dtype=torch.bool)
    counted[0, :2] = False
    found = float(hidden_distance(ours, theirs, counted))
    assert found == pytest.approx(by_hand(ours, theirs, counted), rel=1e-10)
    assert found != pytest.approx(by_hand(ours, theirs, torch.ones_like(counted)), rel=1e-3)
    assert sum(len(module._forward_hooks) for module in pruned.modules()) == hooks


def test_layers_that_went_have_no_counterpart():
    dense, ids = tiny("llama"), token_ids(1, 5)
    pruned = copy.deepcopy(dense)
    del pruned.model.layers[1]
    with layer_outputs(pruned) as ours, layer_outputs(dense) as theirs, torch.no_grad():
        pruned(input_ids=ids, use_cache=False)
        dense(input_ids=ids, use_cache=False)
    counted = torch.ones(1, 5, dtype=torch.bool)
    assert matched_layers(3, (1,), None) == [(0, 0), (1, 2)]
    assert float(hidden_distance(ours[:1], theirs[:1], counted)) == 0
    assert float(hidden_distance(ours[1:], theirs[2:], counted)) > 0


def test_packed_rows_that_run_as_one():
    """The varlen path leaves padding out and lays all rows end to end: [1, N, H]."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.randn(3, 5, 4, generator=generator)] for _ in range(2))
    real = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    counted = real.bool()
    counted[:, 0] = False
    flat = [[state[0][real.bool()][None]] for state in (ours, theirs)]
    expected = hidden_distance(ours, theirs, counted, real)
    for mine, dense in ((flat[0], flat[1]), (flat[0], theirs)):
        torch.testing.assert_close(hidden_distance(mine, dense, counted, real), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def fit(folder, hidden, *, layers=None, again=False, **importance):
    settings = DistillationRecovery(hidden=hidden, hidden_layers=layers)
    module = PruningModule(folder, learning_rate=5e-3, distillation=settings, gradient_checkpointing=again)
    options = importance or {"pruning_ratio": 0.3}
    trainer = PruneTrainer(
        callbacks=[TaylorImportanceCallback(recovery="full", **options)], accelerator="cpu", devices=1, logger=False,
        max_epochs=3, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(0)
    data = TextDataModule(
        seq_len=16, calibration_sequences=4, batch_size=4, recovery_sequences=16, validation_sequences=4, eval_windows=0
    )
    trainer.fit(module, datamodule=data)
    return module


def away(module, folder, layers=None):
    dense = PruningModule(folder)
    dense.configure_model()
    removed = module.plan.removed_layers()
    ids = next(iter(module.trainer.datamodule.train_dataloader()))["input_ids"]
    with layer_outputs(module.causal_lm) as ours, layer_outputs(dense.causal_lm) as theirs, torch.no_grad():
        module.causal_lm.eval()(input_ids=ids, use_cache=False)
        dense.causal_lm.eval()(input_ids=ids, use_cache=False)
    pairs = matched_layers(3, removed, layers)
    every = torch.ones_like(ids, dtype=torch.bool)
    return float(hidden_distance([ours[i] for i, _ in pairs], [theirs[j] for _, j in pairs], every))


def test_the_weight_draws_hidden_states_nearer(folder):
    modules = [fit(folder, hidden) for hidden in (0.0, 10.0)]
    far, near = (away(module, folder) for module in modules)
    assert near < 0.8 * far
    first = fit(folder, 10.0, layers=(0,))
    assert away(first, folder, (0,)) < 0.8 * away(modules[0], folder, (0,))
    assert away(first, folder, (1, 2)) > away(modules[1], folder, (1, 2))


def test_layers_run_again_match_as_well(folder):
    """Gradient checkpointing runs the layers a second time, when nobody takes their outputs any more."""
    one, two = (dict(fit(folder, 1.0, again=again).named_parameters()) for again in (False, True))
    assert all(torch.equal(parameter, two[name]) for name, parameter in one.items())


def test_with_a_layer_gone(folder):
    gone = {"units": ("layers",), "allocation": Explicit(layers=[1]), "criterion": Magnitude()}
    module = fit(folder, 1.0, layers=(1, 2), **gone)
    assert len(module.causal_lm.model.layers) == 2
    with pytest.raises(ConfigError, match=r"hidden_layers=\[1\] were all removed; kept layers: \[0, 2\]"):
        fit(folder, 1.0, layers=(1,), **gone)


@pytest.mark.parametrize("layers", [(), (0, 0), (-1,)])
def test_layers_that_are_no_choice(layers):
    with pytest.raises(ConfigError, match="must contain one or more different layers >= 0"):
        DistillationRecovery(hidden=1.0, hidden_layers=layers)
    with pytest.raises(ConfigError, match=r"requires distillation.hidden > 0 \(it is 0.0\)"):
        DistillationRecovery(hidden_layers=(1,))


def test_layers_that_are_not_there_are_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(PruningModule, "configure_model", lambda self: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="contains layer 3, but the model has layers 0 to 2"):
        fit(folder, 1.0, layers=(0, 3))
    HiddenMatching(1.0, (0, 2)).check(tiny("llama").config)


def test_removed_channels_are_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(PruningModule, "configure_model", lambda self: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match="remove 'channels' from the units"):
        fit(folder, 1.0, pruning_ratio=0.3, units=("channels",), criterion=Magnitude())


def test_what_cannot_be_compared_is_refused(folder):
    with pytest.raises(ConfigError, match="distillation.hidden=1.0 must be .* 0 with distillation.cache"):
        DistillationRecovery(hidden=1.0, cache="somewhere")
    with pytest.raises(ConfigError, match="must be >= 0"):
        DistillationRecovery(hidden=-1.0)
    small = tiny("llama")
    small.config.hidden_size = 8
    with pytest.raises(ConfigError, match="16 channels in the pruned model and 8 in the dense"):
        check_sizes(tiny("llama"), small)
