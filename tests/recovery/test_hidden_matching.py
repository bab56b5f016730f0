"""Recovery that also matches hidden states: against loops, with layers removed, and what it does to a run."""

import copy

import pytest
import torch

from hfprune import PruneTrainer, PruningModule, TaylorImportanceCallback, TextDataModule
from hfprune.allocation import Explicit
from hfprune.criteria import Magnitude
from hfprune.errors import ConfigError
from hfprune.recovery import DistillationRecovery
from hfprune.recovery.hidden_matching import check_sizes, hidden_distance, layer_outputs, matched
from tests.models import save_tiny, tiny, token_ids


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
    assert len(matched(theirs, (1,))) == 2
    assert float(hidden_distance(ours[:1], matched(theirs, (1,))[:1], counted)) == 0
    assert float(hidden_distance(ours[1:], matched(theirs, (1,))[1:], counted)) > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"))


def fit(folder, hidden, **importance):
    module = PruningModule(folder, learning_rate=5e-3, distillation=DistillationRecovery(hidden=hidden))
    options = importance or {"pruning_ratio": 0.3}
    trainer = PruneTrainer(
        callbacks=[TaylorImportanceCallback(recovery=None, **options)], accelerator="cpu", devices=1, logger=False,
        max_epochs=3, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(0)
    data = TextDataModule(
        seq_len=16, calibration_sequences=4, batch_size=4, recovery_sequences=16, validation_sequences=4, eval_windows=0
    )
    trainer.fit(module, datamodule=data)
    return module


def away(module, folder):
    dense = PruningModule(folder)
    dense.configure_model()
    removed = module.plan.removed_layers()
    ids = next(iter(module.trainer.datamodule.train_dataloader()))["input_ids"]
    with layer_outputs(module.causal_lm) as ours, layer_outputs(dense.causal_lm) as theirs, torch.no_grad():
        module.causal_lm.eval()(input_ids=ids, use_cache=False)
        dense.causal_lm.eval()(input_ids=ids, use_cache=False)
    return float(hidden_distance(ours, matched(theirs, removed), torch.ones_like(ids, dtype=torch.bool)))


def test_the_weight_draws_hidden_states_nearer(folder):
    far, near = (away(fit(folder, hidden), folder) for hidden in (0.0, 10.0))
    assert near < 0.8 * far


def test_with_a_layer_gone(folder):
    module = fit(folder, 1.0, units=("blocks",), allocation=Explicit(blocks=[1]), criterion=Magnitude())
    assert len(module.causal_lm.model.layers) == 2


def test_what_cannot_be_compared_is_refused(folder):
    with pytest.raises(ConfigError, match="needs the dense model itself: not with --model.distillation.cache"):
        DistillationRecovery(hidden=1.0, cache="somewhere")
    with pytest.raises(ConfigError, match="is a weight >= 0"):
        DistillationRecovery(hidden=-1.0)
    small = tiny("llama")
    small.config.hidden_size = 8
    with pytest.raises(ConfigError, match="16 channels, the dense one's 8"):
        check_sizes(tiny("llama"), small)
