"""Sparse pruning layer by layer, against whole forward passes with hooks."""

import pytest
import torch

from hfprune.models import find_spec
from hfprune.models.projection import weight_of
from hfprune.sparse import InputSums, MagnitudeSparsity, SparseGPT, Sparsity, Wanda, ZPruner
from hfprune.sparse.engine import prune_sparse
from hfprune.sparse.statistics import projections
from hfprune.utils.errors import CalibrationError, ConfigError
from tests.helpers.models import NAMES, tiny
from tests.unit.pruning.test_layerwise import BATCHES, inputs_of, layer_outputs

HALF = Sparsity.parse("0.5")


def layers_of(model):
    return model.get_submodule(find_spec(model).layers)


def slow(model, method, sparsity):
    """One layer after another, statistics from whole forward passes of the model as it is then."""
    for index, layer in enumerate(layers_of(model)):
        inputs = {name: inputs_of(model, f"{find_spec(model).layers}.{index}.{name}") for name in projections(layer)}
        for name, module in projections(layer).items():
            x = inputs[name]
            sums = InputSums(num_sequences=5, squares=x.square().sum(0), products=x.T @ x)
            with torch.no_grad():
                weight_of(module).copy_(method.prune(weight_of(module).detach(), sums, sparsity))


@pytest.mark.parametrize("method", [Wanda(), SparseGPT(block=8), ZPruner()], ids=["wanda", "sparsegpt", "z_pruner"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_whole_passes(name, method):
    model, expected = tiny(name), tiny(name)
    list(prune_sparse(model, BATCHES, method, HALF))
    slow(expected, method, HALF)
    for (parameter, value), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-8, rtol=1e-8, msg=parameter)


@pytest.mark.parametrize("name", NAMES)
def test_only_the_layers_projections_change_and_reports_are_true(name):
    model, dense = tiny(name), tiny(name)
    found = list(prune_sparse(model, BATCHES, Wanda(), Sparsity.parse("2:4")))
    assert [layer.index for layer in found] == [0, 1, 2]
    changed = set()
    for layer in found:
        for inside, zeros in layer.zeros.items():
            module = f"{find_spec(model).layers}.{layer.index}.{inside}"
            changed.add(f"{module}.weight")
            assert zeros == float((weight_of(model.get_submodule(module)) == 0).double().mean()) == 0.5
        assert 0 < layer.error < 1.5
    for (parameter, value), before in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(value, before) != (parameter in changed), parameter


def test_the_error_is_that_of_the_layer_on_the_pruned_prefix():
    model = tiny()
    for layer in prune_sparse(model, BATCHES, Wanda(), HALF):
        restored = tiny()
        for index in range(layer.index):
            layers_of(restored)[index].load_state_dict(layers_of(model)[index].state_dict())
        before, after = (torch.cat([o.flatten(0, 1) for o in layer_outputs(m, layer.index)]) for m in (restored, model))
        assert layer.error == pytest.approx(float((before - after).square().sum() / before.square().sum()), rel=1e-9)


def test_batches_do_not_matter():
    rows = [{"input_ids": row[None]} for batch in BATCHES for row in batch["input_ids"]]
    one, other = tiny(), tiny()
    list(prune_sparse(one, BATCHES, SparseGPT(), HALF))
    list(prune_sparse(other, rows, SparseGPT(), HALF))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_zero_sparsity_changes_nothing():
    model, dense = tiny(), tiny()
    found = list(prune_sparse(model, BATCHES, SparseGPT(), Sparsity.parse(0)))
    assert all(layer.error == 0 for layer in found)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_method_without_data_sums_nothing_up():
    model = tiny()
    list(prune_sparse(model, BATCHES[:1], MagnitudeSparsity(), HALF))
    weight = model.model.layers[1].mlp.up_proj.weight
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_patterns_that_do_not_fit_change_nothing():
    model, dense = tiny(), tiny()
    with pytest.raises(ConfigError, match="of layer 0 has 16 inputs, not a multiple of 5"):
        list(prune_sparse(model, BATCHES, Wanda(), Sparsity.parse("2:5")))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_activations_that_are_not_finite_are_named():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[0] = torch.inf
    with pytest.raises(CalibrationError, match=r"mlp.gate_proj of layer 1: activations are not finite"):
        list(prune_sparse(model, BATCHES, Wanda(), HALF))


@pytest.mark.parametrize("method", [MagnitudeSparsity(), Wanda(), SparseGPT()])
def test_weights_that_are_not_finite_are_named(method):
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"mlp.up_proj of layer 1: weights are not finite"):
        list(prune_sparse(model, BATCHES, method, HALF))
